"""What both trainers do between a loss and new weights: AdamW, its learning rate, one step over packs."""

import math
from contextlib import contextmanager
from itertools import groupby
from typing import Callable, Iterator

import torch
from torch import Tensor, nn

from grpo.engine.policy import Policy, Scores
from grpo.engine.split_group import SharedPrompts
from grpo.group import Group, Pack, Prompt
from grpo.runtime.dist import all_gather, all_reduce_max, any_rank, world_size
from grpo.runtime.fsdp import clip_gradients
from grpo.runtime.liveness import heartbeat
from grpo.runtime.memory import enough_memory, keep_state_on_host


def make_optimizer(policy: Policy, settings) -> torch.optim.AdamW:
    """AdamW over what trains; decay on matrices, not on biases and norms."""
    trained = [p for p in policy.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0}]
    betas = settings.adam_beta1, settings.adam_beta2
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=betas, fused=True)
    if settings.offload_optimizer:
        keep_state_on_host(optimizer)
    return optimizer


def learning_rate(step: int, steps: int, peak: float, warmup: float, schedule: str) -> float:
    """From peak/w to peak over the first w = warmup · steps updates, then constant or cosine to 0; step is from 0."""
    rising = max(1, round(warmup * steps)) if warmup else 0
    if step < rising:
        return peak * (step + 1) / rising
    if schedule == "constant":
        return peak
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def idle_pack(device=None, prompt: Prompt | None = None) -> Pack:
    """The smallest possible pass, for a rank that has no work while others have: every pass is a collective. Its mask
    is empty, so that its loss and its gradient are exactly 0. prompt: of the chain that it belongs to."""
    one = torch.zeros(1, dtype=torch.long)
    group = Group(prompt or Prompt(one, torch.zeros(3, 1, dtype=torch.long)), [one])
    return Pack([group], torch.zeros(1, 1, dtype=torch.bool, device=device), torch.zeros(1, device=device))


def equal_passes(packs: list[Pack], device) -> list[Pack]:
    """The same passes on every rank, idle packs where it has fewer: each is a collective. Where one rank has a
    chain, all have one, as long as the longest."""
    chains = [list(some) for _, some in groupby(packs, lambda pack: pack.chain or pack)]
    chains += [[] for _ in range(int(all_reduce_max(torch.tensor(len(chains), device=device))) - len(chains))]
    shapes = [[len(some), int(any(pack.chain is not None for pack in some))] for some in chains]
    for some, (most, chained) in zip(chains, all_reduce_max(torch.tensor(shapes, device=device)).tolist() if shapes
            else ()):
        idle = idle_pack(device)
        prompt, chain = (some[0] if some else idle).groups[0].prompt, object() if chained else None
        some += [idle_pack(device, prompt) for _ in range(most - len(some))]
        for pack in some:
            pack.chain = chain
    return [pack for some in chains for pack in some]


def passes(policy: Policy, packs: list[Pack], temperature: float) -> Iterator[tuple[Pack, Callable[[], Scores]]]:
    """Each pack with the function that scores it; a pack's backward comes before the next is asked for. The prompts
    of a chain are computed with its first pack, and their backward follows the last one's."""
    for chain, some in groupby(packs, lambda pack: pack.chain or pack):
        some = list(some)
        if some[0].chain is None:
            yield some[0], lambda: policy.score(some[0].groups, temperature)
            continue
        shared = SharedPrompts(policy, [group.prompt for group in some[0].groups])
        for pack in some:
            yield pack, lambda: shared.score(pack.groups, temperature)
        with packed_pass(some[0]):
            shared.backward()


def skip_idle(packs: list[Pack], device) -> tuple[list[Pack], dict]:
    """The packs whose passes can change the weights, at least one on every rank, and how many groups are in none.

    Without a KL, a completion of advantage 0 adds exactly 0 to the loss and to every gradient. It stays in the
    denominator; statistics of the update (ratio, entropy, clip) cover the others alone."""
    teaching = [pack for pack in packs if pack.advantages.any()]
    taught = {group.source for pack in teaching for group in pack.groups}
    skipped = len({group.source for pack in packs if pack.mask.any() for group in pack.groups} - taught)
    return equal_passes(teaching, device) or [idle_pack(device)], {"groups_skipped": sum(all_gather([skipped]))}


def not_finite(pack: Pack) -> list[str]:
    """If the loss is not finite, the ids of the samples that a log-probability of is not; all where each one is."""
    if pack.loss is None or pack.loss.isfinite():
        return []
    given = [logp.masked_fill(~pack.mask, 0.0) for logp in (pack.old_logp, pack.ref_logp) if logp is not None]
    good = torch.stack([logp.isfinite().all(1) for logp in given]).all(0).tolist() if given else []
    ids = [group.prompt.id for group in pack.groups for _ in group.completions]
    return list(dict.fromkeys(id for id, one in zip(ids, good) if not one) or dict.fromkeys(ids))


@contextmanager
def packed_pass(pack: Pack):
    """A heartbeat; and memory that does not suffice for the pass ends in one line that says what to lower."""
    heartbeat()
    smaller = ("lower --tokens_per_pass" if len(pack.lengths) > 1 else
               "one completion is all there is in it: lower --max_completion_tokens")
    with enough_memory(f"in a packed pass of {pack.packed_tokens} tokens", f"{smaller}, or set "
        "--gradient_checkpointing True"):
        yield


def backward(loss: Tensor) -> None:
    """`loss` must be divided by *global* counts: then packs and ranks simply add up, and so do their gradients."""
    (loss * world_size()).backward()  # sharding averages over ranks; their losses are parts of one sum


def optimizer_step(policy: Policy, optimizer: torch.optim.Optimizer, loss: Tensor, max_grad_norm: float,
        rate: float) -> float:
    """One step on the gradients that the passes have added up. Returns their norm before clipping; NaN where the step
    was skipped on every rank, because the norm or the loss of one of them is not finite. loss: this rank's sum."""
    norm = clip_gradients(policy, max_grad_norm)
    if any_rank(not (math.isfinite(norm) and bool(loss.isfinite().all())), policy.device):
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
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
        model.train()  # the flag counts in training mode only; no dropout depends on it here
