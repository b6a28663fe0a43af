"""The MORE dataset as it lies on disk: samples, their prompt, and a check of the whole folder.

    rel2id.json                      {label: id}, with "none"
    txt/{train,valid,test}.txt       one sample a line, a Python or a JSON dictionary
    ent_{train,valid,test}_dict.pth  {image: {object: box}}, asked only for lines that hold no box
    img_org/{split}/                 the images

A line's `h` is the entity in the text and its `t` the object in the image; a label such as /per/org/member_of names the
object's type first. Boxes are (cx, cy, w, h) in fractions of the image; some spill over its edge.

`python -m data.more --check DIR` counts what is there and names what is wrong (data/check.py)."""
import ast
import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from data.images import check_box, check_image, crop_box, grey_image, open_image, settle_missing
from data.read import check_folder, field, file_name_field, one_line, prompt_text, read_json, shown, words_field

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
    """A box that is missing or is none, in a line that is fine otherwise."""


def load(folder, split: str, *, missing_images: str = "stop") -> list[Sample]:
    """A whole split, checked, images' headers and boxes included. missing_images: see data.images.settle_missing;
    anything else that is wrong is a ValueError of one line that names file and line."""
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
    """One sample of the user's own, without a label: what grpo.predict answers. `box` is "cx,cy,w,h" in fractions of
    the image; the candidates are those of the rel2id.json in `data`."""
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
    """The prompt's text, data/prompts/more.txt: the text, the entity, the candidates, the types, the form."""
    form = ("Reason in <think></think> from Step 1: to Step 6:, then give one label in <answer></answer>." if reasoning
            else "Give one label in <answer></answer>.")
    return prompt_text("more", text=sample.text, entity=sample.entity, labels=" ".join(sample.labels), form=form)


def target(sample: Sample) -> str:
    """The gold answer without reasoning: what label-only SFT learns."""
    return f"<answer>{sample.label}</answer>"


def stratum(sample: Sample) -> str:
    return sample.label


def is_none(sample: Sample) -> bool:
    return sample.label == "none"


def expert_prompt(sample: Sample) -> str:
    """What the expert is asked with the images (MORE-R1, section 3.2): task, six steps, gold answer."""
    types = " and ".join(sample.label.split("/")[1:-1])
    gold = ("The right answer is none: the object and the entity are not related." if is_none(sample) else
            f"The right answer is {sample.label}: object and entity are of the types {types}.")
    return prompt_text("more_expert", question=question(sample), gold=gold)


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
        self.sizes: dict[Path, tuple[int, int]] = {}

    def lines(self) -> Iterator[tuple[str, str]]:
        """("file:line", the line) for every line; empty ones only at the file's end are no lines."""
        if not self.file.is_file():
            raise FileNotFoundError(f"{self.file} is missing; MORE's layout has txt/{{train,valid,test}}.txt")
        text = self.file.read_text(encoding="utf-8-sig", errors="replace").rstrip()
        for number, line in enumerate(text.split("\n") if text else [], 1):
            yield f"{self.file}:{number}", line.strip()

    def sample(self, line: str, where: str) -> Sample:
        """The line as a sample, with its image's path; the image itself is not looked at."""
        fields = dictionary(line, where)
        text, entity = " ".join(words_field(fields, "token", where)), field(fields, "h.name", str, where)
        # A lone surrogate can be written in JSON but is refused by every tokenizer.
        text, entity = (words.encode("utf-8", "replace").decode() for words in (text, entity))
        image, label = file_name_field(fields, "img_id", where), field(fields, "relation", str, where)
        if label not in self.labels:
            raise ValueError(f"{where}: label {shown(label)} is not in {self.folder / 'rel2id.json'}")
        box = field(fields, "t", dict, where).get("pos")
        name = field(fields, "t.name", str, where) if box is None else ""
        try:
            box = _four_numbers(self._stored_box(image, name) if box is None else box)
        except ValueError as problem:
            raise BoxFault(f"{where}: {problem}") from None
        number = int(where.rpartition(":")[2]) - 1
        return Sample(f"{self.split}/{number}", self.folder / "img_org" / self.split / image, box, text, entity, label,
                      self.labels)

    def image_size(self, sample: Sample, where: str) -> tuple[int, int] | None:
        """(width, height) of the sample's image, from its header; None where there is none."""
        if sample.image is not None and sample.image not in self.sizes:
            self.sizes[sample.image] = check_image(sample.image, where)
        return self.sizes.get(sample.image)

    @cached_property
    def boxes(self) -> dict | str:
        """{image: {object: box}} of the split's .pth file, or why it cannot be used."""
        file = self.folder / f"ent_{self.split}_dict.pth"
        if not file.is_file():
            return f"{file} is missing"
        import torch  # the one file of this dataset that needs it
        try:
            boxes = torch.load(file, weights_only=True)  # True: a pickle must not run code
        except Exception as problem:
            return f"{file} cannot be read ({one_line(problem)[:200]})"
        return boxes if isinstance(boxes, dict) else f"{file} holds a {type(boxes).__name__}; a dict expected"

    def _stored_box(self, image: str, name: str):
        if isinstance(self.boxes, str):
            raise ValueError(f"no box in 't', and {self.boxes}")
        objects, file = self.boxes.get(image, {}), f"ent_{self.split}_dict.pth"
        if not isinstance(objects, dict):
            raise ValueError(f"{file} holds {shown(objects)} for {image}; {{object: box}} expected")
        if objects.get(name) is None:
            raise ValueError(f"no box in 't', and {file} has none for {shown(name)} of {image}")
        return objects[name]


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
    for good, fault in ((all(label.isprintable() and label == label.strip() != "" for label in ids),
             "a label holds what cannot be printed, or begins or ends in space"),
            (len(set(ids.values())) == len(ids), "two labels share an id"), ("none" in ids, "no label 'none'")):
        if not good:
            raise ValueError(f"{file}: {fault}; found {shown(list(ids)) if ids else 'no label at all'}")
    return tuple(sorted(ids, key=ids.get))


def dictionary(line: str, where: str) -> dict:
    """A line's content. ValueError for what is no dictionary."""
    # JSON first: every line that is both means the same in both, and JSON's own escapes are no Python.
    for read in (json.loads, ast.literal_eval):
        try:
            with warnings.catch_warnings(action="ignore"):  # Python's about a backslash in a text: its meaning is plain
                fields = read(line)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            continue
        if isinstance(fields, dict):
            return fields
    found = f"{line[:40]!r}… ends in {line[-20:]!r}" if line else "an empty line"
    raise ValueError(f"{where}: {found}; one complete Python or JSON dictionary expected")


if __name__ == "__main__":
    import runpy

    runpy.run_module("data.check", run_name="__main__")  # a program of its own, which reads with what stands above
