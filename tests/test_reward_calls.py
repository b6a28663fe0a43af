"""Whatever a reward does wrong is one line that names its sample and completion, and what happens then is a setting."""

import os
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from programs import ROOT

from grpo.group import Group, Prompt
from grpo.runtime.reward_calls import CLOCK, RewardCalls, within_seconds

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
        assert within_seconds(5, "a reward", lambda: signal.alarm(0)) >= 1  # ours was set
        assert signal.getsignal(signal.SIGALRM) is handler and signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    finally:
        signal.signal(signal.SIGALRM, before)


def test_a_name_that_is_cut_inside_a_letter_does_not_stop_the_clock():
    clock = [sys.executable, "-c", CLOCK, "1"]
    strict = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}  # as a terminal's locale has it
    done = subprocess.run(clock, input="9 é".encode()[:-1] + b"\n0\n", env=strict, capture_output=True, timeout=20)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_reward_that_holds_the_interpreter_is_named_too_and_its_process_ended():
    hold = (
        "import itertools, time; from grpo.runtime.reward_calls import within_seconds\n"
        "within_seconds(0.2, 'train/7, completion 1: its reward', lambda: sum(itertools.repeat(1, 1000)))\n"
        "time.sleep(0.8)\n"  # what comes after a call takes as long as it likes
        "within_seconds(0.2, 'train/7, completion 2: its reward', lambda: sum(itertools.repeat(1)))"
    )  # one endless call in C
    done = subprocess.run([sys.executable, "-c", hold], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert done.stderr == (
        "error: train/7, completion 2: its reward holds the interpreter for 0.4 seconds and cannot be interrupted; "
        "the rank is ended (--reward_seconds)\n"
    )
