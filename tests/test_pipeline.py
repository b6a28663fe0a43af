"""The programs as a user runs them, on a very small world, over two processes: each is a real run of few steps."""

import json
import os
import sys
from types import SimpleNamespace

import pytest
import torch

import data.more
import grpo.train
from data.task import resolve_task, sample_hash
from grpo.runtime.run import read_lines
from grpo.runtime.settings import run_program
from programs import COMMON, begin, lines, succeed, tensors


def test_stage_1_learns_and_keeps_the_best_by_validation(folder):
    metrics = lines(folder / "sft" / "metrics.jsonl")
    losses = [line["loss"] for line in metrics if "loss" in line]
    assert losses[-1] < 0.8 * losses[0]
    assert sum("valid/f1" in line for line in metrics) == 2
    assert "f1" in json.loads((folder / "sft" / "best.json").read_text())["valid"]


def test_the_split_holds_every_sample_that_the_cold_start_did_not_draw(folder):
    drawn = set(json.loads((folder / "cold_start.drawn.json").read_text()))
    answered = [line["id"] for line in lines(folder / "split" / "predictions.jsonl")]
    samples = {sample.id: sample for sample in data.more.load(folder / "world" / "MORE", "train")}
    for name in ("split/predictions.jsonl", "cold_start.jsonl"):
        assert all(line["sample"] == sample_hash(resolve_task("more"), samples[line["id"]])
                   for line in lines(folder / name))
    assert set(answered) == {f"train/{i}" for i in range(60)} - drawn and len(answered) == len(set(answered))


def test_the_metrics_of_an_update_stand_under_trls_names(folder):
    updates = [line for line in lines(folder / "grpo" / "metrics.jsonl") if "reward" in line]
    assert len(updates) == 3
    names = {"reward", "reward_std", "frac_reward_zero_std", "kl", "entropy", "clip_ratio/low_mean",
             "clip_ratio/high_mean", "completions/mean_length", "completions/clipped_ratio", "rewards/format/mean",
             "rewards/length/mean", "rewards/answer/mean", "grad_norm", "learning_rate", "step_time", "seconds/rollout",
             "seconds/reference", "seconds/update"}
    assert all(names <= set(line) and line["prompts"] == 4 for line in updates)


def test_what_is_frozen_has_not_moved_by_a_bit_and_what_trains_has(folder):
    before, after = tensors(folder / "world" / "model"), tensors(folder / "sft" / "model")
    assert all(not torch.equal(before[name], after[name]) for name in before)  # the whole tiny model trains in Stage 1
    text = (folder / "grpo" / "settings.json").read_text()
    assert json.loads(text)["settings"]["train_vision"] is False


def test_stage_2_leaves_the_vision_encoder_and_projector_as_they_were(folder, tmp_path):
    out = tmp_path / "grpo"
    succeed("grpo.train", "--model", folder / "sft" / "model", "--data", folder / "world" / "MORE", "--output", out,
            "--max_rollouts", 1, "--learning_rate", 1e-2, "--prompts_per_rollout", 2, "--group_size", 8,
            "--valid_split", "", "--reward_options", "min_length=60", *COMMON)
    before, after = tensors(folder / "sft" / "model"), tensors(out / "model")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and not any(name.startswith("visual.") for name in moved)


def test_an_evaluation_writes_a_prediction_for_every_sample_in_order(folder):
    predictions = lines(folder / "test" / "predictions.jsonl")
    assert [line["id"] for line in predictions] == [f"test/{i}" for i in range(12)]
    metrics = json.loads((folder / "test" / "metrics.json").read_text())
    assert metrics["accuracy"] == sum(line["correct"] for line in predictions) / 12
    by_label = json.loads((folder / "test" / "per_label.json").read_text())
    assert sum(row["support"] for row in by_label.values()) == 12 and "/per/org/member_of" in by_label
    assert sum(row["right"] for row in by_label.values()) == sum(line["correct"] for line in predictions)


def test_in_a_terminal_a_bar_shows_the_work_and_the_result_stands_below_it(folder, tmp_path):
    import pty

    terminal, end = pty.openpty()
    process = begin("-m", "grpo.train", "--model", folder / "sft" / "model", "--data", folder / "world" / "MORE",
                    "--output", tmp_path, "--max_rollouts", 2, "--prompts_per_rollout", 2, "--group_size", 2, *COMMON,
                    stdout=end, stderr=end)
    os.close(end)
    shown = b""
    while True:
        try:
            piece = os.read(terminal, 4096)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        shown += piece
    text = shown.decode(errors="replace")
    assert process.wait(timeout=60) == 0, text
    assert "GRPO:" in text and "validate:" in text and "update:" in text and "2/2  reward" in text
    assert "rollout:" in text and "token/s" in text  # tokens with their rate


def test_one_process_and_two_give_the_same_answers_with_real_interpreters_under_a_real_torchrun(folder, tmp_path):
    words = ["--model", folder / "grpo" / "model", "--data", folder / "world" / "MORE", *COMMON]
    succeed("grpo.evaluate", *words, "--output", tmp_path / "two", processes=2, interpreter=sys.executable)
    assert lines(tmp_path / "two" / "predictions.jsonl") == lines(folder / "test" / "predictions.jsonl")


def test_the_comparison_is_a_table_and_the_same_numbers_as_json(folder, tmp_path):
    text = succeed("grpo.compare", f"sft={folder / 'split'}", f"grpo={folder / 'test'}", "--output",
                   tmp_path / "results.json")
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results) == {"sft", "grpo"} and set(results["sft"]) == {"accuracy", "precision", "recall", "f1"}
    assert f"{100 * results['grpo']['accuracy']:.2f}" in text


BAD = {
    "an unknown setting": (["--epoch", "3"], "no setting --epoch; did you mean epochs"),
    "an unknown task": (["--task", "mroe"], "mroe"),
    "a group of one": (["--group_size", "1"], "--group_size is 1"),
    "no such data": (["--data", "nowhere"], "nowhere"),
    "no such model": (["--model", "nowhere/else"], "nowhere/else"),
    "a split that is not there": (["--split", "tarin"], "tarin"),
    "an unknown metric": (["--valid_metric", "f2"], "--valid_metric f2: the task offers f1"),
    "an unknown option of the reward": (["--reward_options", "min_lenth=3"], "min_lenth"),
    "greedy rollouts": (["--temperature", "0"], "--temperature is 0"),
    "an output that is a file": (["--output", __file__], "test_pipeline.py"),
    "an unknown reward": (["--reward_weights", "fromat=1"], "fromat"),
}


@pytest.mark.parametrize("line,expected", [
    ("{broken", "2: found '{broken'; expected a JSON object with id and correct"),
    ('{"id": "test/0", "correct": null}', "2: found .*; expected a JSON object with id and correct"),
    ('{"id": "test/0"}', "2: found None for 'correct'; expected a JSON object with id and correct"),
    ('{"id": "test/99", "correct": true}', "2: found 'test/99'; expected the id of a sample of the split"),
])
def test_a_line_about_no_sample_is_refused_by_its_number(tmp_path, line, expected):
    path = tmp_path / "predictions.jsonl"
    path.write_text('{"id": "test/0", "correct": true, "completion": "a\u2028b"}\n' + line)
    with pytest.raises(ValueError, match="predictions.jsonl:" + expected):
        read_lines(str(path), [SimpleNamespace(id="test/0")], "correct", bool)
    path.write_text("")
    with pytest.raises(ValueError, match="predictions.jsonl: empty"):
        read_lines(str(path), [], "correct", bool)


@pytest.mark.parametrize("words,expected", BAD.values(), ids=BAD.keys())
def test_bad_input_ends_in_one_line_before_any_training(folder, tmp_path, monkeypatch, capsys, words, expected):
    given = {"--model": folder / "sft" / "model", "--data": folder / "world" / "MORE", "--output": tmp_path / "out",
             "--predictions": folder / "split" / "predictions.jsonl", **dict(zip(COMMON[::2], COMMON[1::2]))}
    given |= dict(zip(words[::2], words[1::2]))
    monkeypatch.setattr(sys, "argv", ["grpo.train", *[str(word) for pair in given.items() for word in pair]])
    with pytest.raises(SystemExit) as end:
        run_program(grpo.train.main)
    errors = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and len(errors) == 1 and errors[0].startswith("error: ") and expected in errors[0]
    assert not (tmp_path / "out" / "model").exists()
