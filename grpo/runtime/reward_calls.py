"""The task's reward, called for every completion of a rollout: whatever it does wrong names its sample."""

from typing import Callable

import torch
from torch import Tensor

from grpo.group import Group
from grpo.runtime.liveness import heartbeat
from grpo.runtime.settings import parse_options


def reward_weights(known: dict[str, float], given: str) -> dict[str, float]:
    """The weight of each reward part: the task's, or as --reward_weights says."""
    weights = {**known, **parse_options(given, "reward_weights")}
    if unknown := set(weights) - set(known):
        raise ValueError(f"--reward_weights: no reward {sorted(unknown)[0]!r}; the task has {', '.join(known)}")
    return weights


def reward_parts(group: Group, reward: Callable, decode: Callable, names: list[str], options: dict) -> Tensor:
    """(G, K) float64: what `reward(text, sample, **options)` gives for each of K named parts, unweighted.

    Raises ValueError, naming the sample: an error in the reward, a part that is missing or not a finite number.
    """
    sample, rows = group.prompt.sample, []
    for completion in group.completions:
        heartbeat()
        try:
            given = reward(decode(completion), sample, **options)
            rows.append([float(given[name]) for name in names])
        except Exception as error:
            raise ValueError(f"{sample.id}: its reward raised {type(error).__name__}: {error}") from error
        if not torch.tensor(rows[-1]).isfinite().all():
            raise ValueError(f"{sample.id}: reward {given}; every part must be a finite number")
    return torch.tensor(rows, dtype=torch.float64)
