"""MORE-R1's reward: format + length + answer, each 0 or 1, and the four figures MORE is measured by.

The template (MORE-R1, section 3.3.1) is `<think> Step 1: … Step 6: … </think> <answer>LABEL</answer>`. Whitespace
around its parts is free, nothing else is."""
import re

from rewards.tags import tag_fault

WEIGHTS = {"format": 1.0, "length": 1.0, "answer": 1.0}  # the paper's equation 5: a plain sum, 0 to 3
STEPS = ["1", "2", "3", "4", "5", "6"]
STEP_MARKER = re.compile(r"Step ([0-9]+):")


def parse(completion: str, sample) -> str | None:
    """The label between the one `<answer>` and the `</answer>` behind it, or None.

    None where there is no such pair, where `<answer>` stands more than once, or where what it holds is not one of
    `sample.labels` letter by letter. The rest is not looked at: a right answer counts outside the template."""
    label, closing, _ = completion.partition("<answer>")[2].partition("</answer>")
    readable = closing and completion.count("<answer>") == 1 and label.strip() in sample.labels
    return label.strip() if readable else None


def fault(completion: str, sample) -> str | None:
    """The first thing that breaks the template, in words, or None where nothing does."""
    if broken := tag_fault(completion):
        return broken
    reasoning = completion.partition("<think>")[2].partition("</think>")[0]
    # A step told twice and a seventh leave the template too: `Step k:` belongs to the six.
    if STEP_MARKER.findall(reasoning) != STEPS or not reasoning.lstrip().startswith("Step 1:"):
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

    A predicted relation is in precision's denominator, a gold one in recall's, as MORE's own evaluation counts. An
    answer that cannot be parsed predicts nothing: `unparsable` is the share of them. A share of nothing is 0."""
    table, total = per_label(completions, samples), max(len(samples), 1)
    count = lambda name, *without: sum(row[name] for label, row in table.items() if label not in without)
    return {  # F1 first: it decides which checkpoint is the best
        **_scores(*(count(name, "none") for name in ("right", "predicted", "support"))),
        "accuracy": count("right") / total, "unparsable": (len(samples) - count("predicted")) / total}


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
    shares = {"f1": (2 * right, predicted + gold), "precision": (right, predicted), "recall": (right, gold)}
    return {name: part / max(whole, 1) for name, (part, whole) in shares.items()}
