"""The embedded text task: puzzles whose answers are right, whose splits are apart, which a seed makes again."""

import json
import re

import pytest

from data.jsonl import load, target
from data.toy.__main__ import main
from data.toy.puzzles import PUZZLES, write_puzzles
from rewards.jsonl import VERIFIERS, correct


def solve(question: str) -> int:
    numbers = list(map(int, re.findall(r"\d+", question)))
    return sum(numbers) if "+" in question else max(numbers)


def test_every_answer_is_right_and_a_kind_takes_its_turn(tmp_path):
    write_puzzles(tmp_path, 0, train=100, valid=10)
    samples = load(tmp_path, "train")
    assert len(samples) == 100 and [sample.category for sample in samples[:4]] == [*PUZZLES, *PUZZLES][:4]
    for sample in samples:
        assert (
            sample.answer == solve(sample.text)
            and sample.verifier is VERIFIERS["number"]
            and correct(target(sample), sample)
        )


def test_no_question_is_in_two_splits_and_a_seed_makes_the_same_again(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_puzzles(tmp_path / name, seed, train=300, valid=20, test=50)
    texts = lambda name: [path.read_text() for path in sorted((tmp_path / name).iterdir())]
    assert texts("a") == texts("b") != texts("c")
    questions = [json.loads(line)["question"] for text in texts("a") for line in text.splitlines()]
    assert len(questions) == 370 == len(set(questions))


def test_the_program_writes_them_and_no_model(tmp_path, capsys):
    main(["--task", "text", "--output", str(tmp_path), "--train", "6", "--valid", "2", "--test", "3"])
    assert capsys.readouterr().out == f"{tmp_path}: TEXT/ (6 + 2 + 3 questions)\n"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["TEXT", "test.jsonl", "train.jsonl", "valid.jsonl"]
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        main(["--task", "text", "--output", str(tmp_path / "file"), "--train", "6"])


def test_the_demos_puzzles_exist_and_more_than_there_are_is_an_error(tmp_path, capsys):
    main(["--task", "text", "--output", str(tmp_path), "--train", "2000", "--valid", "40", "--test", "200"])
    with pytest.raises(SystemExit):
        main(["--task", "text", "--output", str(tmp_path), "--train", "6000"])
    assert re.search(r"error: train: 6000 puzzles asked for, \d+ found that differ", capsys.readouterr().err)
