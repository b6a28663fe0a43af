"""A token from its logits: the inverse of the cumulative distribution at a number of the completion's own noise.

The noise of a completion is a fixed list of uniform numbers, one a token. It belongs to (seed, prompt id, index) and to
nothing else, so a completion depends neither on the batch, nor on the number of ranks, nor on what was guessed."""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo.engine.head import exponential_

BLOCK = 128


@dataclass(frozen=True)
class Sampling:
    """How to continue a prompt.

    temperature 0 is greedy. `seed`, the prompt's id and the completion's number make its own noise. `earlier` says of
    each prompt how often it came before in the same rollout (empty: never): its completions are then numbered on, from
    G or 2G. `rows` live at once; it changes memory use only. What is drawn is read by the host once in `read_every`
    decode steps of static shapes; 0 is 8 on an accelerator, and on a CPU every step, whose shapes then follow the rows.
    top_p and top_k: for evaluation, see `check_training`."""

    max_tokens: int
    end_tokens: tuple[int, ...]
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    rows: int = 64
    read_every: int = 0
    seed: str = "0"
    earlier: tuple[int, ...] = ()

    def __post_init__(self):
        for name, least in (("max_tokens", 1), ("temperature", 0), ("rows", 1), ("read_every", 0), ("top_k", 0)):
            if not getattr(self, name) >= least:
                raise ValueError(f"{name} is {getattr(self, name)}; at least {least} expected")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; above 0 and at most 1 expected")

    def steps(self, device: torch.device) -> int:
        """Between two readings; 0: shapes follow the rows."""
        return self.read_every or (0 if device.type == "cpu" else 8)

    def check_training(self) -> "Sampling":
        """A token outside the reference's nucleus has k3 = ∞, one outside the policy's a ratio of 0."""
        if self.top_p < 1 or self.top_k or self.temperature == 0:
            raise ValueError("training rollouts are drawn from the full softmax: temperature > 0, top_p 1, top_k 0")
        return self


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


def draw_tokens(logits: Tensor, uniform: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """(B, V) logits, (B,) uniform numbers → (B,) tokens and their log-probabilities under the *full* softmax. What
    is computed overwrites the logits: new memory of their size costs more than the arithmetic."""
    shifted = logits.sub_(logits.amax(-1, keepdim=True))
    narrow = sampling.top_k or sampling.top_p < 1
    tokens = shifted.argmax(-1) if sampling.temperature == 0 else None
    kept = keep_top(shifted, sampling.top_k, sampling.top_p).exp_() if narrow else None
    masses = exponential_(shifted)  # what a softmax divides by its sum
    sums = block_sums(masses)
    if tokens is None:
        tokens = invert(kept, block_sums(kept), uniform) if narrow else invert(masses, sums, uniform)
    return tokens, (masses.gather(-1, tokens[:, None])[:, 0] / sums.sum(-1)).log().float()


def block_sums(masses: Tensor) -> Tensor:
    """(B, V) → (B, ⌈V / BLOCK⌉), float64: float32 would lose the improbable."""
    whole = masses.shape[1] // BLOCK * BLOCK
    sums = masses[:, :whole].unflatten(1, (-1, BLOCK)).sum(-1)
    return torch.cat([sums, masses[:, whole:].sum(-1, keepdim=True)], 1).double()


def invert(masses: Tensor, sums: Tensor, uniform: Tensor) -> Tensor:
    """Inverse of the cumulative distribution of (B, V) masses: (B,) numbers in [0, 1) → (B,) places, none of mass 0.

    One number a token, so a completion's noise is a plain list. First the block of BLOCK places, then the place in
    it: a running sum over 152k places would take most of a step."""
    ends = sums.cumsum(-1)  # of the blocks
    block, before = first_beyond(ends, uniform * ends[:, -1])
    places = block[:, None] * BLOCK + torch.arange(BLOCK, device=block.device)
    known = places < masses.shape[1]
    inside = (masses.gather(1, places.where(known, 0)) * known).double().cumsum(-1)
    # The number lies within the block's own sum, which this sum may miss by a rounding: scaled from one to the other.
    share = (uniform * ends[:, -1] - before) / (ends.gather(1, block[:, None])[:, 0] - before)
    return block * BLOCK + first_beyond(inside, share * inside[:, -1])[0]


def first_beyond(cumulative: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """(B, n) running sums, (B,) numbers → the first place whose sum exceeds the number, and the sum before it.

    right=True: *exceeds*, so never a place that adds nothing. A number that rounding has made the whole sum, which no
    place exceeds, is taken one step below it."""
    whole = cumulative[:, -1:]
    wanted = torch.minimum(wanted[:, None], whole.nextafter(torch.zeros_like(whole)))
    place = torch.searchsorted(cumulative, wanted, right=True)
    before = torch.where(place > 0, cumulative.gather(1, (place - 1).clamp(min=0)), 0.0)
    return place[:, 0], before[:, 0]
