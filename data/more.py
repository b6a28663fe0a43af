"""The MORE dataset as it lies on disk: samples, their prompt, and a check of the whole folder.

    rel2id.json                      {label: id}, with "none"
    txt/{train,valid,test}.txt       one sample a line, a Python or a JSON dictionary
    ent_{train,valid,test}_dict.pth  {image: {object: box}}, asked only for lines that hold no box
    img_org/{split}/                 the images

A line's `h` is the entity in the text and its `t` the object in the image; a label such as /per/org/member_of names the
object's type first. Boxes are (cx, cy, w, h) in fractions of the image; some spill over its edge.

`python -m data.more --check DIR` counts what is there and names what is wrong
(data/more_check.py)."""
import ast
import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from data.images import (check_box, check_image, check_missing_images, crop_box, grey_image, open_image,
                         settle_missing)
from data.read import check_folder, is_file_name, one_line, read_json, shown

SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class Sample:
    """One object, one entity, one relation."""
    id: str  # "train/0": the split and the line's number from 0
    image: Path | None  # None: not at hand, a grey image stands in
    box: tuple[float, float, float, float]  # of the object: cx, cy, w, h in fractions of the image
    text: str
    entity: str
    label: str
    labels: tuple[str, ...]  # the candidates, in the order of their ids


class BoxFault(ValueError):
    """A box that is missing or is none, in a line that is fine otherwise and has this label."""

    def __init__(self, message: str, label: str):
        super().__init__(message)
        self.label = label


def load(folder, split: str, *, missing_images: str = "stop") -> list[Sample]:
    """Read and validate a whole split, images' headers and boxes included.

    `missing_images`: "stop" is a FileNotFoundError with the count and the first three; "drop" leaves such
    samples out and warns; "blank" keeps them with `image` None. Anything else that is wrong is a ValueError
    of one line that names file and line."""
    check_missing_images(missing_images)
    reader, samples, missing = SplitReader(folder, split), [], []
    for where, line in reader.lines():
        sample = reader.sample(line, where)
        if not sample.image.is_file():
            missing.append(str(sample.image))
            sample = replace(sample, image=None)
        check_box(sample.box, reader.image_size(sample, where), where)
        samples.append(sample)
    report = f"{reader.file}: {len(missing)} of {len(samples)} samples have no image"
    samples = settle_missing(samples, missing, report, missing_images)
    if not samples:
        raise ValueError(f"{reader.file}: no samples in it; one dictionary a line expected")
    return samples


def sample_from(image, text: str, *, box: str, entity: str, data) -> Sample:
    """One sample of the user's own, without a label: what grpo.predict answers.

    `box` is "cx,cy,w,h" in fractions of the image; the candidates are those of the rel2id.json in `data`. Raises a
    one-line ValueError or FileNotFoundError for what does not fit."""
    try:
        cx, cy, w, h = (float(part) for part in box.split(","))
    except ValueError:
        raise ValueError(f"box is {box!r}; cx,cy,w,h in fractions of the image expected") from None
    if not entity.strip() or entity not in text:
        raise ValueError(f"the entity {entity!r} does not stand in the text {text[:60]!r}")
    check_box((cx, cy, w, h), check_image(image, "this sample"), "this sample")
    return Sample("this sample", Path(image), (cx, cy, w, h), text, entity, "", read_labels(data))


def build_prompt(sample: Sample, *, reasoning: bool = True) -> tuple[list, str]:
    """([image, its crop to the object] in RGB, the question): MORE-R1's equation 1."""
    image = open_image(sample.image) if sample.image else None
    images = [image, crop_box(image, sample.box)] if image else [grey_image(), grey_image()]
    return images, question(sample, reasoning=reasoning)


def question(sample: Sample, *, reasoning: bool = True) -> str:
    """The prompt's text: what is asked, the text, the entity, the candidates, the types, the form."""
    return "\n".join([
        "The second picture is an object cut out of the first. How is it related to the entity in the text?",
        f"Text: {sample.text}", f"Entity: {sample.entity}", f"Labels: {' '.join(sample.labels)}",
        "A label names the object's type, the entity's type and the relation, or is none. "
        "Types: per (person), org (organization), loc (location), misc (anything else).",
        "Reason in <think></think> from Step 1: to Step 6:, then give one label in <answer></answer>."
        if reasoning else "Give one label in <answer></answer>."])


def target(sample: Sample) -> str:
    """The gold answer without reasoning: what label-only SFT learns."""
    return f"<answer>{sample.label}</answer>"


def stratum(sample: Sample) -> str:
    """What the cold-start draw is stratified by: the relation."""
    return sample.label


def is_none(sample: Sample) -> bool:
    """Whether object and entity are unrelated."""
    return sample.label == "none"


EXPERT_STEPS = """\
Go through six steps, with two or more sentences for each; open each with its marker as it stands here.
Step 1: What do picture and object show, and what part does the object play in the picture? \
An object that is blurred or at the margin speaks for none.
Step 2: Are picture and text about the same thing?
Step 3: Which of the things that the text names is the object, if any?
Step 4: Of which type is the object, and of which the entity? An object that cannot be recognised is misc.
Step 5: Keep the labels that stand under this pair of types, the object's type first. none always stays.
Step 6: Decide for one of those, from what the steps before have found."""


def expert_prompt(sample: Sample) -> str:
    """What the expert is asked with the images (MORE-R1, section 3.2): task, six steps, gold answer."""
    types = " and ".join(sample.label.split("/")[1:-1])
    gold = ("The right answer is none: the object and the entity are not related." if is_none(sample) else
            f"The right answer is {sample.label}: object and entity are of the types {types}.")
    return "\n\n".join([
        question(sample), EXPERT_STEPS,
        f"{gold} Derive it from what can be seen and read, and never mention that it was given to you.",
        "Write exactly <think> Step 1: … Step 6: … </think> <answer>LABEL</answer>, "
        "the label letter by letter as in the list, and nothing before or after."])


def normalise_response(response: str, sample: Sample) -> str:
    """An expert's response with the slash back that experts like to leave off their label."""
    head, opening, rest = response.strip().partition("<answer>")
    label, closing, tail = rest.partition("</answer>")
    label = slashed if (slashed := f"/{label.strip()}") in sample.labels else label
    return head + opening + label + closing + tail


class SplitReader:
    """Reads a split line by line; keeps the labels, the box dictionary and the sizes of images seen."""

    def __init__(self, folder, split: str):
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}; one of {', '.join(SPLITS)} expected")
        self.folder, self.split = Path(folder), split
        self.file = self.folder / "txt" / f"{split}.txt"
        self.labels = read_labels(self.folder)
        self.boxes: dict | None = None
        self.boxes_fault = ""  # why their file cannot be used
        self.sizes: dict[Path, tuple[int, int]] = {}

    def lines(self) -> Iterator[tuple[str, str]]:
        """("file:line", the line) for every line; empty ones only at the file's end are no lines."""
        if not self.file.is_file():
            raise FileNotFoundError(f"{self.file} is missing; MORE's layout has txt/{{train,valid,test}}.txt")
        held_back = []
        with open(self.file, encoding="utf-8-sig", errors="replace") as file:
            for number, line in enumerate(file, 1):
                held_back.append((f"{self.file}:{number}", line.strip()))
                if line.strip():
                    yield from held_back
                    held_back.clear()

    def sample(self, line: str, where: str) -> Sample:
        """The line as a sample, with its image's path; the image itself is not looked at."""
        fields = _dictionary(line, where)
        tokens = _field(fields, ("token",), list, where)
        if not tokens or not all(isinstance(token, str) for token in tokens):
            raise ValueError(f"{where}: 'token' is {shown(tokens)}; a list of words expected")
        text, entity = " ".join(tokens), _field(fields, ("h", "name"), str, where)
        # A lone surrogate can be written in JSON but is refused by every tokenizer.
        text, entity = (words.encode("utf-8", "replace").decode() for words in (text, entity))
        image = _field(fields, ("img_id",), str, where)
        if not is_file_name(image):
            raise ValueError(f"{where}: 'img_id' is {shown(image)}; the bare name of an image expected")
        label = _field(fields, ("relation",), str, where)
        if label not in self.labels:
            raise ValueError(f"{where}: label {shown(label)} is not in {self.folder / 'rel2id.json'}")
        box = _field(fields, ("t",), dict, where).get("pos")
        name = _field(fields, ("t", "name"), str, where) if box is None else ""
        try:
            box = _four_numbers(self._stored_box(image, name) if box is None else box)
        except ValueError as problem:
            raise BoxFault(f"{where}: {problem}", label) from None
        return Sample(f"{self.split}/{int(where.rpartition(':')[2]) - 1}", self.folder / "img_org" / self.split / image,
            box,
                      text, entity, label, self.labels)

    def image_size(self, sample: Sample, where: str) -> tuple[int, int] | None:
        """(width, height) of the sample's image, from its header; None where there is none."""
        if sample.image is not None and sample.image not in self.sizes:
            self.sizes[sample.image] = check_image(sample.image, where)
        return self.sizes.get(sample.image)

    def _stored_box(self, image: str, name: str):
        """What the dictionary of boxes holds for the object `name`; its file is read once, even if it cannot be."""
        file = self.folder / f"ent_{self.split}_dict.pth"
        if self.boxes is None:
            self.boxes, self.boxes_fault = _read_boxes(file)
        if self.boxes_fault:
            raise ValueError(f"no box in 't', and {self.boxes_fault}")
        objects = self.boxes.get(image, {})
        if not isinstance(objects, dict):
            raise ValueError(f"{file.name} holds {shown(objects)} for {image}; {{object: box}} expected")
        if objects.get(name) is None:
            raise ValueError(f"no box in 't', and {file.name} has none for {shown(name)} of {image}")
        return objects[name]


def _read_boxes(file: Path) -> tuple[dict, str]:
    """({image: {object: box}}, what is wrong with the file)."""
    if not file.is_file():
        return {}, f"{file} is missing"
    import torch  # the one file of this dataset that needs it
    try:
        boxes = torch.load(file, weights_only=True)  # True: a pickle must not run code
    except Exception as problem:
        return {}, f"{file} cannot be read ({one_line(problem)[:200]})"
    if not isinstance(boxes, dict):
        return {}, f"{file} holds a {type(boxes).__name__}; a dict expected"
    return boxes, ""


def _four_numbers(box) -> tuple[float, float, float, float]:
    plain = lambda value: value.tolist() if hasattr(value, "tolist") else value  # a tensor or an array
    box = plain(box)
    numbers = [plain(value) for value in box] if isinstance(box, (list, tuple)) else []
    # Beyond the limit a box overflows in pixels; NaN is not below it.
    if len(numbers) != 4 or not all(type(number) in (int, float) and abs(number) < 1e6 for number in numbers):
        raise ValueError(f"box is {shown(box)}; (cx, cy, w, h) in fractions expected")
    return tuple(map(float, numbers))


def read_labels(folder) -> tuple[str, ...]:
    """The candidate labels in the order of their ids, from rel2id.json."""
    file, expected = Path(folder) / "rel2id.json", "a dictionary from label to id"
    check_folder(folder, file.name)
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing; {expected} expected")
    ids = read_json(file, expected)
    if not isinstance(ids, dict) or not all(type(value) is int for value in ids.values()):
        raise ValueError(f"{file}: a dictionary from label to whole number expected")
    if not all(label.isprintable() and label == label.strip() != "" for label in ids):
        raise ValueError(f"{file}: a label holds what cannot be printed, or begins or ends in space; found "
                         f"{shown(list(ids))}")
    if len(set(ids.values())) != len(ids):
        raise ValueError(f"{file}: two labels share an id")
    if "none" not in ids:
        raise ValueError(f"{file}: no label 'none'; found {shown(list(ids)) if ids else 'no label at all'}")
    return tuple(sorted(ids, key=ids.get))


def _dictionary(line: str, where: str) -> dict:
    # JSON first: every line that is both means the same in both, and JSON's own escapes are no Python.
    for read in (json.loads, ast.literal_eval):
        try:
            # Python's about a backslash in a text: what it means is plain
            with warnings.catch_warnings(action="ignore"):
                fields = read(line)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            continue
        if isinstance(fields, dict):
            return fields
    found = f"{line[:40]!r}… ends in {line[-20:]!r}" if line else "an empty line"
    raise ValueError(f"{where}: {found}; one complete Python or JSON dictionary expected")


def _field(fields: dict, names: tuple[str, ...], kind: type, where: str):
    value = fields
    for name in names:
        value = value.get(name) if isinstance(value, dict) else None
    if not isinstance(value, kind) or value == "":
        found = "is missing" if value is None else f"is {shown(value)}"
        raise ValueError(f"{where}: {'.'.join(names)!r} {found}; a {kind.__name__} expected")
    return value


if __name__ == "__main__":
    import runpy

    runpy.run_module("data.more_check", run_name="__main__")  # a program of its own, which reads with what stands above
