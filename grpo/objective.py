"""The objective: log-probabilities and advantages to one loss, GRPO's or a variant's, a formula a function.

Shapes: N completions, padded to L tokens.  `logp`, `old_logp`, `ref_logp` (N, L) are log-probabilities of the
tokens that were drawn, in nats, under π_θ (trained), π_old (drew them) and π_ref (anchor); `advantages` (N,);
`mask` (N, L) is True, or 1, at the completion's tokens, its end token included.  Masks come from positions:
where the mask is 0 a tensor may hold anything, NaN included, and its gradient there is exactly 0.

A loss is to be minimised: the papers' objectives with the sign turned."""

import math

import torch
from torch import Tensor

from grpo.variants import AGGREGATES, KL_KINDS, LEVELS, SURROGATES, TRUNCATED, check_choice


def grpo_loss(
    logp: Tensor, old_logp: Tensor | None, ref_logp: Tensor | None, advantages: Tensor, mask: Tensor, *,
    clip_low: float | None = 0.2, clip_high: float | None = 0.2, beta: float = 0.0, kl: str = "k3",
    level: str = "token", aggregate: str = "sequence", denominator: float | Tensor | None = None,
    surrogate: str = "ppo", kl_weighted: bool = False, length: int | None = None, entropy: Tensor | None = None,
    log_ratio_bound: float | None = 20.0, **shape: float) -> tuple[Tensor, dict[str, Tensor]]:
    """L = −mean of [ surrogate(r, A) − β D_KL(π_θ ‖ π_ref) ].  The defaults are GRPO, arXiv 2402.03300 eq. 3.

    old_logp      None: the policy that drew is the policy that is trained, old_logp = logp.detach().
    ref_logp      may be None where beta is 0; given all the same, its KL is in the statistics.
    clip_low/high the ratio is clipped to [1 − clip_low, 1 + clip_high]; None: that side is not clipped.
    beta, kl      weight and estimator of the KL, "k1", "k2" or "k3" (`kl_estimate`).
    kl_weighted   multiply the KL by the ratio, as TRL does by default: right off-policy, another gradient.
    level         "token": one ratio a token; "sequence": one a completion (`probability_ratio`).
    surrogate     "ppo", "cispo", "sapo" or "vespo": the function of that name, `ppo_surrogate` and so on; the last
                  two do not clip, and `shape` are their own numbers.
    aggregate     "sequence", "token" or "constant" (`aggregate_loss`); "constant" needs `length` in tokens.
    denominator   where this call sees a part, the whole's count: the sum of all parts' `count_terms`.  Then
                  losses, gradients and statistics of the parts add up to the whole's, whatever the cut.
    entropy       (N, L) in nats, for the statistics only.
    log_ratio_bound  beyond so many nats KL and ratio go on as straight lines; None: they do not (`bounded`).

    Returns the loss, 0-dim, and the statistics as 0-dim sums without gradient, with the counts to divide by:
    add them up over micro-batches and ranks, then `mean_statistics`.

    Raises ValueError: shapes that do not fit, a mask that is not 0/1 or is empty (a *part* may be, its loss
    is 0: hence not with `denominator`), beta without ref_logp, an unknown option."""
    check_choice("surrogate", surrogate, SURROGATES)
    check_choice("kl", kl, KL_KINDS)
    mask = check_inputs(logp, advantages, mask, old_logp=old_logp, ref_logp=ref_logp, entropy=entropy)
    if denominator is None and not mask.any():
        raise ValueError("mask is empty; it takes at least one token (or a denominator, if this is a part)")
    if beta and ref_logp is None:
        raise ValueError(f"ref_logp is None; beta = {beta} takes the reference's log-probabilities")
    # The padding is overwritten before anything is computed: 0 · NaN is NaN, in values and in gradients.
    logp = logp.masked_fill(~mask, 0.0)
    old_logp, ref_logp, entropy = (None if x is None else x.detach().masked_fill(~mask, 0.0)
                                   for x in (logp if old_logp is None else old_logp, ref_logp, entropy))
    A = advantages.unsqueeze(1)  # (N, 1): an outcome reward gives every token the same advantage
    r = probability_ratio(logp, old_logp, mask, level, log_ratio_bound)  # (N, L)
    clip_low, clip_high = (clip_low, clip_high) if surrogate in ("ppo", "cispo") else (None, None)
    if surrogate == "ppo":
        gain = ppo_surrogate(r, A, clip_low, clip_high, **shape)
    elif surrogate == "cispo":
        gain = cispo_surrogate(r, A, logp, clip_low, clip_high, **shape)
    elif surrogate == "sapo":
        gain = sapo_surrogate(r, A, **shape)
    else:
        gain = vespo_surrogate(logp, old_logp, A, **shape)
    divergence = None if ref_logp is None else kl_estimate(logp, ref_logp, kl, log_ratio_bound)
    penalty = beta * (r * divergence if kl_weighted else divergence) if beta else 0.0
    loss = aggregate_loss(penalty - gain, mask, aggregate, denominator, length)
    sums = sum_statistics(r, A, mask, clip_low, clip_high, surrogate, divergence, entropy)
    if ref_logp is not None:
        sums["kl/bounded_tokens"] = ((logp.detach() - ref_logp).abs() > (log_ratio_bound or math.inf)).sum().to(r.dtype)
    return loss, sums


def bounded(x: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """(x within the bounds, how far it is beyond them): f(within) + beyond is f, and past a bound a line of slope ±1.

    exp(50) is 5e21: as an importance weight, of the KL or of the surrogate, one such token has the whole gradient once
    it is clipped, and from 89 on float32 overflows and the update is lost.  Slope 1 is the pull of one token of an
    on-policy batch, whose ratio is 1: it stays, and no more of it.  [chosen]"""
    return x.clamp(low, high), (x - high).relu() + (low - x).relu()


def probability_ratio(logp: Tensor, old_logp: Tensor, mask: Tensor, level: str,
                      log_ratio_bound: float | None = 20.0) -> Tensor:
    """r = π_θ / π_old of each token, or of its whole completion.  (N, L) x 3 -> (N, L)

    "token"     r_it = π_θ(o_it) / π_old(o_it).  arXiv 2402.03300 eq. 3
    "sequence"  s_i = (π_θ(o_i) / π_old(o_i))^(1/|o_i|), their geometric mean.  GSPO, arXiv 2507.18071 eq. 7

    Above exp(log_ratio_bound) it goes on as a straight line in the log-ratio (`bounded`)."""
    check_choice("level", level, LEVELS)
    log_ratio = logp - old_logp
    if level == "sequence":
        log_ratio = sequence_mean(log_ratio, mask).unsqueeze(1).expand_as(logp)
    within, beyond = bounded(log_ratio, -math.inf, log_ratio_bound or math.inf)
    return within.exp() + beyond


def clip_ratio(r: Tensor, clip_low: float | None, clip_high: float | None) -> Tensor:
    """clip(r, 1 − ε_low, 1 + ε_high); None leaves a side open.  Two ε: DAPO, arXiv 2503.14476 eq. 10"""
    low = float("-inf") if clip_low is None else 1 - clip_low
    high = float("inf") if clip_high is None else 1 + clip_high
    return r.clamp(low, high)


def ppo_surrogate(r: Tensor, A: Tensor, clip_low: float | None, clip_high: float | None) -> Tensor:
    """min(r A, clip(r, 1 − ε_low, 1 + ε_high) A).  PPO, arXiv 1707.06347 eq. 7; MORE-R1 eq. 3

    The min makes it pessimistic: a clip may take a gain away, never a loss (r = 1.5, A = −1 stays −1.5).
    Without clipping it is r A: JMERE-R1 eq. 7."""
    return torch.minimum(r * A, clip_ratio(r, clip_low, clip_high) * A)


def cispo_surrogate(r: Tensor, A: Tensor, logp: Tensor, clip_low: float | None, clip_high: float | None) -> Tensor:
    """sg(clip(r)) A log π_θ: the clip bounds a token's weight and no token loses its gradient.

    CISPO, arXiv 2506.13585 eq. 4 and 5, sg = stop-gradient."""
    return clip_ratio(r, clip_low, clip_high).detach() * A * logp


def sapo_surrogate(r: Tensor, A: Tensor, tau_positive: float = 1.0, tau_negative: float = 1.05) -> Tensor:
    """4/τ σ(τ (r − 1)) A, with a τ for A > 0 and one for the rest: a gate without an edge, of slope A at r = 1.

    SAPO, arXiv 2511.20347 eq. 5 and 6: the larger τ, the sooner the gradient fades away from r = 1."""
    tau = torch.where(A > 0, A.new_tensor(tau_positive), A.new_tensor(tau_negative))
    return 4 / tau * torch.sigmoid(tau * (r - 1)) * A


def vespo_surrogate(logp: Tensor, old_logp: Tensor, A: Tensor, k_positive: float = 2.0, lambda_positive: float = 3.0,
                    k_negative: float = 3.0, lambda_negative: float = 2.0) -> Tensor:
    """sg(φ(w)) A log π_θ, φ(w) = w^k exp(λ (1 − w)): a weight that fades on both sides of w = 1.  VESPO, arXiv
    2602.10693 eq. 20

    w = π_θ(o) / π_old(o) of the whole completion, neither clipped nor divided by its length; both log-probabilities
    are 0 in the padding. k and λ are one pair for A ≥ 0, one for A < 0."""
    k = torch.where(A >= 0, A.new_tensor(k_positive), A.new_tensor(k_negative))
    lam = torch.where(A >= 0, A.new_tensor(lambda_positive), A.new_tensor(lambda_negative))
    log_w = (logp - old_logp).detach().sum(dim=1, keepdim=True).clamp(max=20.0)  # exp(−λ exp(20)) is 0
    return (k * log_w + lam * (1 - log_w.exp())).exp() * A * logp


def kl_estimate(logp: Tensor, ref_logp: Tensor, kind: str, log_ratio_bound: float | None = 20.0) -> Tensor:
    """One-sample estimates of D_KL(π ‖ π_ref) for tokens drawn from π.  Any shape, nats.

    With d = log π_ref − log π:
      "k1"  −d               unbiased, negative half of the time; in a loss its gradient is zero on average
      "k2"  d² / 2           biased; in a loss its gradient is the KL's, on average and on-policy
      "k3"  exp(d) − d − 1   unbiased, never negative; in a loss its gradient is D_KL(π_ref ‖ π)'s, the other
                             direction's.  arXiv 2402.03300 eq. 4; MORE-R1 eq. 4
    J. Schulman, "Approximating KL Divergence", 2020: http://joschu.net/blog/kl-approx.html

    Where |d| > log_ratio_bound, k2 and k3 go on as straight lines of slope ±1, k1's (`bounded`); None: they do not."""
    check_choice("kl", kind, KL_KINDS)
    d = ref_logp - logp
    if kind == "k1":
        return -d
    bound = log_ratio_bound or math.inf
    d, beyond = bounded(d, -bound, bound)
    if kind == "k2":
        return d.square() / 2 + beyond
    return d.expm1() - d + beyond  # expm1: exp(d) − 1 loses all digits where the policies agree


def aggregate_loss(x: Tensor, mask: Tensor, how: str, denominator: float | Tensor | None = None,
                   length: int | None = None) -> Tensor:
    """A loss per token to one number.  (N, L) -> ()

    "sequence"  1/N Σ_i 1/|o_i| Σ_t x_it.  GRPO, arXiv 2402.03300 eq. 3; JMERE-R1 eq. 7
    "token"     1/(Σ_i |o_i|) Σ_i Σ_t x_it: all tokens weigh the same.  DAPO, arXiv 2503.14476 eq. 12
    "constant"  1/(N · length) Σ_i Σ_t x_it.  Dr. GRPO, arXiv 2503.20783 §3.2: `length` usually is the most
                tokens a completion may have; length = 1 is the plain sum, REINFORCE's

    N counts all rows: a completion that is masked altogether adds 0 and does not raise the others' weight."""
    check_choice("aggregate", how, AGGREGATES)
    total = (sequence_mean(x, mask) if how == "sequence" else x.masked_fill(~mask, 0.0)).sum()
    if how == "constant":
        if length is None or length <= 0:
            raise ValueError(f'length is {length}; aggregate="constant" takes a positive number of tokens')
        total = total / length
    denominator = count_terms(mask, how) if denominator is None else denominator
    if not denominator > 0:
        raise ValueError(f"denominator is {denominator}; it takes a positive count of sequences or tokens")
    return total / denominator


def count_terms(mask: Tensor, how: str) -> int:
    """What `aggregate_loss` divides by, tokens or completions; `denominator` is its sum over all parts."""
    check_choice("aggregate", how, AGGREGATES)
    return int(mask.sum()) if how == "token" else mask.shape[0]


def sequence_mean(x: Tensor, mask: Tensor) -> Tensor:
    """1/|o_i| Σ_t x_it over a completion's tokens, 0 where it has none.  (N, L) -> (N,)"""
    return x.masked_fill(~mask, 0.0).sum(dim=1) / mask.sum(dim=1).clamp(min=1)


def truncation_mask(mask: Tensor, truncated: Tensor, how: str = "kept") -> Tensor:
    """The mask with completions cut by the length limit "kept" or "masked".  (N, L), (N,) -> (N, L)

    Masked, they still are in the group's mean and std: DAPO's overlong filtering, arXiv 2503.14476 §3.4."""
    check_choice("truncated", how, TRUNCATED)
    return mask if how == "kept" else mask * ~truncated.bool().unsqueeze(1)


@torch.no_grad()
def sum_statistics(r, A, mask, clip_low, clip_high, surrogate, divergence, entropy) -> dict[str, Tensor]:
    """Sums over the tokens, their count and that of completions with any: 0-dim, may be added up over parts.

    A token counts as clipped where the clip changes its term: for "ppo" below with A < 0 or above with
    A > 0, for "cispo" wherever the weight is cut.  The KL is the bare estimate, without beta or ratio."""
    clipped = clip_ratio(r, clip_low, clip_high)
    below, above = r < clipped, r > clipped
    if surrogate == "ppo":
        below, above = below & (A < 0), above & (A > 0)
    per_token = {"ratio": r, "clipped_low": below, "clipped_high": above}
    if divergence is not None:
        per_token["kl"] = divergence
    if entropy is not None:
        per_token["entropy"] = entropy
    sums = {name: x.to(r.dtype).masked_fill(~mask, 0.0).sum() for name, x in per_token.items()}
    counts = {"tokens": mask.sum(), "sequences": mask.any(dim=1).sum()}
    return {name: count.to(r.dtype) for name, count in counts.items()} | sums


def mean_statistics(sums: dict[str, Tensor]) -> dict[str, float]:
    """Added-up statistics of a loss to means per token, under TRL's names.

    ratio_mean, clip_ratio/low_mean, clip_ratio/high_mean, clip_ratio/region_mean (either side), kl in nats if
    there was a reference, entropy in nats if it was given.  A fork's own sums keep their names.  Sums called
    …_tokens are counts and stay: kl/bounded_tokens, those beyond log_ratio_bound.  No tokens at all: NaN, there is
    no mean.  Raises ValueError without "tokens", the count to divide by."""
    if "tokens" not in sums:
        raise ValueError(f"statistics are {', '.join(sums) or 'empty'}; they take 'tokens', the count to divide by")
    totals = {name: float(total) for name, total in sums.items()}
    tokens = totals.pop("tokens") or float("nan")
    totals.pop("sequences", None)
    if "clipped_low" in totals and "clipped_high" in totals:
        totals["clipped"] = totals["clipped_low"] + totals["clipped_high"]
    names = {"ratio": "ratio_mean", "clipped_low": "clip_ratio/low_mean", "clipped_high": "clip_ratio/high_mean",
             "clipped": "clip_ratio/region_mean"}
    return {names.get(name, name): total if name.endswith("_tokens") else total / tokens
            for name, total in totals.items()}


def check_inputs(logp: Tensor, advantages: Tensor, mask: Tensor, **others: Tensor | None) -> Tensor:
    """The mask as bool, or a ValueError: which argument does not fit, what it got, what it takes."""
    if logp.dim() != 2:
        raise ValueError(f"logp has shape {tuple(logp.shape)}; it takes (completions, tokens)")
    shapes = {"advantages": (advantages, logp.shape[:1]), "mask": (mask, logp.shape)}
    shapes |= {name: (x, logp.shape) for name, x in others.items() if x is not None}
    for name, (x, shape) in shapes.items():
        if x.shape != shape:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; it takes {tuple(shape)}, to fit logp")
    if mask.dtype != torch.bool and not ((mask == 0) | (mask == 1)).all():
        raise ValueError("mask holds other values than 0 and 1; it takes bool or 0/1")
    return mask.bool()
