"""Whatever a reward does wrong is one line that names its sample and completion, and what happens then is a setting."""

import re
import signal
import time
from types import SimpleNamespace

import pytest

from grpo.group import Group, Prompt
from grpo.runtime.reward_calls import RewardCalls, within_seconds

GOOD = {"format": 1.0, "answer": 0.5}


def forever(*_):
    while True:
        time.sleep(0.01)


def stubborn(*_):
    while True:
        try:
            forever()
        except Exception:
            pass


def backtracking(*_):
    re.match(r"(a+)+b", "a" * 40)


def raising(*_):
    raise ZeroDivisionError("by zero")


FAULTS = {
    "it raises": (raising, "raised ZeroDivisionError: by zero"),
    "it returns nothing": (lambda *_: None, "gave None; expected a finite number for each of format, answer"),
    "it is not a number": (lambda *_: GOOD | {"answer": float("nan")}, "gave .*nan.*; expected a finite number"),
    "a part is missing": (lambda *_: {"format": 1.0}, "gave .*; expected a finite number for each of format, answer"),
    "a part is a word": (lambda *_: GOOD | {"answer": "right"}, "gave .*right.*; expected a finite number"),
    "a part is too large": (lambda *_: GOOD | {"answer": 10**400}, "gave .*1000.*; expected a finite number"),
    "a part cannot be written": (lambda *_: GOOD | {"answer": 10**5000}, "gave a dict; expected a finite number"),
    "it hangs": (forever, r"took more than 0.2 seconds \(--reward_seconds\)"),
    "it hangs and catches every error": (stubborn, "took more than 0.2 seconds"),
    "a pattern backtracks": (backtracking, "took more than 0.2 seconds"),
}


def calls(fault, failures):
    """Completions 0 and 2 are fine, 1 meets the fault."""
    reward = lambda text, sample: fault(text, sample) if text == "text 1" else GOOD
    return RewardCalls(SimpleNamespace(reward=reward), lambda completion: f"text {completion}", list(GOOD), {}, 0.2,
                       failures)


GROUP = Group(Prompt(None, None, sample=SimpleNamespace(id="train/7")), [0, 1, 2])


@pytest.mark.parametrize("fault,expected", FAULTS.values(), ids=FAULTS)
def test_a_reward_that_fails_stops_the_run_in_one_line_or_is_zero_or_is_left_out(fault, expected, capsys):
    with pytest.raises(
        ValueError,
        match=rf"^train/7, completion 1 \('text 1'\): its reward {expected}.*; --reward_failures zero or mask",
    ) as end:
        calls(fault, "stop")(GROUP)
    assert "\n" not in str(end.value)
    for failures, counts in (("zero", True), ("mask", False)):
        reward = calls(fault, failures)
        parts, counted = reward(GROUP)
        assert parts.tolist() == [[1.0, 0.5], [0.0, 0.0], [1.0, 0.5]] and counted.tolist() == [True, counts, True]
        assert reward.count_failures() == 1 and reward.count_failures() == 0
        assert re.match(
            rf"1 rewards failed \(--reward_failures {failures}\); the first: train/7, completion 1 .*{expected}",
            capsys.readouterr().out,
        )


def test_after_a_call_no_alarm_is_left_and_the_rewards_own_are_its_own():
    handler = lambda *_: None
    before = signal.signal(signal.SIGALRM, handler)
    try:
        assert within_seconds(5, lambda: signal.alarm(0)) >= 1  # ours was set
        assert signal.getsignal(signal.SIGALRM) is handler and signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    finally:
        signal.signal(signal.SIGALRM, before)
