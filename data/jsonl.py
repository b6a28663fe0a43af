"""Questions and answers from a file, for any model and without code.

    --task jsonl --data FILE.jsonl     --split and --valid_split are parts of it: train, valid, test, or all
    --task jsonl --data FOLDER         which holds train.jsonl, valid.jsonl, test.jsonl, or as a split is called

A line is a JSON object. What its fields mean stands in docs/your-own-task.md; those that mean nothing here are in the
sample's `fields`, for a verifier or a reward of one's own."""
import json
import string
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

from data.images import check_image, grey_image, open_image
from data.read import read_json_lines, shown
from data.task import load_module
from rewards.jsonl import VERIFIERS, Verifier, correct, marked, own_verifier, suitable

QUESTIONS, ANSWERS = ("prompt", "question", "problem"), ("answer", "solution")
PARTS = ("test", "valid", "train")  # of one file: a tenth, a tenth, the rest


@dataclass(eq=False)
class Sample:
    """One line. Of its images, in the file and as the model sees them: (width, height). The last four: settings,
    and the verifier with what it compares answers with."""

    id: str
    text: str
    images: list
    answer: object
    system: str = ""
    choices: list[str] = field(default_factory=list)
    category: str = ""
    fields: dict = field(default_factory=dict)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    seen_sizes: list[tuple[int, int]] = field(default_factory=list)
    reasoning: bool = True
    tolerance: float = 1e-6
    whole_answer: bool = False
    upright: bool = True
    verifier: Verifier = VERIFIERS["exact"]
    golds: list = field(default_factory=list)

    @property
    def asks_for_tags(self) -> bool:
        """Whether the prompt ends with our wish for <answer></answer>; a question may have a form of its own."""
        return not self.whole_answer and "<answer>" not in self.text and "\\boxed" not in self.text


def load(data, split: str, *, missing_images: str = "stop", verifier: str = "auto", split_seed: int = 0,
         reasoning: bool = True, tolerance: float = 1e-6, whole_answer: bool = False, exif_orientation: bool = True,
         seen_size: Callable | None = None):
    """The samples of a split, every line checked: the first that is of no use is a ValueError with file and line.

    seen_size: (width, height) of an image → as the model sees it, ValueError from a model that sees nothing."""
    path = Path(data) if Path(data).is_file() else Path(data) / f"{split}.jsonl"
    if not path.is_file():
        there = ", ".join(sorted(other.name for other in path.parent.glob("*.jsonl"))) or "no .jsonl file"
        raise FileNotFoundError(f"{path} is missing; {data} holds {there}")
    lines = read_lines(path)
    options = dict(reasoning=reasoning, tolerance=tolerance, whole_answer=whole_answer, upright=exif_orientation)
    chosen, samples = find_verifier(verifier), []
    for where, entry in part_of(lines, split, split_seed, path) if path == Path(data) else lines:
        try:
            sample = make_sample(entry, path.parent, options)
            if settle_images(sample, where, missing_images, seen_size):
                choose_golds(sample, chosen)
                samples.append(sample)
        except ValueError as problem:
            raise ValueError(f"{where}: {str(problem).removeprefix(f'{where}: ')}") from None
        except OSError as problem:  # a missing image's own, or one whose name no file system takes
            raise type(problem)(str(problem) if where in str(problem) else f"{where}: {shown(str(problem))}") from None
    return samples


def read_lines(path: Path) -> list[tuple[str, dict]]:
    """("file:line", object, with an id that no other has) of every line that is not blank."""
    lines, places = [], {}
    for where, entry in read_json_lines(path, "a JSON object", blank_lines=True):
        entry = {"id": f"{path.stem}/{where.rpartition(':')[2]}", **entry}
        if type(entry["id"]) not in (str, int):
            raise ValueError(f"{where}: id is {shown(entry['id'])}; a text or a whole number expected")
        if (before := places.setdefault(str(entry["id"]), where)) != where:
            raise ValueError(f"{where}: id {shown(entry['id'])} is that of {before} too; one of its own expected")
        lines.append((where, entry))
    return lines


def part_of(lines: list, split: str, seed: int, path: Path) -> list:
    """The lines of a part, by a hash of what is asked: equal questions are in one part, a new line moves few others."""
    if split == "all":
        return lines
    if split not in PARTS:
        raise ValueError(f"split is {split!r}; of a single file {', '.join(PARTS)} or all expected")
    asked = lambda entry: json.dumps([entry.get(name) for name in (*QUESTIONS, "images", "image")])
    ranks = [blake2b(f"{seed}/{asked(entry)}".encode(), digest_size=8).hexdigest() for _, entry in lines]
    order = sorted(set(ranks))
    if len(order) < len(PARTS):
        raise ValueError(f"{path}: {len(order)} different questions cannot be parted in three; --split all, or more")
    tenth = max(1, round(len(order) / 10))
    part = dict(zip(order, ["test"] * tenth + ["valid"] * tenth + ["train"] * len(order)))
    return [line for line, rank in zip(lines, ranks) if part[rank] == split]


def make_sample(entry: dict, folder: Path, options: dict) -> Sample:
    rest = dict(entry)
    take = lambda *names: next((rest.pop(name) for name in names if rest.get(name) not in (None, "")), None)
    text, answer, system, category = take(*QUESTIONS), take(*ANSWERS), take("system") or "", take("category")
    images, choices = take("images", "image") or [], take("choices") or []
    images = [images] if isinstance(images, str) else images
    texts = lambda value: isinstance(value, list) and all(isinstance(one, str) for one in value)
    for name, value, good, expected in ((" or ".join(QUESTIONS), text, isinstance(text, str), "a text"),
            ("system", system, isinstance(system, str), "a text"),
            (" or ".join(ANSWERS), answer, not isinstance(answer, (dict, bool)) and (answer or answer == 0),
             "a text, a number or a list"), ("images", images, texts(images), "a list of texts"),
            ("choices", choices, texts(choices) and len(set(choices)) == len(choices) <= 26,
             "a list of at most 26 different texts")):
        if not good:
            raise ValueError(f"{name} is {shown(value)}; {expected} expected")
    return Sample(str(rest.pop("id")), text, [folder / image for image in images], answer, system, choices,
                  "" if category is None else str(category), rest, **options)


def settle_images(sample: Sample, where: str, missing_images: str, seen_size: Callable | None) -> bool:
    """Their sizes, from their headers alone; False for a sample to be dropped because one of them is missing."""
    if missing_images != "stop":
        sample.images = [path if path.is_file() else None for path in sample.images]
    sample.sizes = [grey_image().size if path is None else check_image(path, where, sample.upright)
                    for path in sample.images]
    sample.seen_sizes = [seen_size(*size) if seen_size else size for size in sample.sizes]
    return missing_images != "drop" or None not in sample.images


def choose_golds(sample: Sample, verifier: Verifier | None) -> None:
    """What its answers are compared by, and with. ValueError for an answer that the verifier cannot use."""
    several = isinstance(sample.answer, list) and verifier is not VERIFIERS["boxes"]
    values = [without_marks(value) for value in (sample.answer if several else [sample.answer])]
    sample.verifier = verifier or suitable(sample, values)
    gold = sample.verifier.gold or (lambda value, sample: sample.verifier.read(str(value), sample))
    sample.golds = [gold(value, sample) for value in values]
    if None in sample.golds:
        raise ValueError(f"answer is {shown(sample.answer)}; {sample.verifier.expected} expected")
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
    if name == "auto" or name in VERIFIERS:
        return VERIFIERS.get(name)
    module, colon, function = name.rpartition(":")
    if not colon:
        raise ValueError(f"--verifier {name}: auto, {', '.join(VERIFIERS)} or my.module:function expected")
    found = getattr(load_module(module, "--verifier"), function, None)
    if not callable(found):
        raise ValueError(f"--verifier {name}: {module} has no function {function}(answer, sample)")
    return own_verifier(found)


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
    images = [grey_image() if path is None else open_image(path, sample.upright) for path in sample.images]
    return images, "\n".join(text)


def target(sample: Sample) -> str:
    """The gold answer in the form of an answer, the first of several; boxes as the model sees them."""
    answer = without_marks(sample.answer[0] if isinstance(sample.answer, list) else sample.answer)
    if sample.verifier is VERIFIERS["choice"] and isinstance(answer, int):
        answer = sample.choices[sample.golds[0]]
    if sample.verifier is VERIFIERS["boxes"]:
        answer = json.dumps([[round(edge) for edge in box] for box in sample.golds[0]])
    return str(answer) if sample.whole_answer else f"<answer>{answer}</answer>"


def stratum(sample: Sample) -> str:
    return sample.category


def is_none(sample: Sample) -> bool:
    return False  # no question here has "nothing there" for an answer


def sample_from(text: str, image: str = "", whole_answer: bool = False) -> Sample:
    """For grpo.predict: a question, perhaps with an image, whose answer nobody has written down."""
    return Sample("this question", text, [Path(image)] if image else [], "", whole_answer=whole_answer)
