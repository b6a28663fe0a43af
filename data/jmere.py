"""JMERE: posts with an image, and all the (head, head type, tail, tail type, relation) quintuples in each.

A folder holds train.json, val.json and test.json or some of them, each one JSON list of posts:

    {"token": […], "img_id": "….jpg", "label_list": [[{"beg_ent": E, "sec_ent": E, "relation": "peer"}], …]}

with E = {"name": "Josh Gordon", "pos": [start, end), "tags": "per"}. Images lie in one of
IMAGE_PLACES; the text can be used without them. `python -m data.jmere --check DIR` counts all of it."""
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from data.images import check_image, grey_image, open_image, settle_missing
from data.read import check_folder, field, file_name_field, prompt_text, read_json, shown, words_field
from rewards.jmere import Quintuple, answer_text, correct, spoken

SPLITS = ("train", "val", "test")
TYPES = {"loc": "place", "misc": "anything else with a name", "org": "organisation", "per": "person"}
# The dataset's, for one post without it; a folder's own relations are read from its splits.
RELATIONS = tuple(prompt_text("jmere_relations").split())
IMAGE_PLACES = ("images", "images/{split}", "img_org/{split}", ".")  # the first that holds the file


class Post(NamedTuple):
    text: str
    image: str  # the file's name
    quintuples: tuple[Quintuple, ...]


@dataclass(frozen=True)
class Sample:
    """One post; image is None where a grey image stands in for a missing one."""
    id: str  # "train/0": the split and the post's place in its file, from 0
    image: Path | None
    text: str
    quintuples: tuple[Quintuple, ...]
    relations: tuple[str, ...]  # all that occur in the folder's splits, as the data spells them (`alumi`)
    types: tuple[str, ...]


def load(folder, split: str, *, missing_images: str = "stop") -> list[Sample]:
    """A whole split, checked, and of the other splits the relations. missing_images: see data.images.settle_missing;
    anything else that is wrong is a ValueError of one line that names file and item."""
    folder = Path(folder)
    file, splits = folder / f"{split}.json", read_splits(folder)
    if split not in splits:
        raise FileNotFoundError(f"{file} is missing; the folder has {', '.join(splits)}")
    relations = relations_in(splits)
    samples = [Sample(f"{split}/{i}", find_image(folder, split, post.image), post.text, post.quintuples,
                      relations, tuple(TYPES)) for i, post in enumerate(splits[split])]
    missing = [post.image for post, sample in zip(splits[split], samples) if sample.image is None]
    places = ", ".join(place.format(split=split) for place in IMAGE_PLACES)
    report = f"{file}: {len(missing)} of {len(samples)} posts have no image in {places}"
    samples = settle_missing(samples, list(dict.fromkeys(missing)), report, missing_images)
    if not samples:
        raise ValueError(f"{report}; none is left")
    for sample in samples:
        if sample.image is not None:
            check_image(sample.image, f"{folder}, {sample.id}")
    return samples


def sample_from(image, text: str, *, data="") -> Sample:
    """One post of the user's own, without gold quintuples; image may be None. The relations to choose from are those of
    the folder `data`, which the model was trained on, or without one JMERE's."""
    if image is not None:
        check_image(image, "this post")
    words = text.split()
    if not words:
        raise ValueError("the post's text is empty; words expected")
    relations = relations_in(read_splits(Path(data))) if data else RELATIONS
    text = " ".join(words[_leading_rt(words):])
    return Sample("this post", Path(image) if image else None, text, (), relations, tuple(TYPES))


def relations_in(splits: dict[str, list[Post]]) -> tuple[str, ...]:
    return tuple(sorted({one[-1] for posts in splits.values() for post in posts for one in post.quintuples}))


def read_splits(folder: Path) -> dict[str, list[Post]]:
    check_folder(folder, "train.json, val.json or test.json")
    files = {split: folder / f"{split}.json" for split in SPLITS}
    splits = {split: read_posts(file) for split, file in files.items() if file.is_file()}
    if not splits:
        raise FileNotFoundError(f"{folder}: no JMERE dataset, which has {', '.join(f.name for f in files.values())}")
    return splits


def read_posts(file: Path) -> list[Post]:
    """One split's posts; raises a one-line ValueError naming the file and the item, counted from 0."""
    items = read_json(file, "a list of posts", list)
    if not items:
        raise ValueError(f"{file}: found []; expected a list of posts")
    return [_read_post(item, f"{file}, item {i}") for i, item in enumerate(items)]


def _read_post(item, where: str) -> Post:
    tokens, image = words_field(item, "token", where), file_name_field(item, "img_id", where)
    labels = field(item, "label_list", list, where)
    if not all(isinstance(entry, list) and entry for entry in labels):
        raise ValueError(f"{where}: 'label_list' is {shown(labels)}; a list of one-element lists expected")
    quintuples = dict.fromkeys(_read_pair(pair, tokens, where) for entry in labels for pair in entry)  # each once
    return Post(" ".join(tokens[_leading_rt(tokens):]), image, tuple(quintuples))


def _read_pair(pair, tokens: list[str], where: str) -> Quintuple:
    head, tail = (_read_entity(field(pair, name, dict, where), tokens, where) for name in ("beg_ent", "sec_ent"))
    relation = field(pair, "relation", str, where)
    if not relation.replace("_", "").isalnum():  # a comma or bracket in it and no answer could be read
        raise ValueError(f"{where}: relation {shown(relation)} is not made of letters and underscores")
    return (*head, *tail, relation)


def _read_entity(entity: dict, tokens: list[str], where: str) -> tuple[str, str]:
    name, kind, span = (field(entity, *of, where) for of in (("name", str), ("tags", str), ("pos", list)))
    if kind not in TYPES:
        raise ValueError(f"{where}: {shown(name)} has type {shown(kind)}; one of {', '.join(TYPES)} expected")
    if [type(end) for end in span] != [int, int] or not 0 <= span[0] < span[1] <= len(tokens):
        raise ValueError(f"{where}: {shown(name)} has span {shown(span)}; [start, end) in {len(tokens)} words expected")
    (start, end), words = span, " ".join(tokens[slice(*span)])
    if words != name:  # an error, not a warning: it never happens in the 10,254 mentions of train and val
        raise ValueError(f"{where}: span {span} reads {shown(words)}, but the entity's name is {shown(name)}")
    # The text loses its leading RT, so a mention does too. One mention is RT and nothing else: it keeps it.
    return " ".join(tokens[max(start, _leading_rt(tokens)):end]) or name, kind


def _leading_rt(tokens: list[str]) -> int:
    """How many words at the beginning are left out: one where it is the mark of a retweet."""
    return int(tokens[0] == "RT")


def find_image(folder: Path, split: str, name: str) -> Path | None:
    candidates = (folder / place.format(split=split) / name for place in IMAGE_PLACES)
    return next((path for path in candidates if path.is_file()), None)


def build_prompt(sample: Sample, *, reasoning: bool = True) -> tuple[list[Image.Image], str]:
    """([image], the question); reasoning=False asks for the answer alone (zero-shot, label only)."""
    return [open_image(sample.image) if sample.image else grey_image()], question(sample, reasoning=reasoning)


def question(sample: Sample, *, reasoning: bool = True) -> str:
    """The prompt's text, data/prompts/jmere.txt: the text, the types and relations to choose from, the form."""
    form = ("First reason in <think></think>: describe the image, say how image and text belong together, "
            "derive the quintuples step by step.\n") * reasoning
    return prompt_text("jmere", text=sample.text, types=", ".join(f"{kind} ({TYPES[kind]})" for kind in sample.types),
                       relations=", ".join(map(spoken, sample.relations)), form=form)


def target(sample: Sample) -> str:
    """The gold answer without reasoning, for label-only training."""
    return f"<answer>\n{answer_text(sample.quintuples)}\n</answer>"


def stratum(sample: Sample) -> str:
    """What a stratified draw keeps the shares of: the first quintuple's relation."""
    return sample.quintuples[0][-1]


def is_none(sample: Sample) -> bool:
    return False  # every post holds a quintuple


def expert_prompt(sample: Sample) -> str:
    """What the expert is asked with the image for one candidate: the task, three parts, the gold quintuples."""
    return prompt_text("jmere_expert", question=question(sample), quintuples=answer_text(sample.quintuples))


def repredict_prompt(sample: Sample, response: str) -> str:
    """The re-prediction filter's question: what follows from a candidate's reasoning? The gold answer is not in it."""
    return prompt_text("jmere_repredict", question=question(sample, reasoning=False), thoughts=reasoning_of(response))


def score_prompt(sample: Sample, response: str) -> str:
    """The score filter's question: fixed rules, three worked examples, then the candidate's reasoning."""
    return prompt_text("jmere_score", text=sample.text, quintuples=answer_text(sample.quintuples),
                       thoughts=reasoning_of(response))


def reasoning_of(response: str) -> str:
    return response.partition("<think>")[2].partition("</think>")[0].strip()


def normalise_response(response: str, sample: Sample) -> str:
    """An expert's response with a right answer spelled as the gold one: its order, spaces and underscores."""
    response = response.strip()
    if not correct(response, sample):
        return response
    before, _, rest = response.partition("<answer>")
    return before + target(sample) + rest.partition("</answer>")[2]


if __name__ == "__main__":
    import runpy

    runpy.run_module("data.check", run_name="__main__")  # a program of its own, which reads with what stands above
