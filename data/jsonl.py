"""Questions and answers from a file, for any model and without code.

    --task jsonl --data FILE.jsonl     --split and --valid_split are parts of it: train, valid, test, or all
    --task jsonl --data FOLDER         which holds train.jsonl, valid.jsonl, test.jsonl, or as a split is called

A line is a JSON object:
    prompt, question or problem   what is asked: the first of them that there is
    answer or solution            what is right: a text, a number, several that are all right, boxes; of a longer
    text what
                                  stands in <answer></answer>, in the last \\boxed{}, or behind GSM8K's ####
    images or image               paths, relative to the file, of what stands before the question
    choices                       texts to choose from, listed as A. B. C. where the question does not name them all
    id, system, category          a name of its own, the system turn, what accuracy is also counted by
Whatever else it holds is in the sample's `fields`, for a verifier or a reward of one's own.
"""
import json
import string
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

from data.images import check_image, grey_image, open_image
from data.read import read_json_lines, shown
from data.task import load_module
from rewards.jsonl import VERIFIERS, Verifier, correct, marked, own_verifier, suitable

QUESTIONS, ANSWERS = ("prompt", "question", "problem"), ("answer", "solution")
PARTS = ("test", "valid", "train")  # of one file: a tenth, a tenth, the rest


class Rules(NamedTuple):
    """What holds for all samples of a run: settings of the same names."""

    reasoning: bool
    tolerance: float
    whole_answer: bool
    upright: bool = False


@dataclass(eq=False)
class Sample:
    """One line. sizes and seen_sizes: (width, height) of each image in the file, and as the model sees it."""

    id: str
    text: str
    images: list
    answer: object
    system: str
    choices: list[str]
    category: str
    fields: dict
    rules: Rules
    sizes: list[tuple[int, int]] = field(default_factory=list)
    seen_sizes: list[tuple[int, int]] = field(default_factory=list)
    verifier: Verifier | None = None
    golds: list = field(default_factory=list)

    @property
    def asks_for_tags(self) -> bool:
        """Whether the prompt ends with our wish for <answer></answer>; a question may have a form of its own."""
        return not self.rules.whole_answer and "<answer>" not in self.text and "\\boxed" not in self.text


# ── the file ─────────────────────────────────────────────────────────────────────────────────────────────────────


def load(data, split: str, *, missing_images: str = "stop", reasoning: bool = True, verifier: str = "auto",
         tolerance: float = 1e-6, whole_answer: bool = False, exif_orientation: bool = True, split_seed: int = 0,
         seen_size: Callable | None = None):
    """The samples of a split, every line checked: the first that is of no use is a ValueError with file and line.

    seen_size: (width, height) of an image → as the model sees it, ValueError from a model that sees nothing.
    """
    path, one_file = Path(data), Path(data).is_file()
    if not one_file:
        path = path / f"{split}.jsonl"
    if not path.is_file():
        there = ", ".join(sorted(p.name for p in Path(data).glob("*.jsonl"))) or "no .jsonl file"
        raise FileNotFoundError(f"{path} is missing; {data} holds {there}")
    lines = read_lines(path)
    refuse_equal_ids(lines)
    rules, chosen = Rules(reasoning, tolerance, whole_answer, exif_orientation), find_verifier(verifier)
    samples = []
    for where, entry in part_of(lines, split, split_seed, path) if one_file else lines:
        try:
            sample = make_sample(entry, where, path.parent, rules, missing_images)
            if sample is not None:
                measure(sample, where, seen_size)
                judge(sample, chosen)
                samples.append(sample)
        except ValueError as problem:
            raise ValueError(f"{where}: {problem}" if where not in str(problem) else str(problem)) from None
        except OSError as problem:  # a missing image's own, or one whose name no file system takes
            raise type(problem)(str(problem) if where in str(problem) else f"{where}: {shown(str(problem))}") from None
    return samples


def read_lines(path: Path) -> list[tuple[str, dict]]:
    """("file:line", object, with an id) of every line that is not blank."""
    return [(where, {"id": f"{path.stem}/{where.rpartition(':')[2]}", **entry})
            for where, entry in read_json_lines(path, "a JSON object", blank_lines=True)]


def refuse_equal_ids(lines: list[tuple[str, dict]]) -> None:
    places = {}
    for where, entry in lines:
        if type(entry["id"]) not in (str, int):
            raise ValueError(f"{where}: id is {shown(entry['id'])}; a text or a whole number expected")
        if (before := places.setdefault(str(entry["id"]), where)) != where:
            raise ValueError(f"{where}: id {shown(entry['id'])} is that of {before} too; one of its own expected")


def part_of(lines: list, split: str, seed: int, path: Path) -> list:
    """The lines of a part, by a hash of what is asked: equal questions are in one part, and a line that is added moves
    hardly any other."""
    if split == "all":
        return lines
    if split not in PARTS:
        raise ValueError(f"split is {split!r}; of a single file {', '.join(PARTS)} or all expected")
    asked = lambda entry: json.dumps([entry.get(name) for name in (*QUESTIONS, "images", "image")])
    ranks = [blake2b(f"{seed}/{asked(entry)}".encode(), digest_size=8).hexdigest() for _, entry in lines]
    order = sorted(set(ranks))
    if len(order) < len(PARTS):
        raise ValueError(f"{path}: {len(order)} different questions cannot be parted in three; --split all, or more "
                         "of them")
    tenth = max(1, round(len(order) / 10))
    part = dict(zip(order, ["test"] * tenth + ["valid"] * tenth + ["train"] * len(order)))
    return [line for line, rank in zip(lines, ranks) if part[rank] == split]


# ── a line ───────────────────────────────────────────────────────────────────────────────────────────────────────


def make_sample(entry: dict, where: str, folder: Path, rules: Rules, missing_images: str) -> Sample | None:
    """None for one whose image is missing, where such are dropped."""
    rest = dict(entry)
    take = lambda names: next((rest.pop(name) for name in names if rest.get(name) not in (None, "")), None)
    text, answer, images = take(QUESTIONS), take(ANSWERS), take(("images", "image")) or []
    if not isinstance(text, str):
        raise ValueError(f"{' or '.join(QUESTIONS)} is {shown(text)}; a text expected")
    if answer is None or isinstance(answer, (dict, bool)) or answer == []:
        raise ValueError(f"{' or '.join(ANSWERS)} is {shown(answer)}; a text, a number or a list expected")
    choices, system, category = take(("choices",)) or [], take(("system",)) or "", take(("category",))
    images = [images] if isinstance(images, str) else images
    for name, value in (("images", images), ("choices", choices)):
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            raise ValueError(f"{name} is {shown(value)}; a list of texts expected")
    if len(set(choices)) < len(choices) or len(choices) > len(string.ascii_uppercase):
        raise ValueError(f"choices are {shown(choices)}; at most 26 different texts expected")
    if not isinstance(system, str):
        raise ValueError(f"system is {shown(system)}; a text expected")
    paths = [folder / image for image in images]
    if missing_images != "stop" and not all(path.is_file() for path in paths):
        if missing_images == "drop":
            return None
        paths = [path if path.is_file() else None for path in paths]
    return Sample(str(rest.pop("id")), text, paths, answer, system, choices, "" if category is None else str(category),
        rest,
                  rules)


def measure(sample: Sample, where: str, seen_size: Callable | None) -> None:
    """Its images' sizes, from their headers alone."""
    upright = sample.rules.upright
    sample.sizes = [grey_image().size if path is None else check_image(path, where, upright) for path in sample.images]
    sample.seen_sizes = [seen_size(*size) if seen_size else size for size in sample.sizes]


def judge(sample: Sample, verifier: Verifier | None) -> None:
    """What its answers are compared by, and with. ValueError for an answer that the verifier cannot use."""
    several = isinstance(sample.answer, list) and verifier is not VERIFIERS["boxes"]
    values = [without_marks(value) for value in (sample.answer if several else [sample.answer])]
    sample.verifier = verifier or suitable(sample, values)
    try:
        sample.golds = [sample.verifier.gold(value, sample) for value in values]
    except ValueError as problem:
        raise ValueError(f"answer is {shown(sample.answer)}; {problem}") from None
    # what these are given is an answer too
    itself = [VERIFIERS[name] for name in ("exact", "text", "number", "choice")]
    if sample.verifier in itself and not correct(target(sample), sample):
        raise ValueError(f"answer is {shown(sample.answer)}; one that is right when it is given as an answer expected")


def without_marks(value):
    """Of a worked solution its answer."""
    if not isinstance(value, str):
        return value
    found = marked(value)
    return (value.rpartition("####")[2] if found is None else found).strip()


def find_verifier(name: str) -> Verifier | None:
    """One of VERIFIERS by its name, or a function of a module's or file's: my.module:function. None for auto."""
    if name == "auto":
        return None
    if ":" not in name:
        if name not in VERIFIERS:
            raise ValueError(f"--verifier {name}: auto, {', '.join(VERIFIERS)} or my.module:function expected")
        return VERIFIERS[name]
    module, _, function = name.rpartition(":")
    found = getattr(load_module(module, "--verifier"), function, None)
    if not callable(found):
        raise ValueError(f"--verifier {name}: {module} has no function {function}(answer, sample)")
    return own_verifier(found)


# ── what a task offers ───────────────────────────────────────────────────────────────────────────────────────────


def build_prompt(sample: Sample, *, reasoning: bool = True) -> tuple[list, str]:
    """(images, text): the question, choices that it does not name, the form of the answer if it does not say that."""
    text = [sample.text]
    if not all(choice in sample.text for choice in sample.choices):
        text += [f"{letter}. {choice}" for letter, choice in zip(string.ascii_uppercase, sample.choices)]
    if sample.verifier is VERIFIERS["boxes"]:
        text.append("Boxes are [x1, y1, x2, y2] in pixels; the image is {} × {}.".format(*sample.seen_sizes[0]))
    wishes = ["think in <think></think>"] * reasoning + ["write the answer in <answer></answer>"] * sample.asks_for_tags
    if wishes:
        text.append(("First " * reasoning + ", then ".join(wishes)).capitalize() + ".")
    images = [grey_image() if path is None else open_image(path, sample.rules.upright) for path in sample.images]
    return images, "\n".join(text)


def target(sample: Sample) -> str:
    """The gold answer in the form of an answer; boxes as the model sees them."""
    boxes = sample.verifier is VERIFIERS["boxes"]
    answer = [[round(edge) for edge in box] for box in sample.golds[0]] if boxes else sample.answer
    if isinstance(answer, list) and not boxes:
        answer = answer[0]
    if sample.verifier is VERIFIERS["choice"] and isinstance(answer, int):
        answer = sample.choices[sample.golds[0]]
    answer = json.dumps(answer) if boxes else str(without_marks(answer))
    return answer if sample.rules.whole_answer else f"<answer>{answer}</answer>"


def stratum(sample: Sample) -> str:
    """What a cold start draws its share of."""
    return sample.category


def is_none(sample: Sample) -> bool:
    """No question here has "nothing there" for an answer."""
    return False


def sample_from(text: str, image: str = "") -> Sample:
    """For grpo.predict: a question, perhaps with an image, whose answer nobody has written down."""
    images = [Path(image)] if image else []
    return Sample("this question", text, images, "", "", [], "", {}, Rules(True, 0.0, False),
        verifier=VERIFIERS["exact"])
