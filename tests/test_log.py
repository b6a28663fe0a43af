"""What a run says on the screen: few lines, each a mean, and at the end whether it has learned."""

import pytest

from grpo.runtime import log
from grpo.runtime.log import Means
from grpo.runtime.step_metrics import outcome, readable


def told(monkeypatch, updates, seconds, due=()):
    """[(update, mean)] of the lines of a run whose updates take so many seconds; update n has loss n."""
    clock = [1000.0]
    monkeypatch.setattr(log.time, "monotonic", lambda: clock[0])
    means, lines = Means(updates), []
    for n in range(1, updates + 1):
        clock[0] += seconds
        if mean := means.add({"step": n, "loss": float(n)}, due=n == updates or n in due):
            assert mean["step"] == n
            lines.append((n, mean["loss"]))
    return lines


@pytest.mark.parametrize("updates,seconds,most", [(180, 0.5, 11), (180, 60, 48), (5000, 0.1, 52), (20, 60, 20)])
def test_a_long_run_has_few_lines_and_a_short_one_of_slow_updates_all(monkeypatch, updates, seconds, most):
    lines = told(monkeypatch, updates, seconds)
    assert most - 3 <= len(lines) <= most and lines[0] == (1, 1.0) and lines[-1][0] == updates
    places = [0, *(n for n, _ in lines)]
    assert [mean for _, mean in lines] == [(a + 1 + b) / 2
                                           for a, b in zip(places, places[1:])]  # of all since the last line


def test_what_is_due_is_told_at_once(monkeypatch):
    assert (7, 4.5) in told(monkeypatch, 180, 0.1, due=(7,))  # the mean of 2 to 7


def test_a_mean_leaves_out_what_is_no_number_and_keeps_the_last_of_whole_ones():
    means = Means(10)
    means.said = log.time.monotonic()
    for line in ({"loss": 1.0, "prompts": 16}, {"loss": float("nan"), "prompts": 8, "kl": 0.5}):
        assert means.add(line) is None
    assert means.add({"loss": 3.0, "prompts": 9}, due=True) == {"loss": 2.0, "prompts": 9, "kl": 0.5}


LINE = {"step": 3, "loss": 0.1, "reward": 1.0, "rewards/length/mean": 0.5, "kl": 0.01, "completions/mean_length": 23.2,
        "completions/clipped_ratio": 1.0, "frac_reward_zero_std": 0.5, "step_time": 1.0}


def test_a_line_says_how_many_completions_were_cut_and_length_is_one_thing():
    text = readable(LINE, 9)
    assert "tokens 23  cut 100%  " in text and text.count("length") == 1
    assert "cut" not in readable(LINE | {"completions/clipped_ratio": 0.0}, 9)


def test_the_end_says_whether_anything_was_learned():
    falling, rising = [2.4] * 2 + [2.3] * 16 + [2.2] * 2, [1.0] * 2 + [1.5] * 16 + [2.0] * 2
    hint, best = ": not learning, see docs/training-guide.md", "best f1 at step 0"
    assert outcome(falling, [0.5, 0.4], best) == "reward 2.40 → 2.20 (first and last tenth), best f1 at step 0" + hint
    assert outcome(falling, [], "") == "reward 2.40 → 2.20 (first and last tenth)" + hint
    assert outcome(falling, [0.0, 0.0],
                   "best f1 at step 20").endswith("best f1 at step 20" + hint)  # the newer of equals
    assert outcome(falling, [0.5, 0.6],
                   "best f1 at step 10") == "reward 2.40 → 2.20 (first and last tenth), best f1 at step 10"
    assert outcome(rising, [0.5, 0.4], best) == "reward 1.00 → 2.00 (first and last tenth), best f1 at step 0"
    assert hint not in outcome(falling[:9], [0.5, 0.4], best)  # too few to tell
