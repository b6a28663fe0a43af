"""Every reader of other people's files: whatever has happened to a valid file, what comes out can be used, or one
line says which file and where. 2,000 seeded mutations each (tests/mutator.py).
"""

import json
import os
import re
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from data import jmere, jsonl, more
from data.read import json_value, read_json, read_json_lines
from data.task import sample_hash
from grpo import compare, predict
from grpo.runtime.run import read_ids, read_lines
from grpo.runtime.settings import parse
from jmere_folder import post, write_jmere
from more_folder import line, write_more
from mutator import mutations
from rewards import jmere as jmere_rewards, jsonl as jsonl_rewards, more as more_rewards
from sft.annotate import file_expert
from sft.experts import read_answers
from sft.train import Settings

CASES = 2000
TASK = SimpleNamespace(data=SimpleNamespace(target=lambda sample: f"the answer of {sample.id}"))
SAMPLES = [SimpleNamespace(id=f"train/{number}") for number in range(4)]
RESPONSE = "<think> a\nb ä \U0001f642 </think> <answer>none</answer>"


def check_more(samples):
    for sample in samples:
        images, text = more.build_prompt(sample)
        assert len(images) == 2 and text.encode() and more_rewards.parse(more.target(sample), sample) == sample.label


def check_jmere(samples):
    for sample in samples:
        images, text = jmere.build_prompt(sample)
        assert len(images) == 1 and text.encode() and jmere_rewards.correct(jmere.target(sample), sample)


def check_jsonl(samples):
    for sample in samples:
        images, text = jsonl.build_prompt(sample)
        assert (
            len(images) == len(sample.images) and text.encode() and jsonl_rewards.correct(jsonl.target(sample), sample)
        )


def check_answers(answers):
    assert all(isinstance(one, str) and isinstance(answer["response"], str) for one, answer in answers.items())


def check_settings(settings):
    kinds = {"task": str, "epochs": int, "learning_rate": float, "train_vision": bool, "schedule": str}
    assert all(type(getattr(settings, name)) is kind for name, kind in kinds.items())


class Readers:
    """name → (file, the values of a valid one, how they are written, reader, what must hold for what is read)."""

    def __init__(self, folder):
        write_more(folder, [line()])
        write_jmere(folder / "jmere", 1)
        (folder / "run" / "model").mkdir(parents=True)
        responses = [{"id": one.id, "response": RESPONSE, "sample": sample_hash(TASK, one)} for one in SAMPLES[:3]]
        predictions = [{"id": one.id, "completion": RESPONSE, "correct": True, "reward": {"format": 1.0},
                        "sample": sample_hash(TASK, one)} for one in SAMPLES[:3]]
        drawn = {one.id: sample_hash(TASK, one) for one in SAMPLES[:2]}
        answers = [{**one, "tokens_in": 7, "tokens_out": 9, "request": "d1"} for one in responses]
        recipe = {"model": "m", "data": "d", "output": "o", "task": "more", "epochs": 3, "learning_rate": 1e-6,
                  "train_vision": True, "schedule": "cosine"}
        questions = [{"id": "a", "question": "What is 2 + 2?", "answer": 4, "category": "sums"},
                     {"prompt": "Which?", "choices": ["a cat", "a dog"], "answer": "B", "system": "Be short."},
                     {"problem": "Wer?", "image": "img_org/train/a.png", "solution": "so <answer>Zoë</answer>",
                      "level": [1]}]
        file, words = folder / "file.json", line(token=["Zoë", "met", "Heat"], relation="/per/per/peer")
        nothing, load = (lambda _: None), dict(missing_images="blank")
        self.all = {
            "MORE": (folder / "txt" / "train.txt", [line(), words, line()], "lines",
                     lambda: more.load(folder, "train", **load), check_more),
            "MORE's labels": (folder / "rel2id.json", {"none": 0, "/per/per/peer": 1, "/per/org/member_of": 2}, "whole",
                              lambda: more.load(folder, "train", **load), check_more),
            "JMERE": (folder / "jmere" / "train.json", [post(0), post(1)], "whole",
                      lambda: jmere.load(folder / "jmere", "train", **load), check_jmere),
            "jsonl": (folder / "q.jsonl", questions, "lines", lambda: jsonl.load(folder / "q.jsonl", "all", **load),
                      check_jsonl),
            "responses": (file, responses, "lines", lambda: read_lines(str(file), SAMPLES, "response", str, TASK),
                          lambda pairs: [text.encode() for _, text in pairs]),
            "predictions": (file, predictions, "lines", lambda: read_lines(str(file), SAMPLES, "correct", bool, TASK),
                            nothing),
            "ids": (file, drawn, "whole", lambda: read_ids(str(file), SAMPLES, TASK), nothing),
            "an expert's file": (file, responses, "lines", lambda: file_expert(str(file)), nothing),
            "an expert's answers": (file, answers, "lines", lambda: read_answers(file, "d1"), check_answers),
            "settings": (file, recipe, "whole", lambda: parse(Settings, ["--config", str(file)]), check_settings),
            "a run's settings": (folder / "run" / "settings.json",
                                 {"settings": {"task": "more", "data": "d", "max_pixels": 784}}, "whole",
                                 lambda: predict.trained_with(str(folder / "run" / "model")), nothing),
            "metrics": (folder / "run" / "metrics.json", dict.fromkeys(compare.HEADLINE, 0.5), "whole",
                        lambda: compare.read_metrics(str(folder / "run")), nothing),
        }


@pytest.fixture
def folder():
    """In memory where the system has such a place: every case writes and reads a file."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as name:
        yield Path(name)


NAMES = ("MORE", "MORE's labels", "JMERE", "jsonl", "responses", "predictions", "ids", "an expert's file",
         "an expert's answers", "settings", "a run's settings", "metrics")


@pytest.mark.parametrize("name", NAMES)
def test_a_damaged_file_is_read_or_refused_in_one_line_with_file_and_place(folder, name):
    readers = Readers(folder).all
    assert set(readers) == set(NAMES)
    file, valid, how, read, check = readers[name]
    outcomes = {"read": 0, "refused": 0}
    for content in mutations(valid, CASES, how):
        file.write_bytes(content)
        try:
            found = read()
        except (ValueError, OSError) as problem:
            said = str(problem)
            named = str(file) in said or "arguments are required" in said  # what is not there has no place
            assert named and "\n" not in said and len(said) < 500, (content[:400], said)
            assert re.search(r"\.jsonl?: |:\d+: |item \d+: |no samples in it|empty|required", said), said
            outcomes["refused"] += 1
        else:
            check(found)
            outcomes["read"] += 1
    assert min(outcomes.values()) > CASES / 20, outcomes  # the mutations are neither all harmless nor all fatal


def test_a_byte_order_mark_and_other_line_ends_are_read_over(tmp_path):
    readers = Readers(tmp_path).all
    for name, (file, valid, how, read, check) in readers.items():
        before = file.read_bytes() if file.exists() else None
        lines = [json.dumps(value, ensure_ascii=False) for value in (valid if how == "lines" else [valid])]
        file.write_bytes(b"\xef\xbb\xbf" + "\r\n".join([*lines, ""]).encode())
        check(read())
        if before is not None:
            file.write_bytes(before)


def test_half_of_a_surrogate_pair_is_mended_and_a_whole_one_is_a_character():
    assert json_value(rb'{"a": "goal \ud83d", "\uDE00": ["\ud83d\ude42"]}') == {"a": "goal ?", "?": ["\U0001f642"]}


@pytest.mark.parametrize("content, said", [
    (b"\xff\xfe{", r"f.json: not UTF-8: byte 1 is 0xff; expected a list"),
    (b"[" * 100_000, r"f.json: not JSON: nested too deeply; expected a list"),
    (b"[1, ", r"f.json: not JSON, perhaps cut off: .*; expected a list"),
])
def test_what_is_no_json_is_named(tmp_path, content, said):
    (tmp_path / "f.json").write_bytes(content)
    with pytest.raises(ValueError, match=said):
        read_json(tmp_path / "f.json", "a list")
    (tmp_path / "f.json").write_bytes(b"{}\n" + content)
    with pytest.raises(ValueError, match="f.json:2: found .*; expected a list"):
        list(read_json_lines(tmp_path / "f.json", "a list"))


@pytest.mark.parametrize("load", [more.load, jmere.load])
def test_a_file_in_the_place_of_a_datasets_folder_is_said_so(tmp_path, load):
    (tmp_path / "train.json").write_text("[]")
    with pytest.raises(
        ValueError, match=r"train.json: a file; a folder with .* expected \(--task jsonl reads questions from a file"
    ):
        load(tmp_path / "train.json", "train")


# ── grpo.compare ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("words, said", [
    ([], "the following arguments are required: NAME=FOLDER"), (["run"], "found run; expected name=folder"),
    (["a=run", "a=run"], "each name once"), (["a="], "found a=; expected name=folder"),
    (["a=gone"], "gone/metrics.json is missing"),
    (["a=run", "--ouput", "x"], "no setting --ouput; did you mean output"),
])
def test_what_cannot_be_compared_is_one_line(tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.json").write_text(json.dumps(dict.fromkeys(compare.HEADLINE, 0.5)))
    with pytest.raises(ValueError, match=said):
        compare.main(words)


def test_compare_says_how_it_is_used(capsys):
    with pytest.raises(SystemExit) as end:
        compare.main(["--help"])
    said = capsys.readouterr().out
    assert end.value.code == 0 and "NAME=FOLDER" in said and "--output" in said
