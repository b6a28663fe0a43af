"""What a run says and writes down: whole lines, bars, plain lines, event files, what ran, and the log of rollouts."""

import errno
import inspect
import json
import os
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from test_loop import make, weights

import grpo.runtime.metrics
from grpo.engine.rollout import Sampling, sample
from grpo.group import Group, Prompt
from grpo.runtime.optim import idle_pack
from grpo.runtime import log
from grpo.runtime.log import PlainProgress
from grpo.runtime.metrics import MetricsLog, append_line
from grpo.runtime.provenance import commit, fingerprint
from grpo.runtime.rollout_log import RolloutLog, describe, text_pieces
from processes import run_processes
from programs import lines
from tiny import END, pack_of, tiny_policy, tiny_prompt

LONG = "é漢字🙂"


# ── lines, bars, event files ─────────────────────────────────────────────────────────────────────────────────────


def test_a_reader_in_between_finds_only_whole_lines(tmp_path):
    path, stop, broken = tmp_path / "metrics.jsonl", threading.Event(), []

    def read():
        while not stop.is_set():
            text = path.read_bytes() if path.exists() else b""
            # what has no end of line yet is none: a file system may show half of a write that is under way
            broken.extend(line for line in text.split(b"\n")[:-1] if not line.endswith(b"}"))

    reader = threading.Thread(target=read)
    reader.start()
    for step in range(300):
        append_line(path, {"step": step, "text": "x" * 20_000})
    stop.set()
    reader.join()
    assert not broken and len(lines(path)) == 300


def test_a_line_that_finds_no_room_leaves_no_half_behind_that_the_next_would_join(tmp_path, monkeypatch):
    path, write = tmp_path / "a", os.write
    append_line(path, {"step": 1})
    monkeypatch.setattr(os, "write", lambda file, line: write(file, line[:5]))  # as a full disk does
    with pytest.raises(OSError, match="No space left on device.*/a"):
        append_line(path, {"step": 2})
    monkeypatch.undo()
    append_line(path, {"step": 3})
    assert lines(path) == [{"step": 1}, {"step": 3}]


def test_a_line_for_which_there_is_no_room_at_all_names_its_file(tmp_path, monkeypatch):
    def full(file, line):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left on device.*/a"):
        append_line(tmp_path / "a", {"step": 1})


def test_what_is_no_number_is_null_in_a_line(tmp_path):
    append_line(tmp_path / "a", {"kl": float("nan"), "loss": float("inf"), "step": 1})
    assert lines(tmp_path / "a") == [{"kl": None, "loss": None, "step": 1}]


def test_without_a_terminal_long_work_says_a_plain_line_now_and_then(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(log.time, "monotonic", lambda: now[0])
    bar = PlainProgress(1000, "rollout", "token")
    for second in range(1, 101):
        now[0] = second
        bar.update(5)
    said = capsys.readouterr().out.splitlines()
    assert said == [f"rollout: {n}/1000 tokens, 5 a second, 0:{left // 60:02}:{left % 60:02} left" for n, left in
                    ((150, 170), (300, 140), (450, 110))]


def test_all_processes_but_the_first_are_quiet(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(grpo.runtime.metrics, "rank", lambda: 1)
    monkeypatch.setattr(PlainProgress, "LINE_SECONDS", 0.0)
    log.say("a line")
    with log.progress(3, "rollout", "token") as bar:
        bar.update(3)
    MetricsLog(tmp_path / "run", events="auto").write({"step": 1})
    assert capsys.readouterr() == ("", "") and not (tmp_path / "run").exists()


def test_the_tokens_bar_ends_full_however_early_completions_end():
    done, most = [0], [0]

    def count(written, ended, spared):
        done[0] += written
        most[0] -= spared

    sampling = Sampling(12, (END, 3, 4, 5, 6, 7), 1.0, rows=3)
    most[0] = 3 * 2 * 12
    groups = sample(tiny_policy(), [tiny_prompt(seed) for seed in range(3)], 2, sampling, count)
    assert done[0] == most[0] == sum(n for group in groups for n in group.lengths) < 3 * 2 * 12


def test_event_files_that_are_asked_for_without_tensorboard_end_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match="--tensorboard on: tensorboard is not installed"):
        MetricsLog(tmp_path, events="on")
    MetricsLog(tmp_path, events="auto").write({"step": 1, "reward": 2.0})  # quiet
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 1, "reward": 2.0}]


def test_event_files_hold_the_journals_numbers(tmp_path, monkeypatch):
    said = []
    writer = SimpleNamespace(add_scalar=lambda *words: said.append(words), flush=lambda: said.append("flush"))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard",
                        SimpleNamespace(SummaryWriter=lambda folder, **_: writer))
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "tensorboard" / "events.out.tfevents.1").write_text("of the run before")
    MetricsLog(tmp_path, events="auto").write({"step": 7, "reward": 2.0, "kl": None, "prompts": 4})
    assert said == [("reward", 2.0, 7), ("prompts", 4, 7), "flush"] and not list(tmp_path.glob("tensorboard/*"))


def test_tensorboard_itself_reads_the_event_files(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard: pip install 'grpo-vlm[tensorboard]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    MetricsLog(tmp_path, events="on").write({"step": 7, "reward": 2.5})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("reward")] == [(7, 2.5)]


# ── what ran ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_fingerprint_changes_with_a_name_a_size_and_either_end_of_a_file(tmp_path):
    (tmp_path / "txt").mkdir()
    file = tmp_path / "txt" / "train.txt"
    file.write_bytes(bytes(5 * 2**20))
    seen = {fingerprint(tmp_path)}
    for place in (0, 5 * 2**20 - 1):
        with file.open("r+b") as opened:
            opened.seek(place)
            opened.write(b"x")
        seen.add(fingerprint(tmp_path))
    (tmp_path / "a.jpg").write_bytes(b"12")
    seen.add(fingerprint(tmp_path))
    (tmp_path / "a.jpg").rename(tmp_path / "b.jpg")
    seen.add(fingerprint(tmp_path))
    (tmp_path / "b.jpg").write_bytes(b"123")
    seen.add(fingerprint(tmp_path))
    assert len(seen) == 6 and seen.pop() != fingerprint(tmp_path / "txt")


def test_a_commit_is_told_only_in_a_checkout_of_this_project(tmp_path):
    assert commit(tmp_path) is None
    (tmp_path / ".git").write_text("no repository")
    assert commit(tmp_path) is None


def test_the_checkout_that_is_asked_by_default_is_the_one_that_holds_the_packages():
    root = inspect.signature(commit).parameters["root"].default
    assert (root / "setup.py").is_file() and (root / "grpo" / "runtime" / "provenance.py").is_file()


def test_what_ran_is_written_before_training(folder):
    what = json.loads((folder / "grpo" / "settings.json").read_text())
    assert what["ranks"] == 2 and {"python", "torch", "transformers"} == set(what["versions"])
    assert what["model_hash"] != what["data_hash"] and what["model_hash"] == fingerprint(folder / "sft" / "model")
    assert json.loads((folder / "test" / "settings.json").read_text())["data_hash"] == what["data_hash"]


# ── the log of rollouts ──────────────────────────────────────────────────────────────────────────────────────


def test_a_runs_first_and_last_rollouts_are_recorded_whole(folder):
    records = lines(folder / "grpo" / "rollouts.jsonl")
    assert [record["step"] for record in records] == [1, 3]
    for group in (group for record in records for group in record["groups"]):
        assert (
            group["id"].startswith("train/")
            and "<|image_pad|>" in group["prompt"]
            and group["images"][0].endswith(".png")
        )
        assert len(group["box"]) == 4 and group["entity"] in group["text"] and group["target"].startswith("<answer>")
        assert len(group["completions"]) == 3 and abs(sum(c["advantage"] for c in group["completions"])) < 1e-3
        for c in group["completions"]:
            assert (
                len(c["pieces"]) == len(c["logp"]) == len(c["ratio"]) == len(c["ref_logp"]) > 0 and max(c["logp"]) <= 0
            )
            assert "".join(c["pieces"]).startswith(c["text"]) and set(c["parts"]) == {"format", "length", "answer"}
            assert c["reward"] == sum(c["parts"].values())


def test_the_ratio_is_what_the_updates_have_made_of_the_sampled_probabilities(folder, tmp_path):
    trainer, _, samples = make(folder, tmp_path, "--updates", 1)
    drawn = trainer.sample(samples[:2], 0)
    trainer.step(samples[:2], 0, [1e-2])
    (pack, after), = trainer.rollout_log.score([pack_of(drawn)])
    after = [row[mask] for row, mask in zip(after, pack.mask)]
    rows = [c for group in sorted(lines(tmp_path / "rollouts.jsonl")[0]["groups"],
                                  key=lambda g: g["id"] != samples[0].id) for c in group["completions"]]
    sampled = [logp for group in drawn for logp in group.logps]
    for row, before, then in zip(rows, sampled, after):
        assert torch.allclose(torch.tensor(row["logp"]), before, atol=2e-4)
        assert torch.allclose(torch.tensor(row["ratio"]), (then - before).exp(), atol=2e-4)
    assert max(abs(r - 1) for row in rows for r in row["ratio"]) > 1e-3


def test_keeping_the_metrics_log_changes_no_bit_of_the_training(folder, tmp_path):
    ends = []
    for name, groups in (("with", 2), ("without", 0)):
        trainer, _, samples = make(folder, tmp_path / name, "--rollout_log_groups", groups, "--rollout_log_every", 1)
        for step in range(2):
            trainer.step(samples[2 * step : 2 * step + 2], step, [1e-3, 1e-3])
        ends.append(weights(trainer))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert (tmp_path / "with" / "rollouts.jsonl").exists() and not (tmp_path / "without" / "rollouts.jsonl").exists()


def test_the_log_scores_only_the_packs_it_shows_once_after_the_last_update(folder, tmp_path, monkeypatch):
    trainer, _, samples = make(folder, tmp_path, "--rollout_log_groups", 1, "--updates", 2, "--tokens_per_pass", 300)
    passes, policy, score, record = [], trainer.run.policy, trainer.run.policy.score, trainer.rollout_log.record
    monkeypatch.setattr(policy, "score", lambda *some: passes.append("pass") or score(*some))
    monkeypatch.setattr(trainer.rollout_log, "record", lambda *some: passes.append("log") or record(*some))
    trainer.step(samples[:4], 0, [1e-3, 1e-3])
    assert passes == [*["pass"] * 4, "log", "pass"], passes  # two updates of two packs; then the one that is shown


def one_step(folder, output):
    trainer, _, samples = make(folder, output, "--prompts_per_rollout", 4, "--rollout_log_groups", 3)
    trainer.step(samples[:4], 0, [1e-3, 1e-3])


def test_many_processes_record_the_same_groups_as_one(folder, tmp_path):
    one_step(folder, tmp_path / "one")
    run_processes(one_step, 2, folder, tmp_path / "two")
    one, two = (lines(tmp_path / name / "rollouts.jsonl")[0]["groups"] for name in ("one", "two"))
    by_name = {group["id"]: group for group in two}
    assert len(one) == 3 and {group["id"] for group in one} == set(by_name)
    for group in one:
        for a, b in zip(group["completions"], by_name[group["id"]]["completions"]):
            assert a["pieces"] == b["pieces"] and a["advantage"] == pytest.approx(b["advantage"], abs=1e-4)
            assert a["ratio"] == pytest.approx(b["ratio"],
                                               abs=1e-3) and a["ref_logp"] == pytest.approx(b["ref_logp"], abs=1e-3)


@pytest.mark.parametrize("sample,expected", [
    (SimpleNamespace(), ([], None, None)),
    (SimpleNamespace(images=["/a.png", "/b.png"], box=(0, 0, 1, 1), text="words"),
     (["/a.png", "/b.png"], [0, 0, 1, 1], "words")),
    (SimpleNamespace(image=object(), box="left", text=["words"]), ([], None, None)),
])
def test_a_sample_of_ones_own_task_is_shown_by_what_it_has(sample, expected):
    group = Group(Prompt(torch.tensor([65, 66]), torch.zeros(3, 2), sample=sample, id="mine/0"), [])
    encoder = SimpleNamespace(tokenizer=Bytes(), backbone=SimpleNamespace(IMAGE_TOKEN="<|image_pad|>"))
    run = SimpleNamespace(encoder=encoder, task=SimpleNamespace(data=SimpleNamespace(target=lambda _: "yes")))
    shown = describe(group, run)
    assert (shown["images"], shown["box"],
            shown["text"]) == expected and (shown["prompt"], shown["target"]) == ("AB", "yes")


def test_groups_that_teach_are_recorded_before_zero_variance_ones(tmp_path):
    rewards = torch.tensor([[0.0, 0.0], [1.0, -1.0], [0.0, 0.0], [0.0, 0.0], [-1.0, 1.0], [0.0, 0.0]])
    groups = [Group(Prompt(torch.tensor([1]), torch.zeros(3, 1), id=f"train/{i}"), [torch.tensor([1])] * 2, rewards=row)
              for i, row in enumerate(rewards)]
    packs = [idle_pack(), pack_of(groups[:4]), pack_of(groups[4:])]
    chosen = bare_rollout_log(tmp_path, 500).choose(packs)
    assert len(chosen) == 4 and set(chosen[:2]) == {groups[1], groups[4]}
    assert bare_rollout_log(tmp_path, 500).choose([pack_of(groups[::-1])]) == chosen  # by name, not by place


def bare_rollout_log(tmp_path, limit, every=1) -> RolloutLog:
    return RolloutLog(SimpleNamespace(output=tmp_path), 1.0, every, 4, limit)


def test_a_metrics_log_at_its_limit_stays_under_it_and_spread_over_the_run(tmp_path):
    rollout_log = bare_rollout_log(tmp_path, 10_000)
    for step in range(1000):
        if step % rollout_log.every == 0:
            rollout_log.write({"step": step + 1, "groups": ["x" * 900]})
            assert (tmp_path / "rollouts.jsonl").stat().st_size <= 10_000
    steps = [record["step"] for record in lines(tmp_path / "rollouts.jsonl")]
    assert steps[0] == 1 and 5 <= len(steps) <= 10 and set(b - a
                                                           for a, b in zip(steps, steps[1:])) == {rollout_log.every}


def test_a_record_larger_than_the_whole_metrics_log_is_left_out_and_told(tmp_path, capsys):
    rollout_log = bare_rollout_log(tmp_path, 500)
    rollout_log.write({"step": 1, "groups": ["x"]})
    rollout_log.write({"step": 2, "groups": ["x" * 900]})
    assert [record["step"] for record in lines(tmp_path / "rollouts.jsonl")] == [1]
    assert "rollout 2 is not recorded" in capsys.readouterr().out


class Bytes:
    """A tokenizer of single bytes: every character beyond ASCII is several tokens."""

    def decode(self, tokens, **_):
        return bytes(tokens).decode(errors="replace")


@pytest.mark.parametrize("text",
                         [b"plain", LONG.encode(), b"\xff\xfe broken \xe6\xbc", "a\ufffdb".encode(), b"\xff" * 9])
def test_the_pieces_of_a_text_join_to_it_and_no_character_is_torn(text):
    pieces = text_pieces(Bytes(), list(text))
    assert len(pieces) == len(text) and "".join(pieces) == text.decode(errors="replace")


def test_a_character_of_several_tokens_stands_with_its_last_one():
    assert text_pieces(Bytes(), list("é🙂".encode())) == ["", "é", "", "", "", "🙂"]


def test_bytes_that_are_no_text_do_not_pile_up_on_the_last_token():
    assert max(map(len, text_pieces(Bytes(), [0xFF] * 20))) == 5
