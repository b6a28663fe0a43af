"""The embedded posts: the image decides the quintuples, and the programs find JMERE's layout in them."""

import json
import random
from collections import Counter, defaultdict
from functools import cache

import pytest
from PIL import Image

from data import jmere
from data.toy import posts
from data.toy.__main__ import main
from data.toy.scene import CITIES, COLOURS, NEUTRAL, PEOPLE, PRIZES, RGB, SIDE, SKIES, TEAMS, WALLS, Scene, Thing
from rewards import jmere as rewards
from sft import annotate

TRAIN, TEST = 300, 300
EVERYTHING = RGB | {f"background {i}": colour for i, colour in enumerate((*SKIES, *WALLS))}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("posts")
    posts.write_world(folder, seed=3, train=TRAIN, valid=5, test=TEST)
    return folder


@pytest.fixture(scope="module")
def samples(world):
    return jmere.load(world / "JMERE", "test")


# ---- a reader of pixels: it knows palette and rules, and of a sample only image and text ----

@cache
def nearest(pixel):
    return min(EVERYTHING, key=lambda name: sum((a - b) ** 2 for a, b in zip(pixel, EVERYTHING[name])))


def read_person(image, half):
    """The person of the left (0) or right (1) half, found by the trousers."""
    names = {(x, y): nearest(image.getpixel((x, y)))
             for x in range(half * SIDE // 2 + 1, (half + 1) * SIDE // 2, 2) for y in range(0, SIDE, 2)}
    legs = [place for place, name in names.items() if name == "trousers"]
    person = Thing("person", 0, 0, 0, NEUTRAL)
    if legs:
        middle, top = sorted(x for x, _ in legs)[len(legs) // 2], min(y for _, y in legs)
        torso = Counter(name for (x, y), name in names.items() if abs(x - middle) < 7 and top - 10 < y < top - 2)
        person.colour = max([*COLOURS, NEUTRAL], key=torso.__getitem__)
    seen = Counter(names.values())
    person.hat = seen["hat"] > 3
    person.holds = "gold cup" if seen["gold"] > 8 else "match ball" if seen["ball"] > 8 else ""
    person.place = "doorway" if seen["door"] > 20 else ""
    return person, seen["umbrella"] > 20


def read_quintuples(sample, image):
    words = sample.text.split()
    names = tuple(word for word in words if word in PEOPLE)
    other = next((thing for thing in (*TEAMS, *PRIZES, *CITIES) if f" {thing}" in f" {sample.text}"), "")
    kind = "match" if other in TEAMS else "award" if other in PRIZES else "home" if other in CITIES else "pair"
    (left, one), (right, two) = read_person(image, 0), read_person(image, 1)
    return posts.quintuples(posts.Post(Scene(kind, [left, right], sample.text, "", one or two), names, other, False))


def f1(answers, samples):
    return rewards.metrics([f"<answer>{rewards.answer_text(answer)}</answer>" for answer in answers], samples)["f1"]


def images_of(samples):
    return [Image.open(sample.image).convert("RGB") for sample in samples]


def test_pixels_and_text_decide_the_quintuples(samples):
    answers = [read_quintuples(sample, image) for sample, image in zip(samples, images_of(samples))]
    assert f1(answers, samples) > 0.9


def test_with_the_images_shuffled_the_reader_of_pixels_is_lost(samples):
    images = images_of(samples)
    random.Random(0).shuffle(images)
    assert f1([read_quintuples(sample, image) for sample, image in zip(samples, images)], samples) < 0.5


def test_text_alone_does_not_decide(samples):
    """The most frequent answer to a text with its names taken out, fitted on what it is scored on."""
    def pattern(sample, words):
        names = {name: f"NAME{i}" for i, name in enumerate(word for word in sample.text.split() if word in PEOPLE)}
        others = {thing: "OTHER" for thing in (*TEAMS, *PRIZES, *CITIES)}
        for name, role in (names | others).items():
            words = words.replace(name, role)
        return words

    count = defaultdict(Counter)
    for sample in samples:
        count[pattern(sample, sample.text)][pattern(sample, rewards.answer_text(sample.quintuples))] += 1
    right = sum(max(answers.values()) for answers in count.values())
    assert right / TEST < 0.5


@pytest.mark.parametrize("kind, left, right, umbrella, expected", [
    ("match", {"colour": "red"}, {"colour": "blue"}, False, [("Mia", "member_of", "Falcons")]),
    ("match", {"colour": "red", "hat": True}, {"colour": "red"}, False,
     [("Mia", "leader_of", "Falcons"), ("Leo", "member_of", "Falcons")]),
    ("award", {"holds": "match ball"}, {"holds": "gold cup"}, False, [("Leo", "awarded", "gold cup")]),
    ("home", {"place": "doorway"}, {}, False, [("Mia", "place_of_residence", "Oslo")]),
    ("pair", {"colour": "red"}, {"colour": "red"}, False, [("Mia", "peer", "Leo")]),
    ("pair", {"colour": "red"}, {"colour": "red"}, True, [("Mia", "couple", "Leo")]),
    ("pair", {"colour": "red"}, {"colour": "blue"}, False, []),
])
def test_the_rules(kind, left, right, umbrella, expected):
    other = {"match": "Falcons", "award": "gold cup", "home": "Oslo", "pair": ""}[kind]
    people = [Thing("person", 0, 0, 50, **facts) for facts in (left, right)]
    post = posts.Post(Scene(kind, people, "", "", umbrella), ("Mia", "Leo"), other, False)
    assert [(head, relation, tail) for head, _, tail, _, relation in posts.quintuples(post)] == expected


def test_the_same_seed_writes_the_same_bytes_and_another_seed_does_not(tmp_path):
    def content(name, seed):
        posts.write_world(tmp_path / name, seed=seed, train=5, valid=2, test=3)
        files = sorted(path for path in (tmp_path / name).rglob("*") if path.is_file())
        return {str(path.relative_to(tmp_path / name)): path.read_bytes() for path in files}

    first = content("first", 5)
    assert first == content("second", 5) and len(first) == 10 + 4  # images; three splits, expert.jsonl
    other = content("other", 6)
    assert all(first[name] != other[name] for name in first)


def test_the_reader_takes_every_split_and_both_sizes_of_answer_occur(world, samples):
    for split, count in (("train", TRAIN), ("val", 5), ("test", TEST)):
        assert len(jmere.load(world / "JMERE", split)) == count
    sizes = Counter(len(sample.quintuples) for sample in samples)
    assert set(sizes) == {1, 2} and sizes[2] > TEST / 5
    assert {quintuple[-1] for sample in samples for quintuple in sample.quintuples} == set(samples[0].relations)


def annotated(world, tmp_path):
    annotate.main(["--task", "jmere", "--data", str(world / "JMERE"), "--fraction", "1", "--candidates", "3",
                   "--repredict", "True", "--score", "True", "--expert", f"file:{world / 'expert.jsonl'}",
                   "--output", str(tmp_path / "cot.jsonl")])
    return ([json.loads(line) for line in (tmp_path / "cot.jsonl").read_text().splitlines()],
            json.loads((tmp_path / "cot.report.json").read_text()))


def test_every_filter_has_work_and_posts_survive_by_their_other_candidates(world, tmp_path):
    lines, report = annotated(world, tmp_path)
    left = [stage["candidates"] for stage in report["stages"].values()]
    assert left[0] == 3 * TRAIN and all(before > after for before, after in zip(left, left[1:]))
    assert len(lines) / TRAIN > 0.97
    assert {"answer is not the gold one", "</think> missing", "a malformed quintuple",
            "re-prediction is not the gold answer", "score below 0.7"} == set(report["fallen"])


def test_who_imitates_the_expert_calls_hard_posts_unclear_though_its_answers_are_right(world, tmp_path):
    """No filter finds fault with an expert that was told the answer and has not looked."""
    lines, _ = annotated(world, tmp_path)
    made = {f"train/{index}": posts.make_sample(3, "train", index)[0] for index in range(TRAIN)}
    sample = jmere.load(world / "JMERE", "train")[0]  # it knows types and relations
    unclear = {True: [], False: []}
    for line in lines:
        post = made[line["id"]]
        unclear[post.scene.hard].append("unclear" in line["response"])
        assert set(rewards.parse(line["response"], sample)) == set(posts.quintuples(post))
    assert 0.6 < sum(unclear[True]) / len(unclear[True]) < 0.9 and not any(unclear[False])


def test_an_answer_of_the_expert_is_short(world):
    responses = [json.loads(line)["response"] for line in (world / "expert.jsonl").read_text().splitlines()]
    assert max(map(len, responses)) < 320


def test_the_program_writes_posts_and_a_model(tmp_path, capsys):
    main(["--task", "jmere", "--output", str(tmp_path), "--train", "12", "--valid", "2", "--test", "2"])
    assert "JMERE/ (12 + 2 + 2 samples)" in capsys.readouterr().out
    assert (tmp_path / "model" / "model.safetensors").is_file() and not (tmp_path / "MORE").exists()
