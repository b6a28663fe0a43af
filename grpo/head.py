"""Log-probabilities of chosen tokens without ever holding all logits.

With a 152k-row head the logits are the memory peak: 8 × 1,024 completion tokens in float32 are 5 GB. So they
are made chunk by chunk, reduced to one number a token, thrown away, and made once more in the backward pass
(a trained head needs each token's upstream gradient, which the objective knows only after the whole forward).
"""

import torch
from torch import Tensor


def token_logits(hidden: Tensor, weight: Tensor, temperature: float, banned: Tensor) -> Tensor:
    """(T, hidden) × (V, hidden) → (T, V) float32 logits of the distribution that is sampled *and* scored.

    Temperature divides; image and video tokens, which a completion cannot hold, are impossible.
    Sampler and scorer both call this function: their distributions cannot drift apart.
    """
    logits = (hidden @ weight.T).float()
    if temperature != 1.0:
        logits /= temperature
    return logits.index_fill_(-1, banned, float("-inf"))


class CompletionLogp(torch.autograd.Function):
    """log softmax(token_logits)[target] and the entropy, `chunk` tokens at a time."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, banned, chunk):
        logp, entropy, log_norm = [], [], []
        for h, target in zip(hidden.split(chunk), targets.split(chunk)):
            logits = token_logits(h, weight, temperature, banned)
            norm = logits.logsumexp(-1)
            logp.append(logits.gather(-1, target[:, None])[:, 0] - norm)
            probabilities = (logits - norm[:, None]).exp_()
            # 0 · (−inf) of a banned token is NaN: its share of the entropy is 0, so its logit is set to 0.
            entropy.append(norm - (probabilities * logits.index_fill_(-1, banned, 0.0)).sum(-1))
            log_norm.append(norm)
        ctx.save_for_backward(hidden, weight, targets, banned, torch.cat(log_norm))
        ctx.temperature, ctx.chunk = temperature, chunk
        entropy = torch.cat(entropy)
        ctx.mark_non_differentiable(entropy)
        return torch.cat(logp), entropy

    @staticmethod
    def backward(ctx, grad_logp, _):
        hidden, weight, targets, banned, log_norm = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        # float32 sum over chunks: in bf16 the later chunks' contributions would round away
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for start in range(0, len(hidden), ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            logits = token_logits(hidden[rows], weight, ctx.temperature, banned)
            # d logp / d logits = onehot − softmax, then the chain rule through ÷ temperature
            grad = (logits - log_norm[rows, None]).exp_().neg_()
            grad.scatter_add_(-1, targets[rows, None], torch.ones_like(grad[:, :1]))
            grad *= grad_logp[rows, None] / ctx.temperature
            grad = grad.to(weight.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = grad @ weight
            if grad_weight is not None:
                grad_weight += grad.T @ hidden[rows]
        return grad_hidden, grad_weight if grad_weight is None else grad_weight.to(weight.dtype), None, None, None, None


def completion_logp(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, banned: Tensor, chunk: int = 512
) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy (nats, float32, without gradient) of each target token.

    hidden (T, hidden size), weight (V, hidden size), targets (T,), banned (k,) token ids → (T,), (T,).
    Peak memory is chunk × V, whatever T is.
    """
    return CompletionLogp.apply(hidden, weight, targets, temperature, banned, chunk)
