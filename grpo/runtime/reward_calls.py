"""The task's reward, called for every completion of a rollout: what hangs, raises or gives no number names its sample.

A rollout is seeded: the same command meets the same failure again, so what happens then is a setting."""

import contextlib
import math
import signal
from typing import Callable

import torch

from data.read import shown
from grpo.group import Group
from grpo.runtime.dist import all_gather
from grpo.runtime.liveness import heartbeat
from grpo.runtime.log import say
from grpo.runtime.settings import parse_options


def reward_weights(known: dict[str, float], given: str) -> dict[str, float]:
    """The weight of each reward part: the task's, or as --reward_weights says."""
    weights = {**known, **parse_options(given, "reward_weights")}
    if unknown := set(weights) - set(known):
        raise ValueError(f"--reward_weights: no reward {sorted(unknown)[0]!r}; the task has {', '.join(known)}")
    return weights


class TookTooLong(BaseException):
    """No Exception: a reward that catches all of those is interrupted too."""


def within_seconds(seconds: float, call: Callable):
    """`call()`, or TookTooLong after so many seconds. No signal is heeded where a call holds the interpreter in C: then
    this rank makes no progress, and the other ranks' watchdog (liveness.py) names it."""
    def alarm(*_):
        raise TookTooLong

    before = signal.signal(signal.SIGALRM, alarm)
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, seconds, seconds)  # again and again, should the call catch it
            return call()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    finally:  # whatever the last alarm has interrupted
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class RewardCalls:
    """Calls a task's `rewards.reward(text, sample, **options)`, which gives K named parts, for a group's completions.

    A call fails that raises, takes more than `seconds`, or gives no finite number for a part. failures: "stop" is a
    ValueError that names sample and completion; "zero" gives it parts of 0; "mask" takes the completion out of its
    group's mean and std and does not train it."""

    def __init__(self, rewards, decode: Callable, names: list[str], options: dict, seconds: float, failures: str):
        self.rewards, self.decode, self.names, self.options = rewards, decode, names, options
        self.seconds, self.failures, self.failed = seconds, failures, []

    def __call__(self, group: Group) -> tuple[torch.Tensor, torch.Tensor]:
        """(G, K) float64 parts, unweighted, and (G,) bool: which of the completions count."""
        rows, counted = [], []
        for i, completion in enumerate(group.completions):
            heartbeat()
            text = self.decode(completion)
            what = f"{group.prompt.sample.id}, completion {i} ({text[:60]!r}): its reward"
            parts, fault = self.parts(text, group.prompt.sample)
            if fault and self.failures == "stop":
                raise ValueError(f"{what} {fault}; --reward_failures zero or mask goes on without it")
            self.failed += [f"{what} {fault}"] if fault else []
            rows.append(parts)
            counted.append(not fault or self.failures == "zero")
        return torch.tensor(rows, dtype=torch.float64), torch.tensor(counted)

    def parts(self, text: str, sample) -> tuple[list[float], str]:
        """(K parts, "") or (zeros, what is wrong)."""
        try:
            given = within_seconds(self.seconds, lambda: self.rewards.reward(text, sample, **self.options))
        except TookTooLong:
            fault = f"took more than {self.seconds:g} seconds (--reward_seconds)"
        except Exception as error:
            fault = f"raised {type(error).__name__}: {error}"
        else:
            with contextlib.suppress(Exception):
                parts = [float(given[name]) for name in self.names]
                if all(map(math.isfinite, parts)):
                    return parts, ""
            fault = f"gave {shown(given)}; expected a finite number for each of {', '.join(self.names)}"
        return [0.0] * len(self.names), fault

    def count_failures(self) -> int:
        """Those since the last call, over all ranks; the first is said."""
        every, self.failed = all_gather(self.failed), []
        if every:
            say(f"{len(every)} rewards failed (--reward_failures {self.failures}); the first: {every[0]}")
        return len(every)
