"""One optimizer step over packs of groups, the same for SFT and GRPO: they differ only in the loss of a pack."""

import math
from typing import Callable

import torch
from torch import Tensor, nn

from grpo.engine.policy import Policy, Scores
from grpo.group import Group, Prompt
from grpo.runtime.dist import all_reduce_max, all_reduce_sum, any_rank, world_size
from grpo.runtime.fsdp import clip_gradients
from grpo.runtime.liveness import heartbeat
from grpo.runtime.memory import enough_memory, keep_state_on_host


def make_optimizer(policy: Policy, settings) -> torch.optim.AdamW:
    """AdamW over what trains; decay on matrices, not on biases and norms."""
    trained = [p for p in policy.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(settings.adam_beta1, settings.adam_beta2), fused=True)
    if settings.offload_optimizer:
        keep_state_on_host(optimizer)
    return optimizer


def learning_rate(step: int, steps: int, peak: float, warmup: float, schedule: str) -> float:
    """Linear from peak/w to peak over the first w = warmup · steps updates, then constant or cosine to 0; step from 0."""
    rising = max(1, round(warmup * steps)) if warmup else 0
    if step < rising:
        return peak * (step + 1) / rising
    if schedule == "constant":
        return peak
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def idle_pack(policy: Policy) -> list[Group]:
    """The smallest possible pack: what a process computes when others still have work and it has none."""
    tokens = torch.zeros(1, dtype=torch.long)
    return [Group(Prompt(tokens, torch.zeros(3, 1, dtype=torch.long)), [tokens])]


def pass_over(pack: list[Group]) -> tuple[str, str]:
    """What is being done and what to lower, should the memory not do."""
    tokens = sum(group.packed_tokens for group in pack)
    smaller = "lower --tokens_per_pass" if len(pack) > 1 else "one group is all there is in it: lower --group_size or --max_completion_tokens"
    return f"in a packed pass of {tokens} tokens", f"{smaller}, or set --gradient_checkpointing True"


def update(
    policy: Policy, optimizer: torch.optim.Optimizer, packs: list[list[Group]],
    loss_of_pack: Callable[[int, Scores], Tensor], temperature: float, max_grad_norm: float, rate: float,
) -> float:
    """Backward through every pack, then one step. Returns the gradient norm before clipping; NaN where the step was
    skipped on every process, because the loss of one of them or the gradient is not finite.

    `loss_of_pack(index, scores)` must already be divided by *global* counts, so that packs and processes simply
    add up. Every process does the same number of forwards, whatever it holds: each is a collective.
    """
    passes = int(all_reduce_max(torch.tensor(len(packs), device=policy.device)))
    losses = []
    for index in range(passes):
        heartbeat()
        pack = packs[index] if index < len(packs) else idle_pack(policy)
        with enough_memory(*pass_over(pack)):
            scores = policy.score(pack, temperature)
            loss = loss_of_pack(index, scores) if index < len(packs) else 0.0 * scores.logp.sum()
            (loss * world_size()).backward()  # sharding averages over processes; the losses are parts of one sum
        losses.append(loss.detach())
    norm = clip_gradients(policy, max_grad_norm)
    finite = math.isfinite(norm) and bool(torch.stack(losses).isfinite().all())
    if any_rank(not finite, policy.device):
        optimizer.zero_grad()
        return math.nan
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad()
    return norm


def set_gradient_checkpointing(policy: Policy, on: bool) -> None:
    """Layer by layer, in the language model and the vision encoder; generation keeps no activations anyway."""
    model: nn.Module = policy.model
    if on:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()  # the flag counts in training mode only; no dropout depends on it here
