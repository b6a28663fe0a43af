"""MORE-R1's reward on tricky completions, and its four figures against counting by hand."""
import time
from types import SimpleNamespace

import pytest

from rewards.more import WEIGHTS, correct, fault, metrics, parse, per_label, reward

LABELS = ("none", "/per/org/member_of", "/per/org/opposed_to", "/per/per/peer")
GOLD = "/per/org/member_of"
SAMPLE = SimpleNamespace(label=GOLD, labels=LABELS)
STEPS = " ".join(f"Step {k}: because." for k in range(1, 7))
THINK = f"<think> {STEPS} </think>"
BARE = "".join(f"Step {k}:" for k in range(1, 7))
SWAPPED = STEPS.replace("Step 2", "Step 9").replace("Step 3", "Step 2").replace("9", "3")
GOOD = f"{THINK} <answer>{GOLD}</answer>"

# what is tricky, completion, format, answer
TABLE = [
    ("as it should be", GOOD, 1, 1),
    ("no whitespace at all", GOOD.replace("> ", ">").replace(" <", "<"), 1, 1),
    ("whitespace around every part", f"\n {THINK} \n\n\t<answer>\n {GOLD} </answer> \n", 1, 1),
    ("steps over several lines", GOOD.replace(" Step", "\nStep"), 1, 1),
    ("empty steps", f"<think>{BARE}</think><answer>{GOLD}</answer>", 1, 1),
    ("a step is mentioned, not opened", GOOD.replace("because", "as Step 1 showed", 2), 1, 1),
    ("the wrong label", GOOD.replace(GOLD, "none"), 1, 0),
    ("empty", "", 0, 0),
    ("only whitespace", " \n", 0, 0),
    ("only the answer", f"<answer>{GOLD}</answer>", 0, 1),
    ("answer before reasoning", f"<answer>{GOLD}</answer> {THINK}", 0, 1),
    ("no answer", THINK, 0, 0),
    ("cut off in the answer", GOOD[:-4], 0, 0),
    ("cut off before the answer's end", GOOD.replace("</answer>", ""), 0, 0),
    ("cut off in the reasoning", GOOD[:60], 0, 0),
    ("reasoning not closed", GOOD.replace("</think>", ""), 0, 1),
    ("reasoning not opened", GOOD.replace("<think>", ""), 0, 1),
    ("a step missing", GOOD.replace("Step 4: because.", ""), 0, 1),
    ("the last step missing", GOOD.replace("Step 6: because.", ""), 0, 1),
    ("two steps out of order", GOOD.replace(STEPS, SWAPPED), 0, 1),
    ("a step twice", GOOD.replace("Step 4:", "Step 3: again. Step 4:"), 0, 1),
    ("a seventh step", GOOD.replace(" </think>", " Step 7: more. </think>"), 0, 1),
    ("steps without colon", GOOD.replace(":", ""), 0, 1),
    ("small letters", GOOD.replace("Step", "step"), 0, 1),
    ("steps in bold", GOOD.replace("Step 1:", "**Step 1:**"), 0, 1),
    ("words before the first step", GOOD.replace("<think>", "<think> Well."), 0, 1),
    ("the steps outside the reasoning", f"<think></think> {STEPS} <answer>{GOLD}</answer>", 0, 1),
    ("text before", "Sure! " + GOOD, 0, 1),
    ("text after", GOOD + " That is all.", 0, 1),
    ("text between", GOOD.replace("</think>", "</think> so"), 0, 1),
    ("two answers", GOOD + f" <answer>{GOLD}</answer>", 0, 0),
    ("two answers, the first one wrong", GOOD.replace("<answer>", "<answer>none</answer> <answer>"), 0, 0),
    ("answer inside the reasoning too", GOOD.replace("because", f"<answer>{GOLD}</answer>", 1), 0, 0),
    ("answer nested in itself", GOOD.replace(GOLD, f"<answer>{GOLD}</answer>"), 0, 0),
    ("answer closed twice", GOOD + "</answer>", 0, 1),
    ("answer nested in the reasoning", f"<think> {STEPS} <answer>{GOLD}</answer> </think>", 0, 1),
    ("reasoning nested in itself", GOOD.replace(THINK, f"<think>{THINK}</think>"), 0, 1),
    ("reasoning opened twice", GOOD.replace("because", "<think>", 1), 0, 1),
    ("reasoning nested in the answer", f"<answer>{THINK}{GOLD}</answer>", 0, 0),
    ("reasoning twice", THINK + GOOD, 0, 1),
    ("tags in capitals", GOOD.replace("answer", "ANSWER"), 0, 0),
    ("label without its slash", GOOD.replace(GOLD, GOLD[1:]), 0, 0),
    ("label in capitals", GOOD.replace(GOLD, GOLD.upper()), 0, 0),
    ("unknown label", GOOD.replace(GOLD, "/per/org/fan_of"), 0, 0),
    ("two labels", GOOD.replace(GOLD, f"{GOLD}, none"), 0, 0),
    ("a part of a label", GOOD.replace(GOLD, "/per/org"), 0, 0),
    ("empty answer", GOOD.replace(GOLD, ""), 0, 0),
]


@pytest.mark.parametrize("completion, form, answer", [row[1:] for row in TABLE],
                         ids=[row[0] for row in TABLE])
def test_a_completion_gets_what_the_template_says(completion, form, answer):
    parts = reward(completion, SAMPLE)
    assert (parts["format"], parts["answer"]) == (form, answer)
    assert correct(completion, SAMPLE) == bool(answer)
    assert (fault(completion, SAMPLE) is None) == bool(form)


def test_the_parts_are_those_that_have_weights():
    assert list(reward("", SAMPLE)) == list(WEIGHTS) == ["format", "length", "answer"]
    assert set(WEIGHTS.values()) == {1.0}


def test_length_pays_only_above_the_limit():
    assert reward("x" * 1024, SAMPLE)["length"] == 0
    assert reward("x" * 1025, SAMPLE)["length"] == 1
    assert reward("x" * 9, SAMPLE, min_length=8)["length"] == 1


def test_an_answer_is_read_whatever_stands_around_it():
    assert parse("so <answer> none </answer> or so", SAMPLE) == "none"
    assert parse("none", SAMPLE) is None


@pytest.mark.parametrize("piece", ["<think>", "<answer>", "</answer>", "Step 1: ", "Step 1", "Step 1111",
                                   "<think> Step 1: ", "<answer>none</answer>", "<", " ", "\n", "1"])
def test_a_hostile_completion_costs_milliseconds(piece):
    hostile = (piece * (100_000 // len(piece) + 1))[:100_000]
    for completion in (hostile, f"<think>{hostile}", f"<answer>{hostile}</answer>",
                       GOOD.replace("because.", hostile, 1), GOOD.replace("1: because.", hostile)):
        start = time.process_time()
        reward(completion, SAMPLE)
        assert time.process_time() - start < 0.1


def answers(*labels):
    return [f"<answer>{label}</answer>" for label in labels]


def samples(*labels):
    return [SimpleNamespace(label=label, labels=LABELS) for label in labels]


def test_the_figures_equal_counting_by_hand():
    golds = samples("none", "none", GOLD, GOLD, GOLD, "/per/per/peer", "none")
    texts = answers("none", GOLD, GOLD, "/per/per/peer", "none", "nonsense", "nonsense")
    figures = metrics(texts, golds)
    assert figures["accuracy"] == 2 / 7  # the first and the third
    assert figures["precision"] == 1 / 3  # three relations were predicted; nonsense predicts nothing
    assert figures["recall"] == 1 / 4  # four relations are there, one is behind nonsense
    assert figures["f1"] == pytest.approx(2 / 7)
    assert figures["unparsable"] == 2 / 7


def test_a_model_that_never_says_anything_scores_zero():
    assert metrics(["", ""], samples("none", GOLD)) == {
        "accuracy": 0, "precision": 0, "recall": 0, "f1": 0, "unparsable": 1}


def test_always_none_is_accurate_and_finds_nothing():
    figures = metrics(answers("none", "none", "none", "none"), samples("none", "none", "none", GOLD))
    assert figures == {"accuracy": 0.75, "precision": 0, "recall": 0, "f1": 0, "unparsable": 0}


def test_every_label_has_its_own_row():
    golds = samples("none", "none", GOLD, GOLD)
    table = per_label(answers("none", GOLD, GOLD, "nonsense"), golds)
    assert list(table) == list(LABELS)
    assert table[GOLD] == {"precision": 0.5, "recall": 0.5, "f1": 0.5, "support": 2, "predicted": 2, "right": 1}
    assert table["none"]["recall"] == 0.5 and table["none"]["precision"] == 1
    assert table["/per/per/peer"]["f1"] == 0


def test_a_completion_too_few_is_refused():
    with pytest.raises(ValueError, match="argument 2 is longer"):
        metrics([""], samples("none", "none"))
