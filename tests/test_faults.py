"""What happens to real runs happens to these: killed, told to stop, no room on the disk, not a number, a hang."""

import os
import re
import resource
import signal
import subprocess
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from test_checkpoints import newest, same_run, trained, words_of as words_of_sft
from test_loop import make

import grpo.train
import sft.train
from grpo.runtime.checkpoints import Checkpoints
from grpo.group import Pack
from grpo.runtime.liveness import verdict
from grpo.runtime.run import Run
import programs
from programs import COMMON, ROOT, end, lines
from tiny import IMAGE, tiny_groups, tiny_policy

def words_of(folder, output, *more):
    return ["--model", folder / "sft" / "model", "--data", folder / "world" / "MORE", "--output", output,
            "--max_rollouts", 5, "--predictions", folder / "split" / "predictions.jsonl", "--learning_rate", 1e-3,
            "--prompts_per_rollout", 2, "--group_size", 3, "--reward_options", "min_length=60", "--checkpoint_every", 1,
            "--rollout_log_groups", 1, "--valid_samples", 4, "--zero_variance_groups", "dropped", *COMMON, *more]


def begin(words, processes=2, restarts=0, faults="", program="grpo.train", **more):
    return programs.begin(ROOT / "tests" / "faulty.py", *words, processes=processes, restarts=restarts,
                          environment={"FAULTS": faults, "PROGRAM": program}, **more)


@pytest.fixture(scope="module")
def undisturbed(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed")
    status, text = end(begin(words_of(folder, output)))
    assert status == 0, text
    return output


def test_killed_in_every_phase_and_restarted_by_torchrun_it_ends_with_the_same_result(folder, undisturbed, tmp_path):
    faults = "rollout:kill@0 score:kill@1 update:kill@2 writing:kill@3"
    status, text = end(begin(words_of(folder, tmp_path), restarts=4, faults=faults))
    assert status == 0, text
    assert text.count("fault: kill") == 4
    # the first restart began with the checkpoint before it, and so on: nothing was done three times
    assert re.findall(r"going on after step (\d)", text) == ["1", "2", "2", "3"]
    same_run(undisturbed, tmp_path)


def test_sft_killed_in_the_middle_of_an_epoch_ends_with_the_same_result(folder, tmp_path):
    texts = []
    for name, restarts, faults in (("whole", 0, ""), ("killed", 2, "update:kill@0 writing:kill@1")):
        words = words_of_sft(sft.train, folder, tmp_path / name)
        status, text = end(begin(words, restarts=restarts, faults=faults, program="sft.train"))
        assert status == 0, text
        texts.append(text)
    assert re.findall(r"going on after step (\d)", texts[1]) == ["1", "2"]  # of three updates an epoch
    same_run(tmp_path / "whole", tmp_path / "killed")


def stop_after(process, output, rollouts, number=signal.SIGTERM):
    """A signal as soon as so many rollouts are behind it."""
    for _ in range(1200):
        if (output / "metrics.jsonl").exists() and len((output / "metrics.jsonl").read_bytes().splitlines()) > rollouts:
            return process.send_signal(number)
        time.sleep(0.1)
    raise AssertionError("it did not get that far")


@pytest.mark.parametrize("processes,number,status", [(0, signal.SIGTERM, 143), (2, signal.SIGINT, 130)],
                         ids=["one process by SIGTERM", "two by Ctrl-C"])
def test_told_to_stop_it_writes_a_checkpoint_and_goes_on_from_there(folder, undisturbed, tmp_path, processes, number,
                                                                    status):
    words = words_of(folder, tmp_path, "--checkpoint_every", 0)
    process = begin(words, processes)
    stop_after(process, tmp_path, 2, number)
    found, text = end(process)
    assert found == status and re.search(
        rf"stopped after step \d by {number.name}; the same command goes on from \S+\Z", text.strip()
    ), text
    assert text.count("ending after this step") == 1 and "Traceback" not in text and "Warning" not in text
    stopped = int(newest(tmp_path).name.removeprefix("step-"))
    assert 2 <= stopped < 5
    status, text = end(begin(words, processes))
    assert status == 0 and f"going on after step {stopped}" in text, text
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == list(range(6))
    if processes:
        same_run(undisturbed, tmp_path)


def test_what_a_rank_has_said_in_one_line_is_all_that_is_said(folder, tmp_path):
    words = words_of(folder, tmp_path, "--valid_metric", "f2")
    status, text = end(begin(words))
    assert status == 2 and re.fullmatch(r"error: --valid_metric f2: the task offers .*\n", text), text


def test_a_rank_that_could_say_nothing_is_named(folder, tmp_path):
    status, text = end(begin(words_of(folder, tmp_path), faults="rollout:kill@0"))
    assert status == 137 and re.search(r"^error: rank 1 \(pid \d+\) was ended by SIGKILL; the same command goes on",
                                       text, re.M), text
    assert "Traceback" not in text


def test_a_worker_that_hangs_is_named_instead_of_silence(folder, tmp_path):
    process = begin(words_of(folder, tmp_path, "--hang_minutes", 0.15), faults="rollout:hang@0")
    status, text = end(process, 120)
    assert status != 0
    assert re.search(r"error: no rank has made progress for 0.15 minutes: rank 1 \(pid \d+ on \S+\) in 'rollout'; "
                     r"1 others wait for it \(--hang_minutes", text), text


def test_a_worker_that_hangs_is_restarted_and_the_run_ends_with_the_same_result(folder, undisturbed, tmp_path):
    """Rollouts layer by layer change no bit of it but the sampler's own log-probabilities: without packed copies."""
    words = words_of(folder, tmp_path, "--hang_minutes", 0.15, "--rollout_weights", "layers")
    status, text = end(begin(words, restarts=1, faults="update:hang@0"))
    assert status == 0 and "rank 1" in text, text
    same_run(undisturbed, tmp_path, "sampling/")


def test_the_verdict_names_who_is_furthest_behind():
    everyone = [["7", "90", "11", "a", "update"], ["6", "95", "12", "b", "score"], ["7", "70", "13", "b", "update"]]
    assert verdict(everyone, 60) == ("no rank has made progress for 1 minutes: rank 1 (pid 12 on b) in 'score'; "
                                     "2 others wait for it (--hang_minutes sets the limit)")


# ── the disk ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MiB; where none can be mounted, a limit on the size of files does."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", tmp_path],
                             capture_output=True).returncode == 0
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill():
        if mounted:
            free = os.statvfs(tmp_path)
            (tmp_path / "other people's").write_bytes(b"." * (free.f_bavail * free.f_frsize - 100_000))
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))

    yield tmp_path, fill
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    if mounted:
        subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.parametrize("where", ["disk", "limit"])
def test_a_full_disk_is_a_clear_error_and_the_last_checkpoint_stays(small_disk, where):
    output, fill = small_disk
    policy, optimizer = trained(1)
    checkpoints = Checkpoints(output, 2)
    checkpoints.save(policy, optimizer, 1, {})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    fill() if where == "disk" else resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    with pytest.raises(OSError,
                       match=r"step-00000002: the checkpoint cannot be written \(rank 0: .*(No space left|too large).*"
                                      r"the last good one is .*step-00000001"):
        checkpoints.save(policy, optimizer, 2, {})
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["step-00000001"]
    again = Checkpoints(output, 2)
    assert again.newest()["step"] == 1
    again.load(policy, optimizer)


@pytest.mark.parametrize("room,expected", [
    (6_000_000, "step-00000001: the checkpoint cannot be written \\(.*; there is none before it"),
    (2_000_000, "model: the weights cannot be written \\(.*; what was there before still is"),
], ids=["weights fit, Adam's moments beside them do not", "nothing fits"])
def test_a_run_on_a_full_disk_ends_in_one_line(folder, tmp_path, room, expected):
    program = (f"import resource, runpy; resource.setrlimit(resource.RLIMIT_FSIZE, ({room}, {room})); "
               "runpy.run_module('grpo.train', run_name='__main__')")
    status, text = end(programs.begin("-c", program, *words_of(folder, tmp_path, "--zero_variance_groups", "kept")))
    assert status == 2, text
    assert re.search(f"^error: .*{expected}$", text, re.M), text
    assert not list(tmp_path.glob("**/*.new"))


# ── not a number ─────────────────────────────────────────────────────────────────────────────────────────────────


def poisoned(trainer, updates):
    """Every loss of the updates with these numbers is not a number."""
    real, calls = trainer.loss, []

    def loss(*arguments, **options):
        value, statistics = real(*arguments, **options)
        calls.append(0)
        return value * (float("nan") if len(calls) in updates else 1.0), statistics

    trainer.loss = loss


def test_an_update_that_is_not_a_number_is_skipped_and_counted(folder, tmp_path, capsys):
    trainer, _, samples = make(folder, tmp_path, "--updates", 1)
    poisoned(trainer, {1})
    before = {name: p.detach().clone() for name, p in trainer.run.policy.named_parameters()}
    line = trainer.step(samples[:2], 0, [1e-3])
    assert line["bad_updates"] == 1 and line["grad_norm"] != line["grad_norm"]
    said = capsys.readouterr().out
    assert all(sample.id in said for sample in samples[:2]), said
    assert all(torch.equal(before[name], p) for name, p in trainer.run.policy.named_parameters())
    assert not any(trainer.optimizer.state.values())
    line = trainer.step(samples[2:14], 1, [1e-3])
    assert line["bad_updates"] == 1 and line["grad_norm"] > 0
    assert any(not torch.equal(before[name], p) for name, p in trainer.run.policy.named_parameters())


def test_an_infinite_loss_names_its_samples(capsys):
    run = SimpleNamespace(policy=tiny_policy(), device="cpu",
                          prompts=SimpleNamespace(release_features=lambda prompts: None),
                          settings=SimpleNamespace(tokens_per_pass=10**6, keep_features=True, max_grad_norm=1.0,
                                                   max_bad_updates=2),
                          bad_in_a_row=0, bad_updates=0, checkpoints=SimpleNamespace(last_good=lambda: "none"))
    run.judge = partial(Run.judge, run)
    groups = tiny_groups(lengths=((5,), (3,), (4,)))
    groups[1].completions[0][1] = IMAGE  # which nothing can have sampled
    optimizer = torch.optim.SGD(run.policy.parameters(), lr=0.1)
    assert sft.train.step(run, optimizer, groups, 0.1)["bad_updates"] == 1
    assert capsys.readouterr().out == f"update skipped: its loss is not finite at {groups[1].prompt.id} (1 in a row)\n"
    with pytest.raises(ValueError,
                       match=f"2 updates in a row .*; the last: its loss is not finite at {groups[1].prompt.id}"):
        sft.train.step(run, optimizer, groups, 0.1)
    assert "bad_updates" in sft.train.step(run, optimizer, groups[2:], 0.1) and run.bad_in_a_row == 0


def test_where_the_objective_alone_is_infinite_all_samples_of_the_pass_are_named():
    from grpo.runtime.optim import not_finite

    groups, mask = tiny_groups(lengths=((5, 1), (3, 3))), torch.ones(4, 5, dtype=torch.bool)
    pack = Pack(groups, mask, loss=torch.tensor(1.0), old_logp=torch.zeros(4, 5), ref_logp=torch.zeros(4, 5))
    assert not_finite(pack) == []
    pack.loss = torch.tensor(float("inf"))
    assert not_finite(pack) == [group.prompt.id for group in groups]
    pack.ref_logp[3, 2] = float("-inf")
    assert not_finite(pack) == [groups[1].prompt.id]
    mask[3, 2] = False  # behind its end
    assert not_finite(pack) == [group.prompt.id for group in groups]


def test_a_run_of_them_ends_it_and_names_the_last_good_checkpoint(folder, tmp_path):
    trainer, curriculum, samples = make(folder, tmp_path, "--updates", 1, "--checkpoint_every", 1, "--max_rollouts", 9)
    poisoned(trainer, {2, 4, 5, 6})
    with pytest.raises(ValueError,
                       match="3 updates in a row had a loss or gradient that is not finite .*the last good one is "
                                         ".*step-00000005; lower --learning_rate"):
        grpo.train.train(trainer, curriculum)
    assert [line.get("bad_updates", 0) for line in lines(tmp_path / "metrics.jsonl")[1:]] == [0, 1, 1, 2, 3]


def test_a_loss_that_is_infinite_on_one_process_alone_is_skipped_by_all(tmp_path):
    from processes import run_processes

    run_processes(check_skipped_by_all, 2)


def check_skipped_by_all():
    from grpo.runtime.dist import rank
    from grpo.runtime.fsdp import shard
    from tiny import tiny_groups, tiny_policy, update

    policy = shard(tiny_policy(), torch.float32, torch.device("cpu"))
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    before = [p.detach().to_local().clone() for p in policy.parameters()]
    bad = lambda scores: (
        scores.logp.sum().detach() * float("inf") + 0.0 * scores.logp.sum() if rank() else -scores.logp.sum()
    )
    norm = update(policy, optimizer, [tiny_groups()], bad, 1.0, 1.0, rate=1.0)
    assert norm != norm
    assert all(torch.equal(old, p.detach().to_local()) for old, p in zip(before, policy.parameters()))
