"""From rewards to advantages: how much better a completion is than the others of its group.

Rewards are a tensor of shape (groups, G): a row is one prompt, a column one of its G completions; so are
the advantages.  Rewards have the task's unit; advantages have the same, or none where they are scaled.

What compares groups with each other (`scale="batch"`, `scale="centred-batch"`) must see the rewards of
every rank; they are a few floats, so gather them first.  Everything else may see any part."""

import torch
from torch import Tensor

from grpo.variants import COMBINATIONS, SCALES, check_choice


EQUAL = 1e-12  # relative: another order of adding the same float64 parts moves a sum by less


def group_advantages(rewards: Tensor, scale: str = "group", ddof: int = 1, eps: float = 1e-4,
                     counted: Tensor | None = None) -> Tensor:
    """A_i = (r_i − mean(r)) / (std(r) + eps), the mean always over the group.  (groups, G) -> (groups, G)

    `scale` says what the centred rewards are divided by:
      "group"          the group's std.  GRPO, arXiv 2402.03300 §4.1.2; MORE-R1 eq. 2; JMERE-R1 eq. 6
      "batch"          the std of all rewards.  Lite PPO, arXiv 2508.08221
      "centred-batch"  the std of all r − mean(r).  REINFORCE++ with baseline, arXiv 2501.03262
      "leave-one-out"  (G − 1) / G, which is r_i − mean of the *others*.  RLOO, arXiv 2402.14740
      "none"           nothing.  Dr. GRPO, arXiv 2503.20783 §3.2

    `ddof` 1 divides the sum of squares by n − 1 (torch, TRL), 0 by n (numpy): at G = 4 the latter's std is
    13 % smaller.  `eps` keeps a group of almost no variance from exploding; it is added to the std, in its unit.

    A group whose rewards are all equal, and so every group of one, gives exact zeros: nothing can be learnt
    from it, and float noise (the std of seven 0.1 is 8e-9) divided by a small eps would pretend otherwise.

    `counted` (groups, G) bool: False takes a completion of unknown reward out of every mean and std; it gets 0.

    Raises ValueError: NaN or infinite rewards (and where), another shape, an unknown option."""
    check_choice("scale", scale, SCALES)
    check_choice("ddof", ddof, (0, 1))
    rewards = check_rewards("rewards", rewards, ("groups", "G"))
    counted = torch.ones_like(rewards, dtype=torch.bool) if counted is None else counted
    centred, n = centre(rewards, counted), counted.sum(dim=1, keepdim=True)
    if scale == "none":
        return centred
    if scale == "leave-one-out":
        return centred * n / (n - 1).clamp(min=1)
    if scale == "group":
        std = standard_deviation(centred, n, ddof)
    else:
        known = rewards[counted]
        std = standard_deviation((known - known.mean()) if scale == "batch" else centred.flatten(), counted.sum(), ddof)
    return (centred / (std + eps)).masked_fill(centred == 0, 0.0)  # 0 / 0 where eps = 0


def zero_variance_groups(rewards: Tensor, counted: Tensor | None = None) -> Tensor:
    """True where all rewards of a group are equal, to a relative 1e-12 in float64.  (groups, G) -> bool (groups,)

    max == min and not std == 0: the std of equal floats is rarely an exact zero.  And not to the last bit: .1 + .2 + .3
    is not .3 + .2 + .1, and at eps = 0 that difference would be advantages of ±1 and more.  These are the groups that
    DAPO's dynamic sampling draws again (arXiv 2503.14476, eq. 11's constraint).  `counted` as in group_advantages."""
    out = torch.zeros_like(rewards, dtype=torch.bool) if counted is None else ~counted
    high = rewards.double().masked_fill(out, float("-inf")).amax(dim=1)
    low = rewards.double().masked_fill(out, float("inf")).amin(dim=1)
    return high - low <= EQUAL * torch.maximum(high.abs(), low.abs())


def centre(rewards: Tensor, counted: Tensor) -> Tensor:
    """r_i − mean(r) within each group, exact zeros where all are equal or not `counted`.  (groups, G) -> (groups, G)"""
    mean = rewards.masked_fill(~counted, 0.0).sum(dim=1, keepdim=True) / counted.sum(dim=1, keepdim=True).clamp(min=1)
    return (rewards - mean).masked_fill(~counted | zero_variance_groups(rewards, counted).unsqueeze(1), 0.0)


def standard_deviation(deviations: Tensor, n: Tensor, ddof: int) -> Tensor:
    """sqrt(Σ d² / (n − ddof)) of deviations d from a mean, along the last dimension, kept as size 1; 0 if n <= ddof."""
    return (deviations.square().sum(dim=-1, keepdim=True) / (n - ddof).clamp(min=1)).sqrt()


def combine_rewards(parts: Tensor, weights: Tensor, how: str = "sum", ddof: int = 1, eps: float = 1e-4,
                    counted: Tensor | None = None) -> Tensor:
    """K reward parts to the one number that `group_advantages` takes.  (groups, G, K), (K,) -> (groups, G)

    "sum"         Σ_k w_k r_k.  The papers' way (MORE-R1 eq. 5, JMERE-R1 eq. 5): z-score the sum afterwards.
    "normalised"  Σ_k w_k z_k, z_k the z-score of part k within its group: every part weighs the same however
                  small its std.  GDPO, arXiv 2601.05242: pass the result on with `scale="none"`, or with
                  `scale="centred-batch"` for that paper's normalisation over the batch.

    Equal parts give bitwise equal sums, so a zero-variance group stays one; a sum that is 0 but for the order of
    adding is 0. `counted` as in group_advantages.  Raises ValueError as `group_advantages`."""
    check_choice("how", how, COMBINATIONS)
    parts = check_rewards("parts", parts, ("groups", "G", "K"))
    weights = torch.as_tensor(weights, dtype=parts.dtype, device=parts.device)
    if weights.shape != parts.shape[2:]:
        raise ValueError(f"weights has shape {tuple(weights.shape)}; it takes ({parts.shape[2]},): K")
    if how == "normalised":
        parts = torch.stack([group_advantages(part, "group", ddof, eps, counted) for part in parts.unbind(2)], dim=2)
    terms = weights * parts
    total = sum(terms.unbind(2))  # one order of adding for all
    return total.masked_fill(total.abs() <= EQUAL * terms.abs().sum(dim=2), 0.0)


def overlong_penalty(lengths: Tensor, limit: int, cache: int) -> Tensor:
    """DAPO's soft overlong punishment, to be added to the reward; any shape, lengths in tokens.

    0 up to limit − cache tokens, falling linearly to −1 at `limit` (L_max), −1 beyond.
    arXiv 2503.14476 eq. 13, L_cache = `cache`."""
    if not 0 < cache <= limit:
        raise ValueError(f"cache is {cache}; it takes a number of tokens from 1 to the limit, {limit}")
    return (((limit - cache) - lengths) / cache).clamp(-1.0, 0.0)


def kl_penalised_rewards(rewards: Tensor, logp: Tensor, ref_logp: Tensor, mask: Tensor, beta: float) -> Tensor:
    """R_i = r_i − β log(π(o_i) / π_ref(o_i)): the KL in the reward.  (groups, G) -> (groups, G)

    RLOO's reward (arXiv 2402.14740).  `logp`, `ref_logp` and `mask` are (groups · G, L), those of the policy
    that drew the completions; they enter as numbers, without gradient.  Not the same as k1 in the loss,
    whose gradient is zero on average (docs/mathematics.md)."""
    for name, x in {"logp": logp, "ref_logp": ref_logp, "mask": mask}.items():
        if x.shape != (rewards.numel(), *logp.shape[1:2]):
            raise ValueError(f"{name} has shape {tuple(x.shape)}; it takes ({rewards.numel()}, tokens)")
    log_ratio = (logp - ref_logp).detach().masked_fill(~mask.bool(), 0.0)
    return rewards - beta * log_ratio.sum(dim=1).reshape(rewards.shape).to(rewards.dtype)


def check_rewards(name: str, rewards: Tensor, axes: tuple[str, ...]) -> Tensor:
    """`rewards` as floats, or a ValueError: another number of axes, none at all, NaN or infinite (where)."""
    if rewards.dim() != len(axes) or rewards.numel() == 0:
        raise ValueError(f"{name} has shape {tuple(rewards.shape)}; it takes ({', '.join(axes)}), none 0")
    bad = torch.nonzero(~torch.isfinite(rewards))
    if len(bad):
        place = bad[0].tolist()
        raise ValueError(f"{name}{place} is {rewards[tuple(place)].item()} (group {place[0]}, completion {place[1]}; "
            f"{len(bad)} such in all); it takes finite numbers")
    return rewards if rewards.is_floating_point() else rewards.float()
