"""Verifiers by tables of tricky answers; the form of a completion; the metrics."""

import time

import pytest

from data.jsonl import Sample, choose_golds, target
from rewards import jsonl
from rewards.jsonl import VERIFIERS, correct, fault, marked, metrics, parse, reward, vote_key
from rewards.vote import majority


def sample(answer, verifier="auto", text="What?", choices=(), category="", reasoning=True, tolerance=1e-6, whole=False,
           size=None, seen=None, fields=()):
    one = Sample("x", text, [], answer, "", list(choices), category, dict(fields), [size] if size else [],
                 [seen or size] if size else [], reasoning, tolerance, whole)
    choose_golds(one, VERIFIERS.get(verifier))
    return one


def right(answer, text, verifier, **more):
    return correct(f"<answer>{text}</answer>", sample(answer, verifier, **more))


# ── where the answer stands ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("text, expected", [
    ("<answer> 5 </answer>", " 5 "), ("no marks", None), ("", None), ("<answer>5", None), ("5</answer>", None),
    ("<answer>1</answer> no: <answer>2</answer>", "2"), ("</answer><answer>", None),
    ("<answer>1</answer></answer>", "1</answer>"), ("<answer>a <answer>b</answer>", "b"),
    (r"so \boxed{7}", "7"), (r"\boxed{1} then \boxed{\frac{1}{2}}", r"\frac{1}{2}"), (r"\boxed{7", None),
    (r"\boxed{}", ""), (r"\boxed{a\}b}", r"a\}b"), (r"\boxed 7", None), (r"\boxed{x\\", None),
    (r"<answer>3</answer> \boxed{4}", "3"), (r"<answer>\boxed{4}</answer>", r"\boxed{4}"), (r"<answer> \boxed{4}", "4"),
])
def test_the_answer_is_in_the_last_tags_else_in_the_last_box(text, expected):
    assert marked(text) == expected


def test_without_marks_the_whole_text_behind_the_thoughts_counts_only_where_it_is_said():
    for completion, strict, whole in [("It is 7.", None, "It is 7."), ("<think>8</think> 7", None, "7"),
                                      ("<answer>9</answer> 7", "9", "9"), ("", None, None)]:
        assert parse(completion, sample("7", "exact")) == strict
        assert parse(completion, sample("7", "exact", whole=True)) == whole


# ── verifiers ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("gold, text, expected", [
    ("Paris", "Paris", True), ("Paris", " Paris\n", True), ("Paris", "paris", False), ("a  b", "a b", False),
    (5, "5", True), (5, "5.0", False), (["UK", "Britain"], "Britain", True), ("-5", "5", False),
    ("Straße", "Strasse", False),
])
def test_exact(gold, text, expected):
    assert right(gold, text, "exact") is expected


@pytest.mark.parametrize("gold, text, expected", [
    ("Paris", " PARIS. ", True), ("New York", "new\n  york!", True), ("Straße", "STRASSE", True), ("it's", "its", True),
    ("U.S.A.", "USA", True), ("ﬁsh", "fish", True), ("½", "1⁄2", True), ("Paris", "Paris, France", False),
    ("a-b", "ab", True), ("a b", "ab", False), ("?", "?", True), ("?", "!", False), ("x", "", False),
    ("café", "cafe\u0301", True), ("ΣΑΣ", "σας", True), (["no", "none"], "None.", True), (3.5, "3.5", True),
    ("+", "+", True), ("日本", "日本。", True),
])
def test_text_ignores_case_space_and_punctuation(gold, text, expected):
    assert right(gold, text, "text") is expected


NUMBERS = [
    (7, "7", True), (7, "7.0", True), (7, " 7. ", True), (7, "seven", False), ("7", "x = 7", True),
    (7, "7 apples", True), (7, "3 + 4 = 7", True), (7, "7 + 1 = 8", False), (7, "07", True), (7, "+7", True),
    (7, "1,7", True), (7, "", False), (-7, "-7", True), (-7, "−7", True), (-7, "7", False), (7, "10-7", True),
    (-7, "x=-7", True), (7, "- 7", True), (3, "5–3", True), (1200, "1,200", True), (1200, "1200", True),
    (1200, "$1,200.00", True), (1200, "1,2000", False), (1234567, "1,234,567", True), ("1,200", "1200", True),
    (1200, r"\$1{,}200", True), (1200, r"1\,200", True), (1200, "1\u202f200", False), (-5, "-$5", True),
    (0.5, "1/2", True), (0.5, "1 / 2", True), (0.5, ".5", True), (0.5, r"\frac{1}{2}", True),
    (0.5, r"\dfrac{2}{4}", True), (-0.5, r"-\frac{1}{2}", True), (2.5, "2 1/2", True), (2.5, r"2\frac{1}{2}", True),
    (2.5, "5/2", True), ("3/4", "0.75", True), ("1/3", "0.3333", False), (0.5, "1/0", False),
    (0.5, r"\frac{1}{0}", False), (0.5, r"\frac{x}{2}", False), (0.5, "50%", True), ("50%", "0.5", True),
    ("50%", "50", True), (50, "50%", True), ("50%", "50 percent", True), ("50%", r"50\%", True), ("50%", "5%", False),
    (0.5, "0.5%", True), (50, "0.5", False), (1200, "1.2e3", True), (1200, "1.2E+3", True), (0.0012, "1.2e-3", True),
    (1, "1e999", False), (1, "1e99999", False), (0, "0", True), (0, "-0", True), (0, "0.0000001", False),
    (7, "H2O7", False), (7, "v7", False), (7, "7th", True), (7, "1.2.7", False), (1.2, "1.2.7", True),
    (7, "7" * 41, False), (10**15, "1" + "0" * 15, True), (7, "٧", False), (7, "７", False), (7, "1:7", True),
    ("1e3", "1000", True), (7, "(7)", True), (12, "12,", True), (12, "12,000", False), (3, "2, 3", True),
]


@pytest.mark.parametrize("gold, text, expected", NUMBERS)
def test_number(gold, text, expected):
    assert right(gold, text, "number") is expected


def test_a_tolerance_is_a_share_of_the_right_number():
    assert right(200, "203", "number", tolerance=0.02) and not right(200, "205", "number", tolerance=0.02)
    assert right("1/3", "0.333", "number", tolerance=0.01) and right(-200, "-197", "number", tolerance=0.02)
    assert not right(0, "0.01", "number", tolerance=0.02) and right(0.1, "0.1", "number", tolerance=0)


FRUIT = ["apple", "pear tree", "a plum"]


@pytest.mark.parametrize("gold, text, expected", [
    ("B", "B", True), ("B", "b", True), ("B", "(B)", True), ("B", "B.", True), ("B", "B) pear tree", True),
    ("B", "pear tree", True), ("B", "Pear  tree.", True), ("B", "The answer is B.", True), ("B", "A", False),
    ("B", "A or B", False), ("B", "D", False), ("B", "The answer is (B) and not something else", True),
    ("B", "apple", False), ("pear tree", "B", True), (1, "B", True), (0, "A", True), ("B", "", False),
    ("B", "BB", False), ("B", "B B", True), ("C", "a plum", True), ("B", "It's B", True), ("B", "Both", False),
    ("B", "B's", False),
])
def test_choice(gold, text, expected):
    assert right(gold, text, "choice", choices=FRUIT) is expected


def test_of_choices_that_are_letters_the_text_counts():
    assert right("B", "B", "choice",
                 choices=["A", "AB", "B", "O"]) and not right("AB", "B", "choice", choices=["A", "AB", "B"])
    assert right(1, "1", "choice", choices=["0", "1"]) and right("1", "B", "choice", choices=["0", "1"])


BOX = [10, 20, 30, 60]


@pytest.mark.parametrize("text, expected", [
    ("[10, 20, 30, 60]", 1.0), ("10, 20, 30, 60", 0.0), ("(10,20,30,60)", 1.0),
    ('[{"bbox_2d": [10, 20, 30, 60], "label": "cup"}]', 1.0), ("[\n 10,\n 20,\n 30,\n 60 ]", 1.0),
    ("[10.0, 20.0, 30.0, 60.0]", 1.0), ("[10, 20, 30, 40]", 0.5), ("[30, 20, 50, 60]", 0.0), ("[30, 60, 10, 20]", 0.0),
    ("[[10, 20, 30, 60], [0, 0, 5, 5]]", 0.5), ("[10, 20, 30]", 0.0), ("[10, 20, 30, 60, 70]", 0.0),
    ("[10, 20, 30, 60] [10, 20, 30, 60]", 0.5), ("nothing", 0.0), ("[10, 20, 10, 60]", 0.0), ("[nan, 1, 2, 3]", 0.0),
])
def test_boxes_by_iou(text, expected):
    one = sample(BOX, "boxes", size=(100, 80))
    assert reward(f"<answer>{text}</answer>", one)["answer"] == pytest.approx(expected)


def test_boxes_are_compared_where_the_model_sees_them_and_paired_one_to_one():
    one = sample([[10, 20, 30, 60], [50, 0, 100, 80]], "boxes", size=(100, 80), seen=(200, 40))
    assert one.golds == [((20, 10, 60, 30), (100, 0, 200, 40))]
    assert reward("<answer>[100, 0, 200, 40] [20, 10, 60, 30]</answer>", one)["answer"] == pytest.approx(1)
    assert reward("<answer>[100, 0, 200, 40]</answer>", one)["answer"] == pytest.approx(0.5)
    assert target(one) == "<answer>[[20, 10, 60, 30], [100, 0, 200, 40]]</answer>" and correct(target(one), one)


@pytest.mark.parametrize("gold, text, expected", [
    (r"(1[0-2]|[1-9]):00", "11:00", True), (r"(1[0-2]|[1-9]):00", "13:00", False), ("a.c", "abc", True),
    ("a.c", "xabcx", False), ("(?i)yes", "YES", True), (["yes", "ja"], "ja", True), ("a*", "a" * 1001, False),
    ("a*", "a" * 1000, True),
])
def test_regex_matches_the_whole_answer(gold, text, expected):
    assert right(gold, text, "regex") is expected


def test_auto_takes_choice_number_or_text_by_the_line():
    names = {value: name for name, value in VERIFIERS.items()}
    of = lambda answer, **more: names[sample(answer, **more).verifier]
    assert of("B", choices=FRUIT) == "choice" and of(7) == of("1,200") == of("3/4") == of(["7", 8]) == "number"
    assert of("Paris") == of("7 apples") == of(["7", "seven"]) == "text"


@pytest.mark.parametrize("value, verifier, message, more", [
    ("seven", "number", "a number expected", {}), ("3 and 4", "number", "a number expected", {}),
    ("1/0", "number", "a number", {}), (["7", "x"], "number", "a number expected", {}),
    ("(", "regex", "a regular expression expected", {}), ("", "exact", "a text", {}),
    ("D", "choice", "letter, text or number from 0", dict(choices=FRUIT)), (3, "choice", "from 0", dict(choices=FRUIT)),
    ("A", "choice", "one of the line's choices by letter, text", {}), (-1, "choice", "from 0", dict(choices=FRUIT)),
    (BOX, "boxes", "within the line's one image", {}), ("[1,2,3,4]", "boxes", "[x1, y1", dict(size=(100, 80))),
    ([10, 20, 30, 90], "boxes", "within the line's one image", dict(size=(100, 80))),
    ([30, 20, 10, 60], "boxes", "within", dict(size=(100, 80))),
    ([[1, 2, 3]], "boxes", "[x1, y1", dict(size=(100, 80))), ([], "boxes", "[x1, y1", dict(size=(100, 80))),
    ([True, 2, 3, 4], "boxes", "[x1, y1", dict(size=(100, 80))),
])
def test_an_answer_that_the_verifier_cannot_use_is_refused(value, verifier, message, more):
    with pytest.raises(ValueError) as caught:
        sample(value, verifier, **more)
    assert message in str(caught.value) and str(caught.value).startswith("answer is ")


# ── form, reward, metrics ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("completion, expected", [
    ("<think>so</think><answer>7</answer>", None), (" <think>so</think>\n<answer> 7 </answer>\n", None),
    ("<answer>7</answer>", "<think> missing"), ("<think>so<answer>7</answer>", "</think> missing"),
    ("7", "<think> missing"), ("<think>a</think><think>b</think><answer>7</answer>", "<think> more than once"),
    ("", "<think> missing"), ("<think>a</think><answer>1</answer><answer>7</answer>", "<answer> more than once"),
    ("x <think>so</think><answer>7</answer>", "text outside the tags"),
    ("</think><think><answer>7</answer>", "tags out of order"),
    ("<think>so</think> x <answer>7</answer>", "text outside the tags"),
    ("<think>so</think><answer>7</answer>.", "text outside the tags"),
    ("<think><answer>7</answer></think>", "tags out of order"),
    ("<think>so</think><answer>x</answer>", "no answer that can be read"),
])
def test_the_form_is_that_which_was_asked_for(completion, expected):
    one = sample(7, "number")
    assert fault(completion, one) == expected and reward(completion, one)["format"] == (expected is None)


def test_without_reasoning_no_thoughts_are_asked_for_and_a_question_may_have_its_own_form():
    plain = sample(7, reasoning=False)
    assert fault("<answer>7</answer>", plain) is None and fault("<think>so</think><answer>7</answer>",
                                                                plain) == "text outside the tags"
    own = sample(7, text=r"2 + 5? Answer in \boxed{}.", reasoning=False)
    assert fault(r"It is \boxed{7}.", own) is None and fault("It is 7.", own) == "no answer that can be read"
    whole = sample(7, reasoning=False, whole=True)
    assert fault("It is 7.", whole) is None and fault("It is seven.", whole) == "no answer that can be read"
    assert target(plain) == "<answer>7</answer>" and target(whole) == "7"


def test_a_right_answer_counts_outside_the_form_and_the_form_without_it():
    one = sample(7)
    assert reward("7 it is: <answer>7</answer>", one) == {"format": 0.0, "answer": 1.0}
    assert reward("<think>so</think><answer>8</answer>", one) == {"format": 1.0, "answer": 0.0}


def test_metrics_count_what_is_right_what_cannot_be_read_and_each_category():
    samples = [sample(7, category="sums"), sample(8, category="sums"), sample("x", category="words"), sample(9)]
    found = metrics(["<answer>7</answer>", "<answer>9</answer>", "x", "<answer>9</answer>"], samples)
    assert list(found) == ["accuracy", "unparsable", "accuracy/sums", "accuracy/words"]
    assert found == {"accuracy": 0.5, "unparsable": 0.25, "accuracy/sums": 0.5, "accuracy/words": 0.0}
    with pytest.raises(ValueError, match="longer"):
        metrics([""], samples)


def test_equal_numbers_are_one_vote_however_they_are_written():
    texts = [f"<answer>{text}</answer>" for text in ("8", "7", "7.0", "8 or so: 9")] + ["7"]
    assert majority(jsonl, texts, sample(7)) == ("<answer>7</answer>", 2)
    assert vote_key("7", sample(7)) is None


HOSTILE = ["<answer>" * 20000, "</answer>" * 20000, "<answer></answer>" * 10000, "\\boxed{" * 20000,
           "\\boxed{" + "{" * 100000, "<answer>" + "1," * 60000 + "</answer>",
           "<answer>" + "1,111" * 20000 + ",</answer>", "<answer>" + "1" * 100000 + "</answer>",
           "<answer>" + "1/" * 60000 + "</answer>", "<answer>" + "1 " * 60000 + "</answer>",
           "<answer>" + "[1,1,2," * 20000 + "</answer>", "<answer>" + "\\frac{1}{" * 12000 + "</answer>",
           "<answer>" + "[1,1,2,2]" * 12000 + "</answer>", "<answer>" + " " * 100000 + "</answer>",
           "<answer>" + "A " * 50000 + "</answer>", "<think>" * 20000, "." * 100000, "<answer>" + "(" * 100000
           + "</answer>", "<answer>" + "-" * 100000 + "</answer>", "<answer>" + "1e" * 50000 + "</answer>",
           "<answer>" + "١" * 50000 + "</answer>", "<answer>" + "é́" * 30000 + "</answer>"]


@pytest.mark.parametrize("verifier, answer, more", [
    ("exact", "x", {}), ("text", "x", {}), ("number", 7, {}), ("choice", "A", dict(choices=FRUIT)),
    ("boxes", BOX, dict(size=(100, 80))), ("regex", "a*b", {})])
def test_a_hostile_completion_costs_no_more_than_its_length(verifier, answer, more):
    one, begin = sample(answer, verifier, **more), time.process_time()
    for completion in HOSTILE:
        reward(completion, one)
        reward(completion, sample(answer, verifier, whole=True, **more))
    assert (
        time.process_time() - begin < 30
    )  # measured: 3 s; one quadratic step of 100,000 characters would take minutes
