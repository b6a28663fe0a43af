"""Surrogates that do not clip: a gate without an edge takes the clip's place. Shapes as in grpo/objective.py."""

import torch
from torch import Tensor


def sapo_surrogate(r: Tensor, A: Tensor, tau_positive: float = 1.0, tau_negative: float = 1.05) -> Tensor:
    """4/τ σ(τ (r − 1)) A, with a τ for A > 0 and one for the rest: a gate without an edge, of slope A at r = 1.

    SAPO, arXiv 2511.20347: the larger τ, the sooner the gradient fades away from r = 1.
    """
    tau = torch.where(A > 0, A.new_tensor(tau_positive), A.new_tensor(tau_negative))
    return 4 / tau * torch.sigmoid(tau * (r - 1)) * A


def vespo_surrogate(logp: Tensor, old_logp: Tensor, A: Tensor, k_positive: float = 2.0, lambda_positive: float = 3.0,
                    k_negative: float = 3.0, lambda_negative: float = 2.0) -> Tensor:
    """sg(φ(w)) A log π_θ, φ(w) = w^k exp(λ (1 − w)): a weight that fades on both sides of w = 1.  VESPO, arXiv
    2602.10693

    w = π_θ(o) / π_old(o) of the whole completion, neither clipped nor divided by its length; both log-probabilities
    are 0 in the padding. k and λ are one pair for A ≥ 0, one for A < 0.
    """
    k = torch.where(A >= 0, A.new_tensor(k_positive), A.new_tensor(k_negative))
    lam = torch.where(A >= 0, A.new_tensor(lambda_positive), A.new_tensor(lambda_negative))
    log_w = (logp - old_logp).detach().sum(dim=1, keepdim=True).clamp(max=20.0)  # exp(−λ exp(20)) is 0
    return (k * log_w + lam * (1 - log_w.exp())).exp() * A * logp
