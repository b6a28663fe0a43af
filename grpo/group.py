"""A group is one prompt and G continuations; a pack is what one pass through the network holds.

Rows stay ragged: a completion is its own 1-D tensor of token ids, end token included, until the mathematics asks for a
rectangle, which `pad_rows` makes together with its mask."""

from dataclasses import dataclass, field
from typing import Callable

import torch
from torch import Tensor


@dataclass
class Prompt:
    """One encoded sample.

    tokens     (P,) token ids, each image already as long a run of image tokens as it has features
    positions  (3, P) rope positions: time, height, width
    pixels     (patches, patch values) of all its images, or None
    grids      (images, 3) patches per image: time, height, width, or None
    features   (image tokens, hidden) once the frozen vision encoder has seen the pixels, else None
    sample     the task's own sample; `id` names it in errors and seeds its noise"""

    tokens: Tensor
    positions: Tensor
    pixels: Tensor | None = None
    grids: Tensor | None = None
    features: Tensor | None = None
    sample: object = None
    id: str = ""

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(eq=False)
class Group:
    """A prompt and its G continuations, and what becomes known of them in the course of a step.

    completions  G tensors (C_i,) of token ids
    logps        G tensors (C_i,): the sampler's own log-probabilities (empty where nobody sampled, as in SFT)
    finished     G flags: True where the completion ended by itself, False where the limit cut it
    parts        (G, K) reward parts, unweighted
    rewards      (G,) the one number that each completion is judged by
    counted      (G,) bool: False where the reward failed and the completion is left out (--reward_failures mask)
    earlier      how often its sample came before in the same rollout
    whole        the group of which this one holds some completions, None where it is whole itself"""

    prompt: Prompt
    completions: list[Tensor]
    logps: list[Tensor] = field(default_factory=list)
    finished: list[bool] = field(default_factory=list)
    parts: Tensor | None = None
    rewards: Tensor | None = None
    counted: Tensor | None = None  # None: all of them
    earlier: int = 0
    whole: "Group | None" = None

    def __post_init__(self):
        if self.counted is None:
            self.counted = torch.ones(len(self.completions), dtype=torch.bool)

    @property
    def source(self) -> "Group":
        """The whole group."""
        return self.whole or self

    @property
    def lengths(self) -> list[int]:
        return [len(completion) for completion in self.completions]

    @property
    def packed_tokens(self) -> int:
        """What one pass over the group costs: P + ΣC_i, where padding and repeating would cost G·(P + max C)."""
        return len(self.prompt) + sum(self.lengths)


@dataclass(eq=False)
class Pack:
    """One packed pass: its groups, and what the objective takes of their N completions of at most L tokens.

    mask        (N, L) bool: the tokens that train
    advantages  (N,)
    ref_logp    (N, L) log-probabilities under the reference, None without one
    old_logp    (N, L) under the policy that drew them: those of the first update's pass
    loss        this pass's share of the last update's loss
    chain       the same object in consecutive packs that share their prompts' pass, see engine/split_group.py"""

    groups: list[Group]
    mask: Tensor
    advantages: Tensor | None = None
    ref_logp: Tensor | None = None
    old_logp: Tensor | None = None
    loss: Tensor | None = None
    chain: object = None

    @property
    def lengths(self) -> list[int]:
        return [length for group in self.groups for length in group.lengths]

    @property
    def packed_tokens(self) -> int:
        return sum(group.packed_tokens for group in self.groups)


def pad_rows(flat: Tensor, lengths: list[int], value: float = 0.0) -> Tensor:
    """(T,) end to end → (N, L) left-aligned, `value` elsewhere; differentiable. N = len(lengths), L the longest."""
    return torch.nn.utils.rnn.pad_sequence(list(flat.split(lengths)), batch_first=True, padding_value=value)


def row_mask(lengths: list[int], device=None) -> Tensor:
    """(N, L) bool: True on a completion's tokens, its end token included. Made from positions alone, so that
    a pad token that is also the end token (Qwen's is not, many others' are) cannot hide the end from training."""
    ends = torch.tensor(lengths, device=device)
    return torch.arange(max(lengths), device=device) < ends[:, None]


def within(budget: int, items: list, cost: Callable[[object], int]) -> list[list]:
    """Consecutive items joined while their costs fit the budget; one that alone exceeds it stands alone."""
    parts, room = [], 0
    for item in items:
        if not parts or cost(item) > room:
            parts.append([])
            room = budget
        parts[-1].append(item)
        room -= cost(item)
    return parts


def make_packs(groups: list[Group], token_budget: int, device=None) -> list[Pack]:
    """Groups for one pass each: as many as the budget of packed tokens holds."""
    parts = within(token_budget, groups, lambda group: group.packed_tokens)
    return [Pack(part, row_mask([n for group in part for n in group.lengths], device)) for part in parts]
