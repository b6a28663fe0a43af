"""The JMERE reader: what it makes of a post, what it refuses, and the real text where it is at hand."""
import json
import logging
import os
from pathlib import Path

import pytest
from PIL import Image

from data import check, jmere
from rewards.jmere import correct, parse, reward

TOKENS = "RT @WLWT : Bill Cosby 's star on Hollywood Walk of Fame".split()


def entity(tokens, start, end, kind):
    return {"name": " ".join(tokens[start:end]), "pos": [start, end], "tags": kind}


def post(**changes) -> dict:
    pair = {"beg_ent": entity(TOKENS, 3, 5, "per"), "sec_ent": entity(TOKENS, 8, 12, "misc"),
            "relation": "present_in"}
    return {"token": TOKENS, "img_id": "a.jpg", "label_list": [[pair | changes.pop("pair", {})]]} | changes


@pytest.fixture
def folder(tmp_path):
    write(tmp_path, "train", [post(), post(img_id="b.jpg")])
    (tmp_path / "images").mkdir()
    for name in ("a.jpg", "b.jpg"):
        Image.new("RGB", (40, 30), "red").save(tmp_path / "images" / name)
    return tmp_path


def write(folder: Path, split: str, posts) -> None:
    (folder / f"{split}.json").write_text(json.dumps(posts), encoding="utf-8")


def test_a_post_becomes_a_sample_without_its_retweet_mark(folder):
    first, second = jmere.load(folder, "train")
    assert (first.id, second.id) == ("train/0", "train/1")
    assert first.text == "@WLWT : Bill Cosby 's star on Hollywood Walk of Fame"
    assert first.quintuples == (("Bill Cosby", "per", "Hollywood Walk of Fame", "misc", "present_in"),)
    assert second.image == folder / "images" / "b.jpg"
    assert jmere.target(first) == ("<answer>\n[Bill Cosby, per, Hollywood Walk of Fame, misc, present in]\n"
                                   "</answer>")
    assert jmere.stratum(first) == "present_in"
    assert not jmere.is_none(first)


@pytest.mark.parametrize("start, end, mention", [
    (0, 2, "@WLWT"),  # begins with the mark that the text loses
    (0, 1, "RT"),  # nothing else would be left
    (1, 2, "@WLWT"),
])
def test_a_mention_loses_the_retweet_mark_with_its_text(folder, start, end, mention):
    write(folder, "train", [post(pair={"beg_ent": entity(TOKENS, start, end, "org")})])
    assert jmere.load(folder, "train")[0].quintuples[0][0] == mention


def test_only_a_leading_word_that_is_rt_is_the_retweet_mark(folder):
    tokens = "RTs for RT @a".split()
    pair = {"beg_ent": entity(tokens, 0, 1, "org"), "sec_ent": entity(tokens, 2, 4, "org")}
    write(folder, "train", [post(token=tokens, pair=pair)])
    sample = jmere.load(folder, "train")[0]
    assert sample.text == "RTs for RT @a"
    assert sample.quintuples[0][:3:2] == ("RTs", "RT @a")


def test_relations_are_those_of_all_splits_as_the_data_spells_them(folder):
    write(folder, "val", [post(pair={"relation": "alumi"}), post(pair={"relation": "held_on"})])
    assert jmere.load(folder, "train")[0].relations == ("alumi", "held_on", "present_in")
    assert jmere.load(folder, "train")[0].types == ("loc", "misc", "org", "per")


def test_the_prompt_holds_one_image_the_text_and_the_lists(folder):
    sample = jmere.load(folder, "train")[0]
    images, text = jmere.build_prompt(sample)
    assert [image.size for image in images] == [(40, 30)]
    for part in (sample.text, "per (person)", "present in", "[head, head type, tail, tail type, relation]",
                 "<think></think>", "<answer></answer>"):
        assert part in text
    assert "present_in" not in text and "Bill Cosby, per" not in text


def test_the_zero_shot_prompt_is_the_same_without_the_reasoning_instruction(folder):
    sample = jmere.load(folder, "train")[0]
    (_, full), (_, short) = jmere.build_prompt(sample), jmere.build_prompt(sample, reasoning=False)
    assert "think" not in short
    assert [line for line in full.split("\n") if "<think>" not in line] == short.split("\n")


@pytest.mark.parametrize("place", ["images", "images/train", "img_org/train", "."])
def test_images_are_found_in_every_place_that_is_looked_in(tmp_path, place):
    write(tmp_path, "train", [post()])
    (tmp_path / place).mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30)).save(tmp_path / place / "a.jpg")
    assert jmere.load(tmp_path, "train")[0].image == tmp_path / place / "a.jpg"


def test_missing_images_stop_with_their_count_and_first_names(folder):
    write(folder, "train", [post()] + [post(img_id=f"{i}.jpg") for i in range(5)])
    with pytest.raises(FileNotFoundError, match=r"train\.json: 5 of 6 .*: 0.jpg, 1.jpg, 2.jpg \(") as problem:
        jmere.load(folder, "train")
    assert "\n" not in str(problem.value)


def test_missing_images_can_be_dropped_and_the_others_keep_their_ids(folder, caplog):
    (folder / "images" / "a.jpg").unlink()
    with caplog.at_level(logging.WARNING):
        samples = jmere.load(folder, "train", missing_images="drop")
    assert [sample.id for sample in samples] == ["train/1"]
    assert "1 of 2 posts" in caplog.text and "left out" in caplog.text


def test_missing_images_can_be_grey(folder):
    (folder / "images" / "a.jpg").unlink()
    first, second = jmere.load(folder, "train", missing_images="blank")
    assert first.image is None and second.image is not None
    (image,), _ = jmere.build_prompt(first)
    assert image.mode == "RGB" and image.getextrema() == ((128, 128),) * 3


def test_nothing_left_after_dropping_is_an_error(folder):
    for name in ("a.jpg", "b.jpg"):
        (folder / "images" / name).unlink()
    with pytest.raises(ValueError, match="none is left"):
        jmere.load(folder, "train", missing_images="drop")


def test_an_unreadable_image_is_named_with_its_post(folder):
    (folder / "images" / "b.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match="train/1.*b.jpg"):
        jmere.load(folder, "train", missing_images="blank")


PERSON = entity(TOKENS, 3, 5, "per")
WRONG_POSTS = {
    "no object": ("post", "'token' is missing"),
    "no tokens": ({"img_id": "a.jpg", "label_list": [[{}]]}, "'token' is missing"),
    "empty tokens": (post(token=[]), "'token' is \\[\\]"),
    "a number among the tokens": (post(token=["RT", 5]), "a list of words expected"),
    "no image": (post(img_id=""), "'img_id'"),
    "an image elsewhere": (post(img_id="../a.jpg"), "bare name"),
    "no labels": (post(label_list=[]), "'label_list' is \\[\\]"),
    "an empty label": (post(label_list=[[]]), "one-element lists"),
    "labels one level too high": (post(label_list=post()["label_list"][0]), "one-element lists"),
    "no head": (post(label_list=[[{"sec_ent": PERSON, "relation": "peer"}]]), "'beg_ent' is missing"),
    "no relation": (post(pair={"relation": None}), "'relation' is missing"),
    "a relation with a comma": (post(pair={"relation": "peer, of"}), "relation 'peer, of'"),
    "an unknown type": (post(pair={"beg_ent": PERSON | {"tags": "person"}}), "type 'person'; one of loc"),
    "a span that is no pair": (post(pair={"beg_ent": PERSON | {"pos": [3]}}), "span \\[3\\]"),
    "a span of text": (post(pair={"beg_ent": PERSON | {"pos": ["3", "5"]}}), "span \\['3', '5'\\]"),
    "a backward span": (post(pair={"beg_ent": PERSON | {"pos": [5, 3]}}), "span \\[5, 3\\]"),
    "a negative span": (post(pair={"beg_ent": PERSON | {"pos": [-9, 5]}}), "span \\[-9, 5\\]"),
    "a span over the end": (post(pair={"beg_ent": PERSON | {"pos": [3, 13]}}), "in 12 words"),
    "a span that reads otherwise": (post(pair={"beg_ent": PERSON | {"pos": [3, 4]}}),
                                    "reads 'Bill', but the entity's name is 'Bill Cosby'"),
}


@pytest.mark.parametrize("wrong, message", WRONG_POSTS.values(), ids=WRONG_POSTS.keys())
def test_a_wrong_post_is_one_line_with_file_and_item(folder, wrong, message):
    write(folder, "train", [post(), wrong])
    with pytest.raises(ValueError, match=rf"train\.json, item 1: .*{message}") as problem:
        jmere.load(folder, "train")
    assert "\n" not in str(problem.value)


@pytest.mark.parametrize("content, message", [
    (json.dumps([post()])[:-40], "cut off"), ("", "cut off"), ("\xff", "not UTF-8"),
    ("[" * 100_000, "nested too deeply"), ("[]", "a list of posts"), ("{}", "a list of posts"),
])
def test_a_wrong_file_is_one_line_with_its_name(folder, content, message):
    (folder / "train.json").write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=rf"train\.json: .*{message}") as problem:
        jmere.load(folder, "train")
    assert "\n" not in str(problem.value)


def test_a_split_or_folder_that_is_not_there_is_said_so(folder):
    with pytest.raises(FileNotFoundError, match=r"test\.json is missing; the folder has train"):
        jmere.load(folder, "test")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        jmere.load(folder / "nowhere", "train")
    with pytest.raises(ValueError, match="'skip'; one of stop, drop, blank"):
        jmere.load(folder, "train", missing_images="skip")


def test_the_check_command_prints_counts_or_one_line(folder, capsys):
    write(folder, "val", [post(pair={"relation": "peer"})])
    assert check.main("jmere", ["--check", str(folder)]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["posts", "2", "1"] in rows and ["peer", "(per,", "misc)", "0", "1"] in rows
    (folder / "val.json").write_text("[")
    assert check.main("jmere", ["--check", str(folder)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {folder / 'val.json'}")


def test_a_post_of_the_users_own_is_asked_like_one_of_the_dataset(folder):
    sample = jmere.load(folder, "train")[0]
    own = jmere.sample_from(sample.image, " ".join(TOKENS), data=folder)
    assert jmere.build_prompt(own)[1] == jmere.build_prompt(sample)[1] and own.image == sample.image
    assert (own.quintuples, own.relations) == ((), ("present_in",))
    assert jmere.sample_from(None, "a b").relations == jmere.RELATIONS
    with pytest.raises(ValueError, match="text is empty"):
        jmere.sample_from(None, "  ")
    with pytest.raises(FileNotFoundError, match="gone.jpg"):
        jmere.sample_from("gone.jpg", "a b")


def test_a_quintuple_that_stands_twice_counts_once(folder):
    write(folder, "train", [post(label_list=post()["label_list"] * 2)])
    assert len(jmere.load(folder, "train", missing_images="blank")[0].quintuples) == 1


needs_real_data = pytest.mark.skipif("MORE_JMERE_DATA" not in os.environ,
                                     reason="MORE_JMERE_DATA names no folder with the real data")


@needs_real_data
@pytest.mark.parametrize("split, posts, quintuples", [("train", 3618, 4503), ("val", 496, 624)])
def test_every_real_gold_answer_reads_back_and_earns_everything(split, posts, quintuples):
    samples = jmere.load(Path(os.environ["MORE_JMERE_DATA"]) / "jmere", split, missing_images="blank")
    assert (len(samples), sum(len(sample.quintuples) for sample in samples)) == (posts, quintuples)
    assert samples[0].relations == jmere.RELATIONS and len(jmere.RELATIONS) == 21
    for sample in samples:
        answer = jmere.target(sample)
        assert parse(answer, sample) == list(sample.quintuples), sample.id
        assert correct(answer, sample)
        parts = reward(f"<think>x</think>{answer}", sample)
        assert parts == {"quintuple": 1, "partial": 2, "format": 1}, sample.id


@needs_real_data
def test_every_real_mention_stands_in_its_text():
    for sample in jmere.load(Path(os.environ["MORE_JMERE_DATA"]) / "jmere", "train", missing_images="blank"):
        for head, _, tail, _, _ in sample.quintuples:
            assert f" {head} " in f" {sample.text} " and f" {tail} " in f" {sample.text} ", sample.id
