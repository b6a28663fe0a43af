"""`sample`: prompts → groups. One prefill a prompt, G continuations that share its keys and values.

Rows that end leave at once and waiting ones take their places, so that a rollout does not run at the pace
of its slowest row. Live rows and live groups are always the first ones of their caches: whoever leaves is
overwritten by the last one, and every product runs on a plain slice.
"""

import hashlib
from collections import deque
from dataclasses import dataclass, field
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from grpo.engine.attention import Decode, KeysValues, Packed
from grpo.engine.head import token_logits
from grpo.engine.policy import Policy
from grpo.engine.sizes import PREFILL_TOKENS
from grpo.group import Group, Prompt, within

Turn = Callable[[bool], bool]  # this process has work → any process has; see `sample`


@dataclass(frozen=True)
class Sampling:
    """How to continue a prompt.

    temperature 0 is greedy. `seed` and the prompt's id make each completion's own noise, so that it depends
    neither on who else is in the batch nor on the number of processes. `rows` live at once (memory, not result).
    top_p and top_k are for evaluation: in training rollouts they are refused (see `check_training`).
    """

    max_tokens: int
    end_tokens: tuple[int, ...]
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    rows: int = 64
    seed: str = "0"

    def __post_init__(self):
        if self.max_tokens < 1:
            raise ValueError(f"max completion tokens is {self.max_tokens}; a completion needs at least 1 token")
        if self.temperature < 0:
            raise ValueError(f"temperature is {self.temperature}; it must be 0 (greedy) or positive")
        if self.rows < 1:
            raise ValueError(f"rollout rows is {self.rows}; it must be at least 1")
        if not 0 < self.top_p <= 1 or self.top_k < 0:
            raise ValueError(f"top_p is {self.top_p}, top_k is {self.top_k}; expected 0 < top_p <= 1 and top_k >= 0")

    def check_training(self) -> "Sampling":
        """A token outside the reference's nucleus has k3 = ∞, one outside the policy's a ratio of 0."""
        if self.top_p < 1 or self.top_k or self.temperature == 0:
            raise ValueError("training rollouts are drawn from the full softmax: temperature > 0, top_p 1, top_k 0")
        return self


@dataclass
class Row:
    """One continuation being written."""

    prompt: int  # index of its prompt
    index: int  # which of the G
    noise: list[float]  # one uniform number a token
    tokens: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)


@dataclass
class Slot:
    """One prompt whose keys and values are cached; `left` counts its rows that have not ended."""

    prompt: int
    left: int
    last_hidden: Tensor  # (hidden,): what predicts every row's first token


def noise(seed: str, prompt_id: str, index: int, count: int) -> list[float]:
    """`count` uniform numbers in [0, 1) that belong to this completion alone."""
    digest = hashlib.blake2b(f"{seed}/{prompt_id}/{index}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
    return torch.rand(count, generator=generator, dtype=torch.float64).tolist()


def keep_top(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Logits outside the k most likely tokens, or outside the smallest set that holds top_p, become −∞."""
    order = logits.argsort(-1, descending=True)
    ranked = logits.gather(-1, order)
    outside = torch.zeros_like(ranked, dtype=torch.bool)
    if top_k:
        outside[:, top_k:] = True
    if top_p < 1:
        probabilities = ranked.softmax(-1)
        outside |= probabilities.cumsum(-1) - probabilities >= top_p  # mass before it already suffices
    return logits.scatter(-1, order, ranked.masked_fill(outside, float("-inf")))


def draw(logits: Tensor, uniform: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """(B, V) logits, (B,) uniform numbers → (B,) tokens and their log-probabilities under the *full* softmax."""
    probabilities = logits.softmax(-1)
    if sampling.temperature == 0:
        tokens = logits.argmax(-1)
    elif sampling.top_k or sampling.top_p < 1:
        tokens = invert(keep_top(logits, sampling.top_k, sampling.top_p).softmax(-1), uniform)
    else:
        tokens = invert(probabilities, uniform)
    return tokens, probabilities.gather(-1, tokens[:, None])[:, 0].log()


BLOCK = 512


def invert(masses: Tensor, uniform: Tensor) -> Tensor:
    """Inverse of the cumulative distribution of (B, V) masses: (B,) numbers in [0, 1) → (B,) places, none of mass 0.

    One number a token, so a completion's noise is a plain list. First the block of BLOCK places, then the place in
    it: a running sum over 152k places would take most of a step. Sums are float64: float32 would lose the improbable.
    """
    blocks = F.pad(masses, (0, -masses.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
    ends = blocks.sum(-1).double().cumsum(-1)  # of the blocks
    block, before = first_beyond(ends, uniform * ends[:, -1])
    inside = blocks[torch.arange(len(blocks), device=block.device), block].double().cumsum(-1)
    # The number lies within the block's own sum, which this sum may miss by a rounding: scaled from the one to the other.
    share = (uniform * ends[:, -1] - before) / (ends.gather(1, block[:, None])[:, 0] - before)
    return block * BLOCK + first_beyond(inside, share * inside[:, -1])[0]


def first_beyond(cumulative: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """(B, n) running sums, (B,) numbers → the first place whose sum exceeds the number, and the sum before it.

    right=True: *exceeds*, so never a place that adds nothing. A number that rounding has made the whole sum, which no
    place exceeds, is taken one step below it.
    """
    whole = cumulative[:, -1:]
    wanted = torch.minimum(wanted[:, None], whole.nextafter(torch.zeros_like(whole)))
    place = torch.searchsorted(cumulative, wanted, right=True)
    before = torch.where(place > 0, cumulative.gather(1, (place - 1).clamp(min=0)), 0.0)
    return place[:, 0], before[:, 0]


def slots(prompts: list[Prompt], group_size: int, sampling: Sampling) -> tuple[int, int]:
    """(groups, rows) that caches have room for. A group that has no live row while its others wait leaves a row free:
    never more groups than rows."""
    rows = min(sampling.rows, len(prompts) * group_size)
    return min(rows, len(prompts)), rows


def head_size(text) -> int:
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def cache_bytes(policy: Policy, prompts: list[Prompt], group_size: int, sampling: Sampling, item: int) -> int:
    """What the caches of a rollout take, `item` bytes a number: prompts padded to the longest, rows to the limit."""
    text, (groups, rows) = policy.text_config, slots(prompts, group_size, sampling)
    tokens = groups * max(map(len, prompts), default=0) + rows * sampling.max_tokens
    return 2 * tokens * text.num_hidden_layers * text.num_key_value_heads * head_size(text) * item


class Rollout:
    """The state of one call of `sample`: caches, live rows, live groups."""

    def __init__(self, policy: Policy, prompts: list[Prompt], group_size: int, sampling: Sampling, turn: Turn):
        self.policy, self.prompts, self.sampling = policy, prompts, sampling
        self.group_size, self.turn = group_size, turn
        self.waiting = deque((p, i) for p in range(len(prompts)) for i in range(group_size))
        self.rows: list[Row] = []
        self.slots: list[Slot] = []
        self.max_rows = slots(prompts, group_size, sampling)[1]
        self.caches = self._allocate(*slots(prompts, group_size, sampling))
        self.hidden: Tensor | None = None  # (live rows, hidden): what predicts each row's next token
        self.decode: Decode | None = None
        self.done: list[list[Row | None]] = [[None] * group_size for _ in prompts]
        self.spared = 0  # tokens that ended rows will not write, of the limit's

    def _allocate(self, groups: int, rows: int) -> list[KeysValues]:
        text, weight = self.policy.text_config, self.policy.model.lm_head.weight
        heads = text.num_key_value_heads
        size = head_size(text)
        longest = max(map(len, self.prompts))
        # zeros, not empty: a weight of exactly 0 times uninitialised memory may still be NaN
        new = lambda slots, length: torch.zeros(slots, heads, length, size, dtype=weight.dtype, device=weight.device)
        return [
            KeysValues(new(groups, longest), new(groups, longest), new(rows, self.sampling.max_tokens),
                       new(rows, self.sampling.max_tokens))
            for _ in range(text.num_hidden_layers)
        ]

    def prefill(self, indices: list[int]) -> None:
        """Prompts that enter, in packed passes of bounded size."""
        for some in within(PREFILL_TOKENS, indices, lambda index: len(self.prompts[index])):
            self.prefill_pass(some)

    def prefill_pass(self, indices: list[int]) -> None:
        """One packed pass; the prompts' keys and values are written into new group slots."""
        prompts = [self.prompts[index] for index in indices]
        cache: list[list[tuple[Tensor, Tensor]]] = []
        embedded = self.policy.embed(prompts)[None]
        positions = torch.cat([prompt.positions for prompt in prompts], 1)[:, None].to(self.policy.device)
        layout = Packed([(len(prompt), []) for prompt in prompts], prompt_cache=cache)
        self.turn(True)
        hidden = self.policy.trunk(embedded, positions, layout)[0]
        for layer, keys_values in zip(self.caches, cache):
            for offset, (key, value) in enumerate(keys_values):
                layer.prompt_key[len(self.slots) + offset, :, : key.shape[1]] = key
                layer.prompt_value[len(self.slots) + offset, :, : value.shape[1]] = value
        ends = torch.tensor([len(prompt) for prompt in prompts]).cumsum(0) - 1
        self.slots += [Slot(index, self.group_size, hidden[end].clone()) for index, end in zip(indices, ends.tolist())]

    def admit(self) -> None:
        """Waiting rows into free places; those whose prompt is cached at once.

        New prompts wait until an eighth of the places is free: a prefill of several costs less than several.
        """
        free, entering, cached = self.max_rows - len(self.rows), [], {slot.prompt for slot in self.slots}
        patient = self.rows and free < self.max_rows // 8
        while self.waiting and len(entering) < free and not (patient and self.waiting[0][0] not in cached):
            entering.append(self.waiting.popleft())
        if not entering:
            return
        if new := [p for p in dict.fromkeys(p for p, _ in entering) if p not in cached]:
            self.prefill(new)
        hidden_of = {slot.prompt: slot.last_hidden for slot in self.slots}
        for p, i in entering:
            self.rows.append(Row(p, i, noise(self.sampling.seed, self.prompts[p].id, i, self.sampling.max_tokens)))
        entered = torch.stack([hidden_of[p] for p, _ in entering])
        self.hidden = entered if self.hidden is None else torch.cat([self.hidden, entered])
        self.decode = None

    def write(self) -> int:
        """Draw every live row's next token; rows that end leave. Returns the number of tokens written."""
        weight, sampling = self.policy.model.lm_head.weight[: self.policy.vocabulary], self.sampling
        logits = token_logits(self.hidden, weight, sampling.temperature or 1.0, self.policy.banned)
        uniform = torch.tensor([row.noise[len(row.tokens)] for row in self.rows], dtype=torch.float64)
        tokens, logps = draw(logits, uniform.to(logits.device), sampling)
        # one transfer from the device a step; float64 holds every token id exactly
        for row, token, logp in zip(self.rows, *torch.stack([tokens.double(), logps.double()]).tolist()):
            row.tokens.append(int(token))
            row.logps.append(logp)
        written = len(self.rows)
        for place in reversed(range(written)):
            row = self.rows[place]
            if row.tokens[-1] in sampling.end_tokens or len(row.tokens) == sampling.max_tokens:
                self.leave(place)
        return written

    def leave(self, place: int) -> None:
        """A row has ended: the last live row takes its place, and likewise for its group if it was the last."""
        row, last = self.rows[place], len(self.rows) - 1
        self.done[row.prompt][row.index] = row
        self.spared += self.sampling.max_tokens - len(row.tokens)
        for cache in self.caches if place != last else ():
            cache.suffix_key[place] = cache.suffix_key[last]
            cache.suffix_value[place] = cache.suffix_value[last]
        self.rows[place] = self.rows[last]
        self.rows.pop()
        self.decode = None
        at = next(i for i, slot in enumerate(self.slots) if slot.prompt == row.prompt)
        self.slots[at].left -= 1
        if self.slots[at].left == 0:
            last = len(self.slots) - 1
            for cache in self.caches if at != last else ():
                cache.prompt_key[at] = cache.prompt_key[last]
                cache.prompt_value[at] = cache.prompt_value[last]
            self.slots[at] = self.slots[last]
            self.slots.pop()

    def arrange(self) -> Decode:
        """The layout of a decode step for the rows that live now; kept until one comes or goes."""
        slot_of = {slot.prompt: at for at, slot in enumerate(self.slots)}
        return Decode(
            self.caches,
            prompt_lengths=[len(self.prompts[slot.prompt]) for slot in self.slots],
            suffix_lengths=[len(row.tokens) - 1 for row in self.rows],
            group_of_row=[slot_of[row.prompt] for row in self.rows],
        )

    def read(self) -> None:
        """Feed every live row's last token; the new hidden states predict the next ones."""
        if self.decode is None:
            self.decode = self.arrange()
            first = [int(self.prompts[row.prompt].positions.max()) + 1 for row in self.rows]
            self.first_position = torch.tensor(first, device=self.policy.device)
        tokens = torch.tensor([[row.tokens[-1]] for row in self.rows], device=self.policy.device)
        embedded = self.policy.model.get_input_embeddings()(tokens)
        positions = (self.first_position + self.decode.suffix_length)[None, :, None].expand(3, -1, -1)
        self.turn(True)
        self.hidden = self.policy.trunk(embedded, positions, self.decode)[:, 0]
        self.decode.advance()

    def groups(self) -> list[Group]:
        ended = self.sampling.end_tokens
        return [
            Group(
                prompt,
                [torch.tensor(row.tokens) for row in rows],
                [torch.tensor(row.logps) for row in rows],
                [row.tokens[-1] in ended for row in rows],
            )
            for prompt, rows in zip(self.prompts, self.done)
        ]


@torch.no_grad()
def sample(
    policy: Policy, prompts: list[Prompt], group_size: int, sampling: Sampling,
    on_tokens: Callable[[int, int, int], None] | None = None, turn: Turn | None = None,
) -> list[Group]:
    """Continue every prompt `group_size` times. Every step calls `on_tokens(tokens written, rows ended,
    tokens that these rows have not written of their limit)`.

    Sharded weights are whole meanwhile, or every pass through the layers is a collective and `turn` keeps the processes
    in step: it is called before every pass, tells whether any process has work, and who has none goes along with an
    idle token as long as others have. `sharding.sample_unsharded` sees to both.
    """
    rollout = Rollout(policy, prompts, group_size, sampling, turn or (lambda working: working)) if prompts else None
    while rollout and (rollout.waiting or rollout.rows):
        rollout.admit()
        live, spared = len(rollout.rows), rollout.spared
        written = rollout.write()
        if on_tokens:
            on_tokens(written, live - len(rollout.rows), rollout.spared - spared)
        if rollout.rows:
            rollout.read()
        else:
            rollout.hidden = None
    while turn and turn(False):
        dummy_forward(policy)
    return rollout.groups() if rollout else []


def dummy_forward(policy: Policy) -> None:
    """A pass of one token for the company of those who still work."""
    word = policy.embed_tokens(torch.zeros(1, dtype=torch.long))
    policy.trunk(word[None], torch.zeros(3, 1, 1, dtype=torch.long, device=policy.device), Packed([(1, [])]))
