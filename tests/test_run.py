"""A run from its lock to its last line: which weights it leaves, who may be in its folder, how it is told to stop."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from programs import ROOT, lines, tensors
from test_checkpoints import newest, run, trained, words_of

import data.more
import grpo.runtime.checkpoints
import grpo.runtime.liveness
import grpo.runtime.run
import grpo.train
import rewards.more
import sft.train
from data.task import resolve_task, sample_hash
from grpo.runtime.checkpoints import Checkpoints
from grpo.runtime.run import read_ids, read_lines


def measured(monkeypatch, values):
    """The validations' figures, one after the other."""
    values = iter(values)
    real = rewards.more.metrics
    monkeypatch.setattr(rewards.more, "metrics", lambda texts, samples: {**real(texts, samples), "f1": next(values)})


# ── which weights ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("more", [[], ["--lora_rank", 4]], ids=["weights", "an adapter"])
def test_where_nothing_was_better_than_the_start_that_is_said_and_the_last_weights_are_kept_too(
        folder, tmp_path, monkeypatch, capsys, more):
    measured(monkeypatch, [0.0, 0.9, 0.1])  # the first one tells the names of the metrics
    run(grpo.train, [*words_of(grpo.train, folder, tmp_path), "--max_rollouts", 2, "--validate_every", 2,
                     "--reward_options", "min_length=90", *more])
    start, model, last = (tensors(place) for place in (folder / "sft" / "model", tmp_path / "model", tmp_path / "last"))
    assert all(torch.equal(start[name], model[name]) for name in start)
    assert any(not torch.equal(start[name], last[name]) for name in start)
    said = capsys.readouterr().out.splitlines()[-1]
    assert (
        f"{tmp_path / 'model'} (step 0 of 2, best f1 0.9000: the model that it began with), {tmp_path / 'last'} (step "
        f"2)"
        in said
    )
    assert (tmp_path / "last_adapter").exists() == bool(more)


def test_of_equal_validations_the_newer_is_kept_and_is_the_last_without_a_second_copy(
    folder, tmp_path, monkeypatch, capsys
):
    measured(monkeypatch, [0.0] * 3)
    run(sft.train, words_of(sft.train, folder, tmp_path))
    steps = lines(tmp_path / "metrics.jsonl")[-1]["step"]
    assert json.loads((tmp_path / "best.json").read_text())["step"] == steps
    assert f"(step {steps} of {steps}, best f1 0.0000), " in capsys.readouterr().out.splitlines()[-1]
    files = [place / "model.safetensors" for place in (tmp_path / "model", tmp_path / "last")]
    assert os.path.samefile(*files)


def test_without_a_validation_model_and_last_are_the_last_step(folder, tmp_path, capsys):
    run(sft.train, [*words_of(sft.train, folder, tmp_path), "--valid_split", "", "--epochs", 1])
    assert "model (step 3 of 3), " in capsys.readouterr().out.splitlines()[-1]
    assert (tmp_path / "last" / "config.json").exists()


# ── one run in a folder ──────────────────────────────────────────────────────────────────────────────────────────


def test_a_second_run_in_the_folder_is_told_who_is_there_and_after_a_kill_it_gets_in_at_once(folder, tmp_path):
    hold = "import sys; from pathlib import Path; from grpo.runtime.files import hold_lock\n" \
           "print(hold_lock(Path(sys.argv[1]))[0], flush=True); sys.stdin.read()"
    first = subprocess.Popen([sys.executable, "-c", hold, tmp_path / ".lock"], cwd=ROOT, stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE)
    assert first.stdout.readline() == b"True\n"
    words = [*words_of(sft.train, folder, tmp_path), "--epochs", 1]
    with pytest.raises(ValueError,
                       match=rf"{tmp_path}: another run is at work there \(process {first.pid} on \S+, since .*\); "
                             "wait, or choose another --output"):
        run(sft.train, words)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]  # nothing was touched
    first.kill()
    first.wait()
    assert run(sft.train, words) == 3


def test_where_no_lock_can_be_held_a_run_says_so_and_goes_on(folder, tmp_path, monkeypatch, capsys):
    def none(*_, **__):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(grpo.runtime.run, "hold_lock", none)
    assert run(sft.train, [*words_of(sft.train, folder, tmp_path), "--epochs", 1]) == 3
    assert (
        "no lock can be held there ([Errno 37] No locks available); a second run in it would go unnoticed"
        in capsys.readouterr().out
    )


# ── told to stop ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_ctrl_c_ends_the_run_after_the_step_and_one_passed_on_is_the_same_one(folder, tmp_path, monkeypatch, capsys):
    words, real, steps = [*words_of(sft.train, folder, tmp_path), "--checkpoint_every", 0], sft.train.step, []

    def interrupted(*arguments):
        steps.append(0)
        if len(steps) == 2:
            for _ in range(2):  # the terminal's and torchrun's
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.05)
        return real(*arguments)

    monkeypatch.setattr(sft.train, "step", interrupted)
    with pytest.raises(SystemExit) as end:
        run(sft.train, words)
    said = capsys.readouterr().out
    assert end.value.code == 130 and len(steps) == 2 and newest(tmp_path).name == "step-00000002"
    assert "SIGINT: ending after this step, with a checkpoint; Ctrl-C again ends at once\n" in said
    assert f"stopped after step 2 by SIGINT; the same command goes on from {newest(tmp_path)}\n" in said
    monkeypatch.setattr(sft.train, "step", real)
    assert run(sft.train, words) == 4


def test_a_second_ctrl_c_ends_at_once_whatever_the_run_is_waiting_for():
    wait = "import threading, grpo.runtime.liveness as l\n" \
           "l.StopSignals.AGAIN = 0.2; l.StopSignals(); print('waiting', flush=True); threading.Event().wait()"
    process = subprocess.Popen([sys.executable, "-c", wait], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(signal.SIGINT)
    assert "Ctrl-C again" in process.stdout.readline()
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == 130


# ── signs of life ────────────────────────────────────────────────────────────────────────────────────────────────


def slow(monkeypatch, module, name, moved):
    real = getattr(module, name)

    def patched(*arguments, **keywords):
        before = grpo.runtime.liveness._heartbeat["steps"]
        time.sleep(0.1)
        moved.append(grpo.runtime.liveness._heartbeat["steps"] > before)
        return real(*arguments, **keywords)

    monkeypatch.setattr(module, name, patched)


@pytest.mark.parametrize("name", ["save_file", "sha256", "sync", "write_json", "safe_open"])
def test_a_checkpoint_that_takes_long_is_no_hang(tmp_path, monkeypatch, name):
    moved, (policy, optimizer) = [], trained(1)
    monkeypatch.setattr(grpo.runtime.liveness, "BEAT", 0.01)
    slow(monkeypatch, grpo.runtime.checkpoints, name, moved)
    Checkpoints(tmp_path, 1).save(policy, optimizer, 1, {})
    again = Checkpoints(tmp_path, 1)
    again.newest()
    again.load(policy, optimizer)
    assert moved and all(moved)


@pytest.mark.parametrize("name", ["export", "fill"])
def test_neither_is_an_export_nor_a_load(folder, tmp_path, monkeypatch, name):
    moved = []
    monkeypatch.setattr(grpo.runtime.liveness, "BEAT", 0.01)
    slow(monkeypatch, grpo.runtime.run, name, moved)
    run(sft.train, [*words_of(sft.train, folder, tmp_path), "--epochs", 1])
    assert moved and all(moved)


def test_what_takes_longer_than_any_file_should_is_a_hang_after_all(monkeypatch):
    monkeypatch.setattr(grpo.runtime.liveness, "BEAT", 0.01)
    monkeypatch.setattr(grpo.runtime.liveness, "LONGEST", 0.05)
    with grpo.runtime.liveness.heartbeat_during():
        time.sleep(0.2)
        before = grpo.runtime.liveness._heartbeat["steps"]
        time.sleep(0.1)
        assert grpo.runtime.liveness._heartbeat["steps"] == before


# ── files of other data ──────────────────────────────────────────────────────────────────────────────────────────

TASK = SimpleNamespace(data=SimpleNamespace(target=lambda sample: sample.label))
OURS = [SimpleNamespace(id=f"train/{i}", text=f"text {i}", label="peer") for i in range(3)]
OTHERS = [SimpleNamespace(id=f"train/{i}", text=f"text {i}", label="none") for i in range(3)]


def written(path, samples, hashes=True):
    lines = [{"id": sample.id, "correct": True, **({"sample": sample_hash(TASK, sample)} if hashes else {})}
             for sample in samples]
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    else:
        path.write_text(json.dumps({line["id"]: line["sample"] for line in lines} if hashes
                                   else [line["id"] for line in lines]))
    return str(path)


def read(path):
    return read_lines(path, OURS, "correct", bool, TASK) if path.endswith("jsonl") else read_ids(path, OURS, TASK)


@pytest.mark.parametrize("name,where",
                         [("predictions.jsonl", "predictions.jsonl:2: train/1: "),
                          ("drawn.json", "drawn.json: train/1: ")])
def test_a_file_made_from_other_data_is_refused_although_its_ids_are_known(tmp_path, capsys, name, where):
    ours, mixed = written(tmp_path / name, OURS[:2]), written(tmp_path / f"mixed-{name}", [OURS[0], OTHERS[1]])
    assert len(read(ours)) == 2 and capsys.readouterr().out == f"{ours}: 2 of 3 samples\n"
    with pytest.raises(
        ValueError, match=rf"mixed-{where}made from other data: its sample has the hash '\w{{8}}', here it is '\w{{8}}'"
    ):
        read(mixed)


@pytest.mark.parametrize("name", ["predictions.jsonl", "ids.json"])
def test_a_file_without_hashes_is_taken_and_that_is_said(tmp_path, capsys, name):
    path = written(tmp_path / name, OTHERS[1:], hashes=False)
    assert len(read(path)) == 2
    assert (
        capsys.readouterr().out == f"{path}: 2 of 3 samples, 2 of them without a hash of the data that they come from\n"
    )


def test_where_the_data_lies_makes_no_other_sample_and_its_text_does():
    sample = data.more.Sample("train/0", Path("/a/1.jpg"), (0.5, 0.5, 1, 1), "A beats B", "A", "/org/org/peer",
                              ("none", "/org/org/peer"))
    digest = lambda **changes: sample_hash(resolve_task("more"), replace(sample, **changes))
    assert digest() == digest(image=Path("/b/1.jpg")) == digest(image=None)
    assert len({digest(), digest(text="A met B"), digest(entity="B"), digest(label="none"), digest(id="test/0")}) == 5


def claim(folders):
    from grpo.runtime.dist import rank
    from grpo.runtime.run import claim_folder

    claim_folder(folders[rank()])


def test_ranks_that_do_not_see_the_same_folder_are_told(tmp_path):
    from processes import run_processes

    run_processes(claim, 2, [tmp_path / "shared"] * 2)
    said = "ValueError: .*/one: rank 1 does not see rank 0's files; expected a folder that all share"
    with pytest.raises(Exception, match=said):
        run_processes(claim, 2, [tmp_path / "one", tmp_path / "other"])
