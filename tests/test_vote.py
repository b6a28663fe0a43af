"""Majority voting: which of several completions speaks for the sample."""

from types import SimpleNamespace

import pytest

from grpo import evaluate
from grpo.runtime.settings import parse
from rewards import jmere, more
from rewards.vote import majority

SAMPLE = SimpleNamespace(types=("org", "per"), relations=("member_of", "peer"), labels=("none", "/per/per/peer"),
                         quintuples=(("a", "per", "b", "per", "peer"),))
AB, CD = "[a, per, b, per, peer]", "[c, per, d, org, member of]"


def said(*lines, thought="x"):
    return f"<think>{thought}</think>\n<answer>" + "\n".join(lines) + "</answer>"


def test_the_most_frequent_set_wins_whatever_its_order_or_its_reasoning():
    wanted = said(AB, CD, thought="first")
    completions = [said(AB), wanted, said(CD, AB, thought="other"), said(AB, CD, AB), said(AB)]
    assert majority(jmere, completions, SAMPLE) == (wanted, 3)


def test_a_tie_goes_to_the_answer_that_came_first():
    assert majority(jmere, [said(CD), said(AB), said(AB), said(CD)], SAMPLE) == (said(CD), 2)


def test_an_answer_of_no_quintuple_votes_and_an_unreadable_one_does_not():
    broken = ["nothing", said("[a, per]"), said("[a, per]")]
    assert majority(jmere, [*broken, said(), said(AB), said()], SAMPLE) == (said(), 2)
    assert majority(jmere, [*broken, said(AB)], SAMPLE) == (said(AB), 1)
    assert majority(jmere, broken, SAMPLE) == ("nothing", 0)


def test_a_task_without_a_key_of_its_own_votes_by_what_it_parses():
    none, peer = "<answer>none</answer>", "<answer> /per/per/peer </answer>"
    assert majority(more, [none, peer, "Well. <answer>/per/per/peer</answer>"], SAMPLE) == (peer, 2)


@pytest.mark.parametrize("words, message", [(["--samples", "0"], "--samples is 0"),
                                            (["--samples", "9"], "--samples 9 at --temperature 0 would be")])
def test_votes_that_could_not_differ_are_refused(words, message):
    settings = parse(evaluate.Settings, ["--model", "m", "--data", "d", "--output", "o", *words])
    with pytest.raises(ValueError, match=message):
        settings.check()
