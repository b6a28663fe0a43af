"""Is an answer right? Verifiers for questions from a file, the reward and the metrics of `--task jsonl`.

The answer is what stands in the last `<answer></answer>`, else in the last `\\boxed{}`, else, with --whole_answer, the
whole text behind `</think>`. A verifier reads it, None where it is none of its kind, and compares what it has read with
what it has read from the file. Everything is read from left to right a fixed number of times: a hostile completion
costs no more than its length."""
import math
import re
import string
import unicodedata
from collections.abc import Callable
from typing import NamedTuple

from rewards.assignment import heaviest_pairing

WEIGHTS = {"format": 0.2, "answer": 1.0}
LONGEST = 1000  # characters that a pattern of the file's is matched with
MOST_BOXES = 100

# ── where the answer stands ──────────────────────────────────────────────────────────────────────────────────────


def marked(text: str) -> str | None:
    """What stands in the last `<answer></answer>`, else in the last `\\boxed{}`; None where there is neither."""
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    return text[start + len("<answer>"):end] if start >= 0 else boxed(text)


def boxed(text: str) -> str | None:
    """What stands in the last `\\boxed{}`, braces within it and all; None where it is not closed."""
    start = text.rfind("\\boxed{")
    open_braces, at = 0, start + len("\\boxed")
    while 0 <= start and at < len(text):
        open_braces += {"{": 1, "}": -1}.get(text[at], 0)
        if not open_braces:
            return text[start + len("\\boxed{"):at]
        at += 2 if text[at] == "\\" else 1
    return None


def answer_text(completion: str, sample) -> str | None:
    found = marked(completion)
    return completion.rpartition("</think>")[2] if found is None and sample.rules.whole_answer else found


# ── text ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def read_exact(text: str, sample) -> str | None:
    """Letter by letter, but for white space around it."""
    return text.strip() or None


def read_text(text: str, sample=None) -> str | None:
    """Without case, punctuation and the amount of white space. A text of punctuation alone stays as it is."""
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    words = "".join(c for c in text if not unicodedata.category(c).startswith("P"))
    return " ".join(words.split()) or text or None


def equal(found, gold, sample) -> float:
    return float(found == gold)


# ── numbers ──────────────────────────────────────────────────────────────────────────────────────────────────────


class Number(NamedTuple):
    value: float  # as it is written: 50 of 50%
    percent: bool


# bounded: linear in the text
DECIMAL = r"(?:(?:\d{1,3}(?:,\d{3}){1,8}(?!,?\d)|\d{1,40}(?!\d))(?:\.\d{1,40})?|\.\d{1,40})"
NUMBER = re.compile(rf"(?<![\w.])([-+]?)(?:(?:(\d{{1,40}}) )?({DECIMAL}) ?/ "
                    rf"?({DECIMAL})|({DECIMAL}(?:e[-+]?\d{{1,40}}(?!\d))?))"
                    r"(?: ?(%|percent))?", re.IGNORECASE | re.ASCII)
FRACTION = re.compile(r"\\[dt]?frac ?\{([^{}\\]{1,40})\} ?\{([^{}\\]{1,40})\}")
SPELLED = str.maketrans({"−": "-", "–": "-", "\u00a0": " ", "\u202f": " ", **dict.fromkeys("$€£¥", "")})
LATEX = {"\\%": "%", "\\$": "", "{,}": ",", "\\,": "", "\\!": ""}


def plain_number(text: str) -> str:
    """Without currency and LaTeX: `\\$1{,}200` is 1,200, `2\\frac{1}{2}` is 2 1/2."""
    for mark, plain in LATEX.items():
        text = text.replace(mark, plain)
    text = re.sub(r"(?<=\d)(?=\\[dt]?frac)", " ", text.translate(SPELLED))
    return FRACTION.sub(r"\1/\2", text)


def number_of(found: re.Match | None) -> Number | None:
    """None for a division by zero and for what no float holds."""
    if found is None:
        return None
    sign, whole, over, under, decimal, percent = found.groups()
    plain = lambda digits: float(digits.replace(",", ""))
    if decimal is None and not plain(under):
        return None
    value = plain(decimal) if decimal else plain(over) / plain(under) + plain(whole or "0")
    return Number(-value if sign == "-" else value, bool(percent)) if math.isfinite(value) else None


def read_number(text: str, sample=None) -> Number | None:
    """The last number that stands in it: 1,200 and 1200.0, 3/4 and 0.75 and 75%, 1.2e3; no decimal comma."""
    return number_of(max(NUMBER.finditer(plain_number(text)), key=re.Match.start, default=None))


def gold_number(value, sample) -> Number:
    """The whole text must be one number: of the last of several nobody knows that it is meant."""
    if (number := number_of(NUMBER.fullmatch(plain_number(str(value)).strip()))) is None:
        raise ValueError("a number expected")
    return number


def near(found: Number, gold: Number, sample) -> float:
    """Within --tolerance, a share of the right value. Where one of the two has a percent sign, 50% is 50 and 0.5."""
    values = [found.value]
    if found.percent != gold.percent:
        values.append(found.value / 100 if found.percent else found.value * 100)
    return float(any(abs(value - gold.value) <= sample.rules.tolerance * abs(gold.value) + 1e-12 for value in values))


# ── choices ──────────────────────────────────────────────────────────────────────────────────────────────────────

LETTER = re.compile(r"(?<![\w'])\(?([A-Z])\)?(?![\w'])")


def read_choice(text: str, sample) -> int | None:
    """Which choice: by its text, or by its letter where exactly one letter of a choice stands alone ("B", "(B) Paris",
    "the answer is B."). None where text and letter name two choices."""
    normal = [read_text(choice) for choice in sample.choices]
    if (said := read_text(text)) in normal:
        return normal.index(said)
    if len(said or "") == 1 and said.isascii():
        text = said.upper()
    letters = {string.ascii_uppercase.index(letter) for letter in LETTER.findall(text)}
    found = [index for index in letters if index < len(sample.choices)]
    return found[0] if len(found) == 1 else None


def gold_choice(value, sample) -> int:
    """A letter, a text, or a whole number that counts from 0."""
    index = value if type(value) is int and str(value) not in sample.choices else read_choice(str(value), sample)
    if not sample.choices or index is None or not 0 <= index < len(sample.choices):
        raise ValueError("a choice's letter, text or number from 0 expected" if sample.choices else "no choices in "
            "the line")
    return index


# ── boxes ────────────────────────────────────────────────────────────────────────────────────────────────────────

EDGE = r"(-?\d{1,6}(?:\.\d{1,6})?)"
BOX = re.compile(rf"[\[(] ?{EDGE} ?, ?{EDGE} ?, ?{EDGE} ?, ?{EDGE} ?[\])]", re.ASCII)


def read_boxes(text: str, sample=None) -> tuple | None:
    """All [x1, y1, x2, y2] in it that have an area; more than MOST_BOXES are no answer."""
    edges = [tuple(map(float, box)) for box in BOX.findall(" ".join(text.split()))]
    boxes = tuple(box for box in edges if box[0] < box[2] and box[1] < box[3])
    return boxes if 0 < len(boxes) <= MOST_BOXES else None


def gold_boxes(value, sample) -> tuple:
    """[x1, y1, x2, y2], or a list of them, in pixels of the file's image → pixels of the image as the model sees it."""
    boxes = value if isinstance(value, list) and value and isinstance(value[0], list) else [value]
    if len(sample.sizes) != 1:
        raise ValueError(f"boxes are those of one image; the line has {len(sample.sizes)}")
    (width, height), (seen_width, seen_height) = sample.sizes[0], sample.seen_sizes[0]
    for box in boxes:
        numbers = isinstance(box, list) and len(box) == 4 and all(type(edge) in (int, float) for edge in box)
        if not numbers or not (0 <= box[0] < box[2] <= width and 0 <= box[1] < box[3] <= height):
            raise ValueError(f"[x1, y1, x2, y2] within the image's {width} × {height} pixels expected, or a list of "
                             "such")
    across, down = seen_width / width, seen_height / height
    return tuple((x1 * across, y1 * down, x2 * across, y2 * down) for x1, y1, x2, y2 in boxes)


def overlap(found: tuple, gold: tuple, sample=None) -> float:
    """Mean IoU of the best one-to-one pairing; a box too many counts as one missed."""
    pairs = [[round(1e6 * iou(one, other)) for other in gold] for one in found]
    return heaviest_pairing(pairs) / 1e6 / max(len(found), len(gold))


def iou(one: tuple, other: tuple) -> float:
    """Intersection over union of two (x1, y1, x2, y2)."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    both, area = max(width, 0) * max(height, 0), lambda box: (box[2] - box[0]) * (box[3] - box[1])
    return both / (area(one) + area(other) - both)


# ── verifiers ────────────────────────────────────────────────────────────────────────────────────────────────────


class Verifier(NamedTuple):
    """read: (answer's text, sample) → what is compared, hashable, or None; gold: (value of the file, sample) → what
    it is compared with, ValueError where it is of no use; score: (read, gold, sample) → 0 to 1, right from ½ on."""

    read: Callable
    score: Callable
    gold: Callable


def gold_text(read: Callable) -> Callable:
    def gold(value, sample):
        if (found := read(str(value), sample)) is None:
            raise ValueError("a text expected")
        return found
    return gold


def gold_pattern(value, sample) -> re.Pattern:
    try:
        return re.compile(str(value))
    except (re.error, RecursionError, OverflowError) as problem:
        raise ValueError(f"no regular expression ({problem})") from None


def matches(found: str, gold: re.Pattern, sample=None) -> float:
    """The whole answer; one of more than LONGEST characters is wrong, unread."""
    return float(len(found) <= LONGEST and gold.fullmatch(found) is not None)


VERIFIERS = {"exact": Verifier(read_exact, equal, gold_text(read_exact)),
    "text": Verifier(read_text, equal, gold_text(read_text)), "number": Verifier(read_number, near, gold_number),
    "choice": Verifier(read_choice, equal, gold_choice), "boxes": Verifier(read_boxes, overlap, gold_boxes),
    "regex": Verifier(read_exact, matches, gold_pattern)}


def own_verifier(function: Callable) -> Verifier:
    """A function (answer's text, sample) → a number from 0 to 1, or whether it is right."""
    return Verifier(read_exact, lambda found, gold, sample: float(function(found, sample)), lambda value, sample: value)


def suitable(sample, values: list) -> Verifier:
    """--verifier auto: choice where there are choices, number where the answer is one, else text."""
    try:
        return VERIFIERS["choice"] if sample.choices else [gold_number(v, sample)
            for v in values] and VERIFIERS["number"]
    except ValueError:
        return VERIFIERS["text"]


# ── reward and metrics ───────────────────────────────────────────────────────────────────────────────────────────


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
    text = completion.strip()
    for tag in ("<think>", "</think>") * sample.rules.reasoning + ("<answer>", "</answer>") * sample.asks_for_tags:
        if text.count(tag) != 1:
            return f"{tag} missing" if tag not in text else f"{tag} more than once"
    if sample.rules.reasoning:
        before, _, rest = text.partition("<think>")
        _, closed, text = rest.partition("</think>")
        if before or not closed:
            return "text before <think>, or tags out of order"
        text = text.strip()
    if sample.asks_for_tags and not (text.startswith("<answer>") and text.endswith("</answer>")):
        return "text outside the tags"
    return None if vote_key(completion, sample) is not None else "no answer that can be read"


def reward(completion: str, sample) -> dict[str, float]:
    """format: 1 where the form is as asked for; answer: the verifier's score."""
    return {"format": float(fault(completion, sample) is None), "answer": score(completion, sample)}


def correct(completion: str, sample) -> bool:
    return score(completion, sample) >= 0.5


def metrics(completions: list[str], samples: list) -> dict[str, float]:
    """Shares from 0 to 1: accuracy, unparsable, and accuracy/NAME of each category."""
    if len(completions) != len(samples):
        raise ValueError(f"{len(completions)} completions for {len(samples)} samples; one each expected")
    right = [correct(completion, sample) for completion, sample in zip(completions, samples)]
    unread = sum(vote_key(completion, sample) is None for completion, sample in zip(completions, samples))
    found = {"accuracy": sum(right) / len(right), "unparsable": unread / len(right)}
    for name in sorted({sample.category for sample in samples} - {""}):
        of_it = [one for one, sample in zip(right, samples) if sample.category == name]
        found[f"accuracy/{name}"] = sum(of_it) / len(of_it)
    return found
