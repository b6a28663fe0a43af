"""Is an answer right? Verifiers for questions from a file, the reward and the metrics of `--task jsonl`.

The answer is what stands in the last `<answer></answer>`, else in the last `\\boxed{}`, else, with --whole_answer, the
whole text behind `</think>`. A verifier reads it, None where it is none of its kind, and compares what it has read with
what it has read from the file. Everything is read a fixed number of times: hostile completions cost no more."""
import math
import re
import string
import unicodedata
from collections.abc import Callable
from typing import NamedTuple

from rewards.assignment import heaviest_pairing
from rewards.tags import TAGS, tag_fault

WEIGHTS = {"format": 0.2, "answer": 1.0}
LONGEST = 1000  # characters that a pattern of the file's is matched with
MOST_BOXES = 100


class Verifier(NamedTuple):
    """read: (answer's text, sample) → what is compared, hashable, or None; score: (what is read, gold, sample) → 0
    to 1, right from ½ on; gold: (value of the file, sample) → what it is compared with, None where it is of no use,
    without a function as an answer is read; expected: what is of use."""

    read: Callable
    score: Callable
    gold: Callable | None = None
    expected: str = "a text"


def marked(text: str) -> str | None:
    """What stands in the last `<answer></answer>`, else in the last `\\boxed{}`; None where there is neither."""
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    return text[start + len("<answer>"):end] if start >= 0 else boxed(text)


def boxed(text: str) -> str | None:
    """What stands in the last `\\boxed{}`, braces within it and all; None where it is not closed."""
    _, found, rest = text.rpartition("\\boxed{")
    open_braces, at = 1, 0
    while found and at < len(rest):
        open_braces += {"{": 1, "}": -1}.get(rest[at], 0)
        if not open_braces:
            return rest[:at]
        at += 2 if rest[at] == "\\" else 1
    return None


def answer_text(completion: str, sample) -> str | None:
    found = marked(completion)
    return completion.rpartition("</think>")[2] if found is None and sample.whole_answer else found


def read_exact(text: str, sample=None) -> str | None:
    """Letter by letter, but for white space around it."""
    return text.strip() or None


def read_text(text: str, sample=None) -> str | None:
    """Without case, punctuation and the amount of white space. A text of punctuation alone stays as it is."""
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return " ".join("".join(c for c in text if unicodedata.category(c)[0] != "P").split()) or text or None


def equal(found, gold, sample) -> float:
    return float(found == gold)


DECIMAL = r"(?:(?:\d{1,3}(?:,\d{3}){1,8}(?!,?\d)|\d{1,40}(?!\d))(?:\.\d{1,40})?|\.\d{1,40})"
NUMBER = re.compile(rf"(?<![\w.])([-+]?)(?:(?:(\d{{1,40}}) )?({DECIMAL}) ?/ ?({DECIMAL})"
                    rf"|({DECIMAL}(?:e[-+]?\d{{1,40}}(?!\d))?))(?: ?(%|percent))?", re.IGNORECASE | re.ASCII)
FRACTION = re.compile(r"(\d?)\\[dt]?frac ?\{([^{}\\]{1,40})\} ?\{([^{}\\]{1,40})\}")
SPELLED = {r"\%": "%", r"\$": "", "{,}": ",", r"\,": "", r"\!": "", "−": "-", "–": "-", "\u00a0": " ", "\u202f": " ",
           "$": "", "€": "", "£": "", "¥": ""}


def read_number(text: str, sample=None, whole: bool = False) -> tuple[float, bool] | None:
    """(value as it is written, whether it is percent) of the last number that stands in it, or of all of it: 1,200 and
    $1200.0, 3/4 and \\frac{3}{4}, 2 1/2, 1.2e3; no decimal comma."""
    for spelled, plain in SPELLED.items():
        text = text.replace(spelled, plain)
    text, last = FRACTION.sub(lambda found: f"{found[1] and found[1] + ' '}{found[2]}/{found[3]}", text), None
    for last in [NUMBER.fullmatch(text.strip())] if whole else NUMBER.finditer(text):
        pass
    if last is None:
        return None
    sign, units, *parts, percent = last.groups()
    over, under, decimal = (digits and float(digits.replace(",", "")) for digits in parts)
    if under == 0:
        return None
    value = (over / under + float(units or 0) if decimal is None else decimal) * (-1 if sign == "-" else 1)
    return (value, bool(percent)) if math.isfinite(value) else None


def near(found: tuple[float, bool], gold: tuple[float, bool], sample) -> float:
    """Within --tolerance, a share of the right value. Where one of the two has a percent sign, 50% is 50 and 0.5."""
    (value, percent), (right, right_percent) = found, gold
    values = [value] if percent == right_percent else [value, value / 100 if percent else value * 100]
    return float(any(abs(one - right) <= sample.tolerance * abs(right) + 1e-12 for one in values))


LETTER = re.compile(r"(?<![\w'])\(?([A-Z])\)?(?![\w'])")


def read_choice(text: str, sample) -> int | None:
    """Which choice: by its text, or its letter where exactly one choice's stands alone ("B", "(B) Rome", "it's B.")."""
    normal, said = [read_text(choice) for choice in sample.choices], read_text(text)
    if said in normal:
        return normal.index(said)
    letters = set(LETTER.findall(said.upper() if len(said or "") == 1 else text))
    found = [i for i in range(len(normal)) if string.ascii_uppercase[i] in letters]
    return found[0] if len(found) == 1 else None


def gold_choice(value, sample) -> int | None:
    index = value if type(value) is int and str(value) not in sample.choices else read_choice(str(value), sample)
    return index if index in range(len(sample.choices)) else None


EDGE = r"(-?\d{1,6}(?:\.\d{1,6})?)"
BOX = re.compile(rf"[\[(] ?{EDGE} ?, ?{EDGE} ?, ?{EDGE} ?, ?{EDGE} ?[\])]", re.ASCII)


def read_boxes(text: str, sample=None) -> tuple | None:
    """All [x1, y1, x2, y2] in it that have an area; more than MOST_BOXES are no answer."""
    edges = [tuple(map(float, box)) for box in BOX.findall(" ".join(text.split()))]
    boxes = tuple(box for box in edges if box[0] < box[2] and box[1] < box[3])
    return boxes if 0 < len(boxes) <= MOST_BOXES else None


def gold_boxes(value, sample) -> tuple | None:
    """[x1, y1, x2, y2], or a list of them, in pixels of the file's image → pixels of the image as the model sees it."""
    boxes = value if isinstance(value, list) and value and isinstance(value[0], list) else [value]
    if len(sample.sizes) != 1:
        return None
    (width, height), (seen_width, seen_height) = sample.sizes[0], sample.seen_sizes[0]
    for box in boxes:
        good = isinstance(box, list) and len(box) == 4 and all(type(edge) in (int, float) for edge in box)
        if not (good and 0 <= box[0] < box[2] <= width and 0 <= box[1] < box[3] <= height):
            return None
    across, down = seen_width / width, seen_height / height
    return tuple((x1 * across, y1 * down, x2 * across, y2 * down) for x1, y1, x2, y2 in boxes)


def overlap(found: tuple, gold: tuple, sample=None) -> float:
    """Mean IoU of the best one-to-one pairing; a box too many counts as one missed."""
    pairs = [[round(1e6 * iou(one, other)) for other in gold] for one in found]
    return heaviest_pairing(pairs) / 1e6 / max(len(found), len(gold))


def iou(one: tuple, other: tuple) -> float:
    """Intersection over union of two (x1, y1, x2, y2)."""
    width, height = (min(one[i + 2], other[i + 2]) - max(one[i], other[i]) for i in (0, 1))
    both = max(width, 0) * max(height, 0)
    return both / (sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)) - both)


def gold_pattern(value, sample=None) -> re.Pattern | None:
    try:
        return re.compile(str(value))
    except (re.error, RecursionError, OverflowError):
        return None


def matches(found: str, gold: re.Pattern, sample=None) -> float:
    """The whole answer; one of more than LONGEST characters is wrong, unread."""
    return float(len(found) <= LONGEST and gold.fullmatch(found) is not None)


VERIFIERS = {"exact": Verifier(read_exact, equal), "text": Verifier(read_text, equal),
    # of the file's text the whole must be one number: of the last of several nobody knows that it is meant
    "number": Verifier(read_number, near, lambda value, sample: read_number(str(value), whole=True), "a number"),
    "choice": Verifier(read_choice, equal, gold_choice, "one of the line's choices by letter, text or number from 0"),
    "boxes": Verifier(read_boxes, overlap, gold_boxes,
                      "[x1, y1, x2, y2] within the line's one image, or a list of such"),
    "regex": Verifier(read_exact, matches, gold_pattern, "a regular expression")}


def own_verifier(function: Callable) -> Verifier:
    """A function (answer's text, sample) → a number from 0 to 1, or whether it is right."""
    return Verifier(read_exact, lambda found, gold, sample: float(function(found, sample)), lambda value, sample: value)


def suitable(sample, values: list) -> Verifier:
    """--verifier auto: choice where there are choices, number where the answer is one, else text."""
    numbers = all(read_number(str(value), whole=True) for value in values)
    return VERIFIERS["choice" if sample.choices else "number" if numbers else "text"]


def vote_key(completion: str, sample):
    """What the verifier reads in the answer, None where it reads nothing."""
    text = answer_text(completion, sample)
    return None if text is None else sample.verifier.read(text, sample)


def parse(completion: str, sample) -> str | None:
    """The answer's text, None where the verifier reads nothing in it."""
    return None if vote_key(completion, sample) is None else answer_text(completion, sample).strip()


def score(completion: str, sample) -> float:
    """0 to 1, by whichever of the file's answers it comes closest to."""
    found = vote_key(completion, sample)
    return 0.0 if found is None else max(sample.verifier.score(found, gold, sample) for gold in sample.golds)


def fault(completion: str, sample) -> str | None:
    """What is wrong with the form that was asked for, None where nothing is: `<think>…</think>` with --reasoning, then
    `<answer>…</answer>` and nothing else, unless the question asks for a form of its own or needs none."""
    tags = TAGS[:2] * sample.reasoning + TAGS[2:] * sample.asks_for_tags
    unread = "no answer that can be read" if vote_key(completion, sample) is None else None
    return (tags and tag_fault(completion, tags)) or unread


def reward(completion: str, sample) -> dict[str, float]:
    """format: 1 where the form is as asked for; answer: the verifier's score."""
    return {"format": float(fault(completion, sample) is None), "answer": score(completion, sample)}


def correct(completion: str, sample) -> bool:
    return score(completion, sample) >= 0.5


def metrics(completions: list[str], samples: list) -> dict[str, float]:
    """Shares from 0 to 1: accuracy, unparsable, and accuracy/NAME of each category."""
    pairs = list(zip(completions, samples, strict=True))
    groups = {"accuracy": pairs, "unparsable": pairs}
    for name in sorted({sample.category for sample in samples} - {""}):
        groups[f"accuracy/{name}"] = [pair for pair in pairs if pair[1].category == name]
    counts = lambda name, pair: vote_key(*pair) is None if name == "unparsable" else correct(*pair)
    return {name: sum(counts(name, pair) for pair in group) / len(group) for name, group in groups.items()}
