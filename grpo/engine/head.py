"""Log-probabilities of chosen tokens without ever holding all logits.

With a 152k-row head the logits are the memory peak: 8 × 1,024 completion tokens in float32 are 5 GB. So they are
made tile by tile, some tokens × some rows of the vocabulary, reduced to a few numbers a token, thrown away, and made
once more in the backward pass (a trained head's gradient needs each token's upstream gradient, which the objective
knows only after the whole forward). Only the first KEPT bytes of them wait for the backward, which spares their second
product; however many completions there are, it is never more. A tile that fits in the processor's cache is also several
times faster than one that does not: what follows the matrix product reads and writes each logit half a dozen times."""

import math
from collections import deque
from typing import Iterator

import torch
from torch import Tensor

from grpo.engine.packed import packed_linear
from grpo.engine.sizes import GPU_TILE, KEPT, TILE


def wide(x: Tensor) -> torch.dtype:
    """float32, or float64 of float64, in which tests compare to the last digits."""
    return torch.promote_types(x.dtype, torch.float32)


def exponential_(x: Tensor) -> Tensor:
    """eˣ in x's place; as a power of two on a CPU, where MKL was not written for it twice as fast as torch.exp."""
    return x.exp_() if x.is_cuda else x.mul_(1 / math.log(2)).exp2_()


@torch.no_grad()
def token_logits(hidden: Tensor, weight: Tensor, temperature: float, banned: list[int]) -> Tensor:
    """(T, hidden) × (V, hidden) → (T, V) float32 logits of the distribution that is sampled *and* scored.

    Temperature divides; image and video tokens, which a completion cannot hold, are impossible.
    Sampler and scorer both call this function: their distributions cannot drift apart."""
    if weight.is_mkldnn:
        logits = packed_linear(hidden * (1 / temperature), weight)
    elif hidden.device.type == "cuda" and hidden.dtype != wide(hidden):  # bfloat16 would round 20.06 to 20
        logits = torch.mm(hidden, weight.T, out_dtype=wide(hidden)).mul_(1 / temperature)
    else:
        scale = dict(beta=0, alpha=1 / temperature)  # within the product: no pass of its own
        logits = torch.addmm(hidden.new_empty(1), hidden, weight.T, **scale).to(wide(hidden))
    for token in banned:
        logits[:, token] = float("-inf")
    return logits


class Head:
    """The head's weight (V, hidden), its temperature and ban, cut into tiles of (tokens, vocabulary rows).

    `kept` holds the logits of the first tiles, `room` is the number of logits that may still join them."""

    def __init__(self, weight: Tensor, temperature: float, banned: tuple, rows: int, tile: tuple, room: int = 0):
        self.weight, self.temperature, self.banned, self.rows, self.tile = weight, temperature, banned, rows, tile
        self.kept, self.room = deque(), room

    def chunks(self, tokens: int) -> Iterator[slice]:
        return (slice(start, start + self.tile[0]) for start in range(0, tokens, self.tile[0]))

    def vocabulary(self) -> Iterator[tuple[slice, list[int]]]:
        """Rows of the weight, and which of them are banned, counted from the first of them."""
        for start in range(0, self.rows, self.tile[1]):
            end = min(start + self.tile[1], self.rows)
            yield slice(start, end), [token - start for token in self.banned if start <= token < end]

    def logits(self, hidden: Tensor, rows: slice, banned: list[int]) -> Tensor:
        return token_logits(hidden, self.weight[rows], self.temperature, banned)

    def reduce(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The targets' logits, log Σ exp and entropy, (T,) each, by a running softmax over the vocabulary's tiles."""
        top = hidden.new_full((len(hidden),), torch.finfo(torch.float32).min, dtype=wide(hidden))
        mass, weighted, chosen = torch.zeros_like(top), torch.zeros_like(top), torch.full_like(top, float("-inf"))
        for rows, banned in self.vocabulary():
            logits = self.logits(hidden, rows, banned)
            place = targets - rows.start
            inside = (place >= 0) & (place < logits.shape[1])
            chosen = torch.where(inside, logits.gather(1, place.clamp(0, logits.shape[1] - 1)[:, None])[:, 0], chosen)
            before, top = top, torch.maximum(top, logits.amax(1))
            shrink = (before - top).exp_()
            exp = exponential_(logits - top[:, None])
            mass = mass * shrink + exp.sum(1)
            logits[:, banned] = 0.0  # 0 · (−inf) is NaN; a banned token's share of the entropy is 0
            weighted = weighted * shrink + exp.mul_(logits).sum(1)
            if logits.numel() <= self.room:
                logits[:, banned] = float("-inf")
                self.kept.append(logits)
                self.room -= logits.numel()
            else:
                self.room = 0  # the first ones only: the backward takes them from the left
        log_norm = top + mass.log()
        return chosen, log_norm, log_norm - weighted / mass


class CompletionLogp(torch.autograd.Function):
    """log softmax(token_logits)[target] and the entropy, tile by tile."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, banned, rows, tile, room):
        head = Head(weight, temperature, banned, rows, tile, room)
        parts = [head.reduce(hidden[chunk], targets[chunk]) for chunk in head.chunks(len(hidden))]
        chosen, log_norm, entropy = (torch.cat(part) for part in zip(*parts))
        ctx.save_for_backward(hidden, weight, targets, log_norm)
        ctx.head, ctx.kept = (temperature, banned, rows, tile), head.kept
        ctx.mark_non_differentiable(entropy)
        return chosen - log_norm, entropy

    @staticmethod
    def backward(ctx, grad_logp, _):
        hidden, weight, targets, log_norm = ctx.saved_tensors
        head = Head(weight, *ctx.head)
        # float32 sums over tiles: in bf16 the later ones' contributions would round away
        grad_hidden = torch.zeros_like(hidden, dtype=wide(hidden)) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=wide(weight)) if ctx.needs_input_grad[1] else None
        # d logp / d logits = onehot − softmax; ÷ temperature is a factor that the small matrices take on, not the tiles
        scale = (grad_logp / head.temperature)[:, None]
        scaled = (hidden * scale).to(weight.dtype)
        for chunk in head.chunks(len(hidden)):
            h, norm, target = hidden[chunk], log_norm[chunk, None], targets[chunk]
            for rows, banned in head.vocabulary():
                logits = ctx.kept.popleft() if ctx.kept else head.logits(h, rows, banned)
                grad = exponential_(logits.sub_(norm))
                hit = ((target >= rows.start) & (target < rows.start + grad.shape[1])).nonzero()[:, 0]
                grad[hit, target[hit] - rows.start] -= 1.0
                grad = grad.to(weight.dtype)
                if grad_hidden is not None:
                    accumulate(grad_hidden[chunk], grad, weight[rows])
                if grad_weight is not None:
                    accumulate(grad_weight[rows], grad.T, scaled[chunk], sign=-1)
        return (None if grad_hidden is None else grad_hidden.mul_(-scale).to(weight.dtype),
                None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None, None, None, None)


def accumulate(total: Tensor, a: Tensor, b: Tensor, sign: int = 1) -> None:
    """total += sign · a @ b, total in float32."""
    if a.dtype == total.dtype:
        total.addmm_(a, b, alpha=sign)
    else:
        total += sign * (a @ b)


def completion_logp(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, banned: tuple[int, ...],
        tile: tuple[int, int] | None = None, vocabulary: int | None = None) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy (nats, float32, without gradient) of each target token.

    hidden (T, hidden size), weight (V, hidden size), targets (T,), banned token ids → (T,), (T,). Ids from `vocabulary`
    on are impossible as well: the head's rows beyond the tokenizer's, never multiplied with.
    Peak memory is one tile (tokens, vocabulary rows), whatever T and V are, and at most KEPT bytes to the backward."""
    tile = tile or (GPU_TILE if hidden.is_cuda else TILE)
    learns = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    room = KEPT // 4 if learns else 0
    return CompletionLogp.apply(hidden, weight, targets, temperature, banned, vocabulary or len(weight), tile, room)
