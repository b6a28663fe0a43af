"""JMERE: posts with an image, and all the (head, head type, tail, tail type, relation) quintuples in each.

A folder holds train.json, val.json and test.json or some of them, each one JSON list of posts:

    {"token": […], "img_id": "….jpg", "label_list": [[{"beg_ent": E, "sec_ent": E, "relation": "peer"}], …]}

with E = {"name": "Josh Gordon", "pos": [start, end), "tags": "per"}. Images lie in one of
IMAGE_PLACES; the text can be used without them. `python -m data.jmere --check DIR` counts all of it."""
import argparse
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from data.images import check_image, check_missing_images, grey_image, open_image, settle_missing
from data.read import check_folder, is_file_name, read_json, shown
from rewards.jmere import Quintuple, answer_text, correct, spoken

SPLITS = ("train", "val", "test")
TYPES = {"loc": "place", "misc": "anything else with a name", "org": "organisation", "per": "person"}
# The dataset's, for one post without it; a folder's own relations are read from its splits.
RELATIONS = ("alternate_names", "alumi", "awarded", "charges", "contain", "couple", "held_on", "locate_at", "member_of",
    "nationality", "neighbor", "parent", "part_of", "peer", "place_of_birth", "place_of_residence", "present_in",
    "race", "religion", "siblings", "subsidiary")
IMAGE_PLACES = ("images", "images/{split}", "img_org/{split}", ".")  # the first that holds the file


class Post(NamedTuple):
    """What the file says of one post."""
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
    """Reads and checks a whole split, and the other splits' labels for the list of relations.

    missing_images: "stop" is a FileNotFoundError with the count and the first three; "drop" leaves such posts
    out and warns; "blank" keeps them with image None. Anything else that is wrong is a ValueError of one line
    that names file and item."""
    check_missing_images(missing_images)
    folder = Path(folder)
    splits = read_splits(folder)
    if split not in splits:
        raise FileNotFoundError(f"{folder / f'{split}.json'} is missing; the folder has {', '.join(splits)}")
    relations = relations_in(splits)
    samples = [Sample(f"{split}/{i}", find_image(folder, split, post.image), post.text, post.quintuples,
                      relations, tuple(TYPES)) for i, post in enumerate(splits[split])]
    missing = [post.image for post, sample in zip(splits[split], samples) if sample.image is None]
    places = ", ".join(place.format(split=split) for place in IMAGE_PLACES)
    report = f"{folder / f'{split}.json'}: {len(missing)} of {len(samples)} posts have no image in {places}"
    samples = settle_missing(samples, list(dict.fromkeys(missing)), report, missing_images)
    if not samples:
        raise ValueError(f"{report}: {', '.join(list(dict.fromkeys(missing))[:3])}; none is left")
    for sample in samples:
        if sample.image is not None:
            check_image(sample.image, f"{folder}, {sample.id}")
    return samples


def sample_from(image, text: str, *, data="") -> Sample:
    """One post of the user's own, without gold quintuples; image may be None.

    The relations to choose from are those of the dataset's folder `data` where it is given, JMERE's where not: give
    the one that the model was trained on."""
    if image is not None:
        check_image(image, "this post")
    words = text.split()
    if not words:
        raise ValueError("the post's text is empty; words expected")
    relations = relations_in(read_splits(Path(data))) if data else RELATIONS
    text = " ".join(words[_leading_rt(words):])
    return Sample("this post", Path(image) if image else None, text, (), relations, tuple(TYPES))


def relations_in(splits: dict[str, list[Post]]) -> tuple[str, ...]:
    """All that occur, in alphabetical order."""
    return tuple(sorted({one[-1] for posts in splits.values() for post in posts for one in post.quintuples}))


def read_splits(folder: Path) -> dict[str, list[Post]]:
    """The posts of every split that is there."""
    check_folder(folder, "train.json, val.json or test.json")
    files = {split: folder / f"{split}.json" for split in SPLITS}
    splits = {split: read_posts(file) for split, file in files.items() if file.is_file()}
    if not splits:
        raise FileNotFoundError(f"{folder}: no JMERE dataset, which has {', '.join(f.name for f in files.values())}")
    return splits


def read_posts(file: Path) -> list[Post]:
    """One split's posts; raises a one-line ValueError naming the file and the item, counted from 0."""
    items = read_json(file, "a list of posts")
    if not isinstance(items, list) or not items:
        raise ValueError(f"{file}: found {shown(items)}; a list of posts expected")
    return [_read_post(item, f"{file}, item {i}") for i, item in enumerate(items)]


def _read_post(item, where: str) -> Post:
    tokens = _field(item, "token", list, where)
    if not all(isinstance(token, str) for token in tokens):
        raise ValueError(f"{where}: 'token' is {shown(tokens)}; a list of words expected")
    image = _field(item, "img_id", str, where)
    if not is_file_name(image):
        raise ValueError(f"{where}: 'img_id' is {shown(image)}; the bare name of a file expected")
    labels = _field(item, "label_list", list, where)
    if not all(isinstance(entry, list) and entry for entry in labels):
        raise ValueError(f"{where}: 'label_list' is {shown(labels)}; a list of one-element lists expected")
    quintuples = dict.fromkeys(_read_pair(pair, tokens, where) for entry in labels for pair in entry)  # each once
    return Post(" ".join(tokens[_leading_rt(tokens):]), image, tuple(quintuples))


def _field(record, key: str, kind: type, where: str):
    value = record.get(key) if isinstance(record, dict) else None
    if not isinstance(value, kind) or not value:
        found = "is missing" if value is None else f"is {shown(value)}"
        raise ValueError(f"{where}: {key!r} {found}; a {kind.__name__} that is not empty expected")
    return value


def _read_pair(pair, tokens: list[str], where: str) -> Quintuple:
    head = _read_entity(_field(pair, "beg_ent", dict, where), tokens, where)
    tail = _read_entity(_field(pair, "sec_ent", dict, where), tokens, where)
    relation = _field(pair, "relation", str, where)
    if not relation.replace("_", "").isalnum():  # a comma or bracket in it and no answer could be read
        raise ValueError(f"{where}: relation {shown(relation)} is not made of letters and underscores")
    return (*head, *tail, relation)


def _read_entity(entity: dict, tokens: list[str], where: str) -> tuple[str, str]:
    name, kind = _field(entity, "name", str, where), _field(entity, "tags", str, where)
    span = _field(entity, "pos", list, where)
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
    """The first of IMAGE_PLACES that holds the image."""
    candidates = (folder / place.format(split=split) / name for place in IMAGE_PLACES)
    return next((path for path in candidates if path.is_file()), None)


def build_prompt(sample: Sample, *, reasoning: bool = True) -> tuple[list[Image.Image], str]:
    """([image], the question); reasoning=False asks for the answer alone (zero-shot, label only)."""
    return [open_image(sample.image) if sample.image else grey_image()], question(sample, reasoning=reasoning)


def question(sample: Sample, *, reasoning: bool = True) -> str:
    """The prompt's text: what is asked, the text, the types and relations to choose from, the form."""
    think = ("First reason in <think></think>: describe the image, say how image and text belong together, "
             "derive the quintuples step by step.")
    return "\n".join([
        "Image and text are one post on social media. Which entities named in the text are related, and how?",
        f"Text: {sample.text}", f"Entity types: {', '.join(f'{kind} ({TYPES[kind]})' for kind in sample.types)}",
        f"Relations: {', '.join(map(spoken, sample.relations))}", *([think] if reasoning else []),
        "Give all quintuples in <answer></answer>, one a line, entities spelled as in the text:",
        "[head, head type, tail, tail type, relation]"])


def target(sample: Sample) -> str:
    """The gold answer without reasoning, for label-only training."""
    return f"<answer>\n{answer_text(sample.quintuples)}\n</answer>"


def stratum(sample: Sample) -> str:
    """What a stratified draw keeps the shares of: the first quintuple's relation."""
    return sample.quintuples[0][-1]


def is_none(sample: Sample) -> bool:
    """Every post of this dataset holds a quintuple."""
    return False


EXPERT_PARTS = """\
Write three parts, each opened by its word as it stands here:
Image: what the picture shows, and of it all that matters for the entities: who and what can be seen, in which \
place, doing what, with which writing. Only what is really there.
Alignment: which entity of the text is seen where in the picture, what the picture adds to the text, and what of \
the text it does not show.
Quintuples: for each quintuple in turn, which words of the text and what in the picture make it so: first the two \
entities, then their types, then the relation, and why not another one that lies near."""


def expert_prompt(sample: Sample) -> str:
    """What the expert is asked with the image for one candidate: the task, three parts, the gold quintuples."""
    return "\n\n".join([
        question(sample), EXPERT_PARTS, f"The right answer is:\n{answer_text(sample.quintuples)}\n"
        "Derive it from what can be seen and read, and never mention that it was given to you.",
        "Write exactly <think>Image: … Alignment: … Quintuples: …</think>, then the answer, letter by letter as it "
        "stands above, within <answer></answer>, and nothing before or after."])


def repredict_prompt(sample: Sample, response: str) -> str:
    """The re-prediction filter's question: what follows from a candidate's reasoning? The gold answer is not in it."""
    return "\n\n".join([
        question(sample, reasoning=False),
        f"Somebody has thought about this post:\n{reasoning_of(response)}",
        "Which quintuples follow from these thoughts? Write <answer></answer> and nothing else."])


SCORE_RULES = """\
Begin with 1 and take off, for every rule that is broken:
0.3  the image part describes something that is not in the picture, or gets it wrong
0.2  the image part leaves out something that a quintuple rests on
0.2  the alignment does not say where the entities are seen, or that they are not to be seen
0.1  the alignment joins an entity to the wrong thing in the picture
0.2  a quintuple is named without a reason from text or picture
0.2  a step contradicts an earlier one, or the thoughts speak of an answer that was given
A part that is missing breaks all rules about it. The score is never below 0."""
SCORE_EXAMPLES = """\
Text: "Mia Stone signs for Harbour FC". Quintuple: [Mia Stone, per, Harbour FC, org, member of].
Thoughts: "Image: a woman in a blue shirt holds up a scarf that reads HARBOUR FC. Alignment: she is Mia Stone, the \
scarf is the club's. Quintuples: signs for, and her holding the scarf, make her a member of Harbour FC."
No rule is broken. <score>1.0</score>
Thoughts: "Image: a woman. Alignment: she is Mia Stone. Quintuples: she is a member of Harbour FC."
The scarf is left out (0.2), the club is not looked for (0.2), no reason is given (0.2). <score>0.4</score>
Thoughts: "Image: a woman holds a scarf with the words HARBOUR FC. Alignment: she is Mia Stone, the scarf stands \
for the club. Quintuples: Mia Stone is a member of Harbour FC."
No reason is given (0.2). <score>0.8</score>"""


def score_prompt(sample: Sample, response: str) -> str:
    """The score filter's question: fixed rules, three worked examples, then the candidate's reasoning."""
    return "\n\n".join([
        "Score thoughts about a post on social media, which is the picture and a text, between 0 and 1.", SCORE_RULES,
        f"Examples:\n{SCORE_EXAMPLES}",
        f"Text: {sample.text}\nRight quintuples:\n{answer_text(sample.quintuples)}\nThoughts: {reasoning_of(response)}",
        "Name the rules that are broken, then write the score within <score></score>."])


def reasoning_of(response: str) -> str:
    """What stands between <think> and </think>."""
    return response.partition("<think>")[2].partition("</think>")[0].strip()


def normalise_response(response: str, sample: Sample) -> str:
    """An expert's response with a right answer spelled as the gold one: its order, spaces and underscores."""
    response = response.strip()
    if not correct(response, sample):
        return response
    before, _, rest = response.partition("<answer>")
    return before + target(sample) + rest.partition("</answer>")[2]


def check(folder) -> None:
    """Prints what a dataset folder holds, a column per split; raises what `load` raises."""
    folder = Path(folder)
    splits = {split: load(folder, split, missing_images="blank") for split in read_splits(folder)}
    for title, count in COUNTS.items():
        columns = {split: Counter() for split in splits}
        for split, samples in splits.items():
            for sample in samples:
                columns[split].update(count(sample))
        _print_table(title, columns)


def _totals(sample: Sample) -> dict[str, int]:
    return {"posts": 1, "posts without image": int(sample.image is None), "quintuples": len(sample.quintuples),
            "answers that do not read back": int(not correct(target(sample), sample))}


COUNTS = {"in all": _totals, "posts by number of quintuples": lambda sample: [len(sample.quintuples)],
    "mentions by type": lambda sample: [kind for one in sample.quintuples for kind in (one[1], one[3])],
    "quintuples by relation": lambda sample: [f"{one[4]} ({one[1]}, {one[3]})" for one in sample.quintuples]}


def _print_table(title: str, columns: dict[str, Counter]) -> None:
    rows = sorted(set().union(*columns.values()))
    width = max(len(str(row)) for row in [title, *rows])
    print(f"{title:<{width}}", *(f"{split:>7}" for split in columns))
    for row in rows:
        print(f"{row!s:<{width}}", *(f"{counter[row]:>7,}" for counter in columns.values()))
    print()


def main() -> None:
    parser = argparse.ArgumentParser("python -m data.jmere", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--check", metavar="DIR", required=True, help="the dataset's folder")
    try:
        check(parser.parse_args().check)
    except (OSError, ValueError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
