"""MORE-R1's reward: format + length + answer, each 0 or 1, and the four figures MORE is measured by.

The template (MORE-R1, section 3.3.1) is `<think> Step 1: … Step 6: … </think> <answer>LABEL</answer>`.
Whitespace around its parts is free, nothing else is. A completion is read a fixed number of times from left
to right, with no pattern that can backtrack, so that a hostile one costs no more than its length."""
import re

WEIGHTS = {"format": 1.0, "length": 1.0, "answer": 1.0}  # the paper's equation 5: a plain sum, 0 to 3
STEPS = ["1", "2", "3", "4", "5", "6"]
STEP_MARKER = re.compile(r"Step ([0-9]+):")


def parse(completion: str, sample) -> str | None:
    """The label between the one `<answer>` and the `</answer>` behind it, or None.

    None where there is no such pair, where `<answer>` stands more than once, or where what it holds is not one of
    `sample.labels` letter by letter. The rest is not looked at: a right answer counts outside the template."""
    _, *after = completion.split("<answer>")
    if len(after) != 1:
        return None
    label, closing, _ = after[0].partition("</answer>")
    label = label.strip()
    return label if closing and label in sample.labels else None


def fault(completion: str, sample) -> str | None:
    """The first thing that breaks the template, in words, or None where nothing does."""
    text = completion.strip()
    for tag in ("<think>", "</think>", "<answer>", "</answer>"):
        if text.count(tag) != 1:
            return f"{tag} missing" if tag not in text else f"{tag} more than once"
    before, _, rest = text.partition("<think>")
    reasoning, closed, rest = rest.partition("</think>")
    between, opened, rest = rest.partition("<answer>")
    _, answered, after = rest.partition("</answer>")
    if not (closed and opened and answered):
        return "tags out of order"
    if before or between.strip() or after:
        return "text outside the tags"
    steps = STEP_MARKER.findall(reasoning)
    # A step told twice and a seventh leave the template too: `Step k:` belongs to the six.
    if steps != STEPS or not reasoning.lstrip().startswith("Step 1:"):
        return "not Step 1: to Step 6:, each once and in order"
    return None if parse(completion, sample) is not None else "answer is not one of the labels"


def reward(completion: str, sample, *, min_length: int = 1024) -> dict[str, float]:
    """The three parts, unweighted, each 0 or 1 (MORE-R1, section 3.3.1).

    format: the whole template, with one of `sample.labels`; length: more than `min_length` characters, tags
    included; answer: the label is the sample's, whatever else is wrong with the format."""
    return {"format": float(fault(completion, sample) is None), "length": float(len(completion) > min_length),
        "answer": float(correct(completion, sample))}


def correct(completion: str, sample) -> bool:
    """Whether the answer is the sample's label: what divides the easy samples from the hard ones."""
    return parse(completion, sample) == sample.label


def metrics(completions: list[str], samples: list) -> dict[str, float]:
    """Accuracy over all samples; precision, recall and F1 micro over the labels other than none; all 0 to 1.

    A predicted relation is in precision's denominator, a gold one in recall's, as MORE's own evaluation
    counts. An answer that cannot be parsed predicts nothing, so it is in no precision denominator;
    `unparsable` is the share of them. A share of nothing is 0. Raises ValueError if the two lists are not
    equally long."""
    table = per_label(completions, samples)
    count = lambda name, rows: sum(row[name] for row in rows)
    related = [row for label, row in table.items() if label != "none"]
    return {  # F1 first: it decides which checkpoint is the best
        **_scores(*(count(name, related) for name in ("right", "predicted", "support"))),
        "accuracy": _share(count("right", table.values()), len(samples)),
        "unparsable": _share(len(samples) - count("predicted", table.values()), len(samples))}


def per_label(completions: list[str], samples: list) -> dict[str, dict[str, float]]:
    """For every candidate label: precision, recall, f1, and the counts behind them: support (gold), predicted, right.

    `none` has its row here too, although the micro figures leave it out."""
    answers = [parse(completion, sample) for completion, sample in zip(completions, samples, strict=True)]
    golds, table = [sample.label for sample in samples], {}
    for label in dict.fromkeys(label for sample in samples for label in sample.labels):
        right = sum(answer == gold == label for answer, gold in zip(answers, golds))
        predicted, gold = answers.count(label), golds.count(label)
        table[label] = {**_scores(right, predicted, gold), "support": gold, "predicted": predicted, "right": right}
    return table


def _scores(right: int, predicted: int, gold: int) -> dict[str, float]:
    precision, recall = _share(right, predicted), _share(right, gold)
    return {"f1": _share(2 * precision * recall, precision + recall), "precision": precision, "recall": recall}


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
