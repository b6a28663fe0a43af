"""JMERE-R1's reward on worked examples, on everything malformed, and on completions made to be slow."""
import itertools
import random
import time
from types import SimpleNamespace

import pytest

from rewards.assignment import heaviest_pairing
from rewards.jmere import WEIGHTS, answer_text, correct, metrics, parse, reward

TYPES = ("loc", "misc", "org", "per")
RELATIONS = ("couple", "held_on", "member_of", "peer")
GORDON = ("Josh Gordon", "per", "Browns", "org", "member_of")
GORDON_TEXT = "[Josh Gordon, per, Browns, org, member of]"  # 42 characters
AB = ("a", "per", "b", "per", "peer")
CD = ("c", "per", "d", "per", "peer")  # 22 characters as text, like AB


def sample_with(*quintuples):
    return SimpleNamespace(quintuples=quintuples, types=TYPES, relations=RELATIONS)


def thought(answer: str) -> str:
    return f"<think>The image shows a player.</think>\n<answer>{answer}</answer>"


@pytest.mark.parametrize("gold, answer, quintuple, partial", [
    # everything right: w = 5, ED = 0
    ([GORDON], GORDON_TEXT, 1, 1 + 1),
    ([GORDON], f"\n  {GORDON_TEXT} \n", 1, 1 + 1),
    # spaces inside the brackets are free for the parts, not for the text: two more characters
    ([GORDON], "[ Josh Gordon, per, Browns, org, member of ]", 1, 1 + 1 - 2 / 44),
    # nothing predicted: the first term is 0, all 42 characters are missing
    ([GORDON], "", 0, 0),
    ([GORDON], " \n ", 0, 0),
    # one part wrong: w = 4
    ([GORDON], "[Josh Gordan, per, Browns, org, member of]", 0, 4 / 5 + 1 - 1 / 42),
    ([GORDON], "[Josh Gordon, per, Browns, loc, member of]", 0, 4 / 5 + 1 - 3 / 42),
    # one right and one made up: c = 1, n = 2, m = 1, w = 5; line break and 22 characters too many
    ([GORDON], f"{GORDON_TEXT}\n[a, per, b, per, peer]", 2 / 3, 5 / 10 + 1 - 23 / 65),
    # one of two found: w is divided by the predicted, not by the gold
    ([GORDON, AB], GORDON_TEXT, 2 / 3, 5 / 5 + 1 - 23 / 65),
    # another order is right, but the text differs in four letters
    ([AB, CD], "[c, per, d, per, peer]\n[a, per, b, per, peer]", 1, 1 + 1 - 4 / 45),
    # a duplicate counts once in c, n and w, not in the text: line break and 42 characters too many
    ([GORDON], f"{GORDON_TEXT}\n{GORDON_TEXT}", 1, 1 + 1 - 43 / 85),
    ([GORDON, GORDON], GORDON_TEXT, 1, 1 + 1),
    # best pairing: first with second (4) and second with first (4); in the order of the lines it were 4 + 2
    ([AB, ("a", "org", "c", "per", "peer")], "[a, per, c, per, peer]\n[z, per, b, per, peer]",
     0, 8 / 10 + 1 - 6 / 45),
    # head and tail swapped: types and relation still fit; a and b change places
    ([AB], "[b, per, a, per, peer]", 0, 3 / 5 + 1 - 2 / 22),
    # the relation's name with its underscore is the same relation, one letter off
    ([GORDON], "[Josh Gordon, per, Browns, org, member_of]", 1, 1 + 1 - 1 / 42),
])
def test_worked_examples(gold, answer, quintuple, partial):
    parts = reward(thought(answer), sample_with(*gold))
    assert parts == pytest.approx({"quintuple": quintuple, "partial": partial, "format": 1})


def test_the_weights_are_the_papers():
    parts = reward(thought(GORDON_TEXT), sample_with(GORDON))
    assert sum(WEIGHTS[name] * value for name, value in parts.items()) == pytest.approx(1 + 0.2 * 2 + 0.1 * 1)


MALFORMED = {
    "too few parts": "[Josh Gordon, per, Browns, member of]",
    "four parts, two types": "[Josh Gordon, per, org, member of]",
    "too many parts": "[Josh Gordon, per, Browns, org, member of, peer]",
    "nothing in it": "[]",
    "no comma": "[Josh Gordon per Browns org member of]",
    "unknown head type": "[Josh Gordon, person, Browns, org, member of]",
    "unknown tail type": "[Josh Gordon, per, Browns, team, member of]",
    "type in capitals": "[Josh Gordon, PER, Browns, org, member of]",
    "unknown relation": "[Josh Gordon, per, Browns, org, plays for]",
    "no relation": "[Josh Gordon, per, Browns, org, ]",
    "empty head": "[, per, Browns, org, member of]",
    "empty tail": "[Josh Gordon, per, , org, member of]",
    "no opening bracket": "Josh Gordon, per, Browns, org, member of]",
    "no closing bracket": "[Josh Gordon, per, Browns, org, member of",
    "another closing mark": "[Josh Gordon, per, Browns, org, member of)",
    "double opening bracket": "[[Josh Gordon, per, Browns, org, member of]",
    "double closing bracket": "[Josh Gordon, per, Browns, org, member of]]",
    "double brackets": "[[Josh Gordon, per, Browns, org, member of]]",
    "bracket in the tail": "[Josh Gordon, per, Browns], org, member of]",
    "round brackets": "(Josh Gordon, per, Browns, org, member of)",
    "two on a line": f"{GORDON_TEXT} {GORDON_TEXT}",
    "two on a line with a comma": f"{GORDON_TEXT}, [a, per, b, per, peer]",
    "over two lines": "[Josh Gordon, per,\nBrowns, org, member of]",
    "text before it": f"Answer: {GORDON_TEXT}",
    "text after it": f"{GORDON_TEXT}.",
    "a line of text": f"{GORDON_TEXT}\nThat is all.",
    "a bad one after a good one": f"{GORDON_TEXT}\n[Josh Gordon, per]",
    "two places for the head's type": "[Josh Gordon, per, Browns, per, Cleveland, org, member of]",
    "none": "none",
}


@pytest.mark.parametrize("answer", MALFORMED.values(), ids=MALFORMED.keys())
def test_one_malformed_quintuple_costs_the_whole_reward(answer):
    sample = sample_with(GORDON)
    assert reward(thought(answer), sample) == {"quintuple": 0, "partial": 0, "format": 0}
    assert reward(thought(answer), sample, keep_format=True) == {"quintuple": 0, "partial": 0, "format": 1}
    assert parse(thought(answer), sample) is None
    assert not correct(thought(answer), sample)


ANSWER = f"<answer>{GORDON_TEXT}</answer>"
BAD_TAGS = {
    "empty": "",
    "no reasoning": ANSWER,
    "no answer": "<think>x</think>",
    "reasoning not closed": f"<think>x {ANSWER}",
    "answer not closed": f"<think>x</think><answer>{GORDON_TEXT}",
    "answer not opened": f"<think>x</think>{GORDON_TEXT}</answer>",
    "text before": f"Well, <think>x</think>{ANSWER}",
    "text between": f"<think>x</think> so {ANSWER}",
    "text after": f"<think>x</think>{ANSWER} Done.",
    "answer first": f"{ANSWER}<think>x</think>",
    "answer inside the reasoning": f"<think>x{ANSWER}</think>",
    "two answers": f"<think>x</think>{ANSWER}{ANSWER}",
    "an answer in the reasoning as well": f"<think>{ANSWER}</think>{ANSWER}",
    "two reasonings": f"<think>x</think><think>y</think>{ANSWER}",
    "tags in capitals": thought(GORDON_TEXT).upper(),
    "closed before opened": f"</think>x<think>{ANSWER}",
}


@pytest.mark.parametrize("completion", BAD_TAGS.values(), ids=BAD_TAGS.keys())
def test_wrong_tags_cost_the_whole_reward_and_its_format_part_always(completion):
    for keep_format in (False, True):
        parts = reward(completion, sample_with(GORDON), keep_format=keep_format)
        assert parts == {"quintuple": 0, "partial": 0, "format": 0}


@pytest.mark.parametrize("head, tail", [
    ("Nelson Mandela,1996", "South Africa,1994"), ("Poet , Philosopher & amp", "x"), ("Foo ,", ", bar"),
    ("@some_handle", "Sol \" Campbell"), ("a [b] c", "[d]"), ("per", "org"),
])
def test_mentions_may_hold_commas_underscores_types_and_paired_brackets(head, tail):
    sample = sample_with((head, "per", tail, "org", "member_of"))
    assert parse(f"<answer>{answer_text(sample.quintuples)}</answer>", sample) == list(sample.quintuples)


def test_the_answer_is_read_without_reasoning_so_that_label_only_models_can_be_measured():
    sample = sample_with(GORDON, AB)
    completion = f"Sure. <answer>[a, per, b, per, peer]\n\n{GORDON_TEXT}\n{GORDON_TEXT}</answer>"
    assert parse(completion, sample) == [AB, GORDON]
    assert correct(completion, sample)
    assert parse("<answer></answer>", sample) == []
    assert not correct(f"<answer>{GORDON_TEXT}</answer>", sample)
    for two_or_none in (completion * 2, "no tags", f"</answer>{GORDON_TEXT}<answer>"):
        assert parse(two_or_none, sample) is None


def test_metrics_count_over_all_posts_strict_order_free_and_by_entity():
    swapped = ("Browns", "org", "Josh Gordon", "per", "member_of")
    wrong_type = ("c", "per", "d", "loc", "peer")
    measured = metrics(
        [thought(answer_text([swapped])), thought(answer_text([wrong_type, AB])), "cannot be read",
         f"<answer>{GORDON_TEXT}</answer>"],
        [sample_with(GORDON), sample_with(AB, CD), sample_with(GORDON), sample_with(GORDON)])
    assert measured == pytest.approx({
        "accuracy": 1 / 4, "unparsable": 1 / 4,
        "precision": 2 / 4, "recall": 2 / 5, "f1": 4 / 9,
        "precision_order_free": 3 / 4, "recall_order_free": 3 / 5, "f1_order_free": 6 / 9,
        "mner_precision": 7 / 8, "mner_recall": 7 / 10, "mner_f1": 14 / 18})


def test_metrics_of_nothing_are_zero():
    assert set(metrics([], []).values()) == {0}


def test_the_pairing_is_the_best_of_all():
    draw = random.Random(0)
    for _ in range(300):
        rows, columns, most = draw.randint(1, 5), draw.randint(1, 6), draw.choice([1, 5])
        weights = [[draw.randint(0, most) for _ in range(columns)] for _ in range(rows)]
        short, long = sorted([weights, list(zip(*weights))], key=len)
        best = max(sum(short[i][j] for i, j in enumerate(chosen))
                   for chosen in itertools.permutations(range(len(long)), len(short)))
        assert heaviest_pairing(weights) == best, weights


def test_ten_thousand_quintuples_are_scored():
    gold = [(f"head {i}", "per", f"tail {i}", "org", RELATIONS[i % 4]) for i in range(21)]
    predicted = [(f"head {i}", "per", f"tail {i}", "org", RELATIONS[i % 4]) for i in range(10_000)]
    start = time.process_time()
    parts = reward(thought(answer_text(predicted)), sample_with(*gold))
    assert time.process_time() - start < 2  # measured: 0.17 s, 0.38 for twice as many
    text, gold_text = answer_text(predicted), answer_text(gold)
    assert parts["quintuple"] == pytest.approx(2 * 21 / 10_021)
    assert parts["partial"] == pytest.approx(21 * 5 / 50_000 + len(gold_text) / len(text))


GOLD = [(f"head number {i}", "per", f"tail number {i}", "org", "member_of") for i in range(21)]
HOSTILE = {
    "one endless mention": thought(f"[{'x' * 100_000}, per, b, per, peer]"),
    "two thousand quintuples": thought(answer_text(
        (f"head number {i}", "per", f"some tail {i}", "org", "peer") for i in range(2_200))),
    "brackets": thought("[" * 100_000),
    "commas": thought(f"[{',' * 100_000}]"),
    "types": thought(f"[a{', per' * 20_000}]"),
    "spaces": "<think></think>" + " " * 100_000 + "<answer>",
    "line breaks": thought("\n" * 100_000) + "x",
    "opening tags": "<think>" * 14_000,
}


@pytest.mark.parametrize("completion", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hundred_thousand_characters_cost_milliseconds(completion):
    start = time.process_time()
    reward(completion, sample_with(*GOLD))
    assert time.process_time() - start < 0.5  # measured: 60 ms; a quadratic step would take many seconds
