"""A run that was cut off goes on as if it had not been: the same bits, the same lines, on any number of processes."""

import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import grpo.runtime.run
import grpo.train
import rewards.more
import sft.train
from grpo.runtime.checkpoints import Checkpoints, differences, read_state, refusal, rows_of
from grpo.runtime.fsdp import shard
from grpo.runtime.settings import resume_rules
from processes import run_processes
from programs import COMMON, lines, tensors

TIMES = ("step_time", *(f"seconds/{phase}" for phase in ("rollout", "reference", "advantage", "update", "rollout_log")))


class Killed(BaseException):
    """Raised in the place of a kill −9: nothing of the program's own runs after it."""


def words_of(program, folder, output):
    common = ["--data", folder / "world" / "MORE", "--output", output, "--checkpoint_every", 1, *COMMON]
    if program is sft.train:
        return ["--model", folder / "world" / "model", "--responses", folder / "cold_start.jsonl", "--epochs", 2,
                "--batch_size", 8, "--learning_rate", 1e-3, "--valid_samples", 4, *common]
    return ["--model", folder / "sft" / "model", "--predictions", folder / "split" / "predictions.jsonl",
            "--max_rollouts", 4, "--learning_rate", 1e-3, "--prompts_per_rollout", 2, "--group_size", 3,
            "--reward_options", "min_length=60", "--rollout_log_every", 2, "--validate_every", 3, "--valid_samples", 4,
            *common]


def run(program, words, killed_in_step=None):
    """The program in this process; killed in the middle of a step where one is given."""
    owner, name = (sft.train, "step") if program is sft.train else (grpo.train.Trainer, "update")
    real, calls = getattr(owner, name), []

    def step(*arguments):
        calls.append(0)
        if len(calls) == killed_in_step:
            raise Killed
        return real(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [program.__name__, *map(str, words)])
        patch.setattr(owner, name, step)
        program.main()
    return len(calls)


def without_times(path, *but):
    left_out = lambda name: name == "step_time" or name.startswith(("seconds/", *but))
    return [{name: value for name, value in line.items() if not left_out(name)} for line in lines(path)]


def same_run(one, other, *but):
    """Weights, journals (metrics of these families left out) and the last checkpoint's optimizer, to the bit."""
    for name, tensor in tensors(one / "model").items():
        assert torch.equal(tensor, tensors(other / "model")[name]), name
    assert without_times(one / "metrics.jsonl", *but) == without_times(other / "metrics.jsonl", *but)
    if (one / "rollouts.jsonl").exists():
        assert lines(one / "rollouts.jsonl") == lines(other / "rollouts.jsonl")
    assert (one / "best.json").read_text() == (other / "best.json").read_text()
    places = [sorted((run / "checkpoints").iterdir())[-1] for run in (one, other)]
    assert places[0].name == places[1].name
    parts = [{key: value for path in sorted(place.glob("part-*")) for key, value in load_file(path).items()}
             for place in places]
    assert parts[0].keys() == parts[1].keys() and any(key.startswith("exp_avg_sq/") for key in parts[0])
    assert all(torch.equal(parts[0][key], parts[1][key]) for key in parts[0] if not key.startswith("random/"))


@pytest.fixture(scope="session")
def undisturbed(folder, built_once):
    """A function of the program: the folder of its run that nothing has disturbed."""
    return lambda program: built_once(program.__name__, lambda output: run(program, words_of(program, folder, output)))


both_programs = pytest.mark.parametrize("program", [sft.train, grpo.train], ids=["SFT", "GRPO"])


@both_programs
@pytest.mark.parametrize("at,every", [(2, 1), (4, 2)],
                         ids=["at the checkpoint", "a step beyond it, whose lines are written"])
def test_killed_in_a_step_and_started_again_it_ends_as_if_nothing_had_happened(
    program, undisturbed, folder, tmp_path, at, every
):
    words = [*words_of(program, folder, tmp_path), "--checkpoint_every", every]
    with pytest.raises(Killed):
        run(program, words, killed_in_step=at)
    run(program, words)
    same_run(undisturbed(program), tmp_path)


def test_an_adapter_with_dropout_goes_on_with_the_same_noise(folder, tmp_path):
    words = lambda name: [*words_of(sft.train, folder, tmp_path / name), "--lora_rank", 4, "--lora_dropout", 0.3]
    run(sft.train, words("whole"))
    with pytest.raises(Killed):
        run(sft.train, words("killed"), killed_in_step=3)
    torch.rand(100)  # what another process would not have drawn
    run(sft.train, words("killed"))
    same_run(tmp_path / "whole", tmp_path / "killed")


@both_programs
def test_a_run_that_is_over_is_not_trained_again(program, undisturbed, folder, tmp_path):
    shutil.copytree(undisturbed(program), tmp_path / "copy")
    assert run(program, words_of(program, folder, tmp_path / "copy")) == 0
    same_run(undisturbed(program), tmp_path / "copy")


@pytest.fixture
def halfway(folder, built_once, tmp_path):
    """(words, output) of Stage 2, cut off in its third rollout; every test has a copy of its own."""
    def fill(output):
        with pytest.raises(Killed):
            run(grpo.train, words_of(grpo.train, folder, output), killed_in_step=3)

    shutil.copytree(built_once("halfway", fill), tmp_path, dirs_exist_ok=True)
    return words_of(grpo.train, folder, tmp_path), tmp_path


def newest(output):
    return sorted(path for path in (output / "checkpoints").iterdir() if path.suffix == "")[-1]


def damage(place, how):
    part = next(place.glob("part-*"))
    data = part.read_bytes()
    if how == "truncated":
        part.write_bytes(data[:-10])
    elif how == "one bit changed":
        part.write_bytes(data[:-10] + bytes([data[-10] ^ 1]) + data[-9:])
    elif how == "a part is gone":
        part.unlink()
    elif how == "state.json is cut off":
        state = place / "state.json"
        state.write_text(state.read_text()[:50])
    elif how == "a figure in state.json changed":
        state = place / "state.json"
        state.write_text(state.read_text().replace('"too_long": 0', '"too_long": 1'))
    elif how == "of another format":
        (place / "state.json").write_text(json.dumps({"format": 99}))


@pytest.mark.parametrize("how", ["truncated", "one bit changed", "a part is gone", "state.json is cut off",
                                 "a figure in state.json changed", "of another format"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_it_and_that_is_said(halfway, undisturbed, how, capsys):
    words, output = halfway
    damage(newest(output), how)
    calls = run(grpo.train, words)
    said = capsys.readouterr().out
    assert "step-00000002: damaged, passed over: " in said and "step-00000001: going on after step 1" in said
    assert calls == 3  # rollouts 2, 3 and 4
    same_run(undisturbed(grpo.train), output)


def test_leavings_of_a_process_that_was_killed_while_writing_are_removed(halfway):
    words, output = halfway
    (output / "checkpoints" / "step-00000009.new").mkdir()
    (output / "checkpoints" / "step-00000009.new" / "part-00000-of-00001.safetensors").write_bytes(b"half")
    assert run(grpo.train, words) == 2
    assert not list((output / "checkpoints").glob("*.new"))


def test_a_file_that_nobody_has_written_is_not_read(halfway):
    words, output = halfway
    (newest(output) / "part-00001-of-00001.safetensors").write_bytes(b"not ours")
    assert run(grpo.train, words) == 2


def test_no_checkpoint_holds_a_pickle(halfway):
    names = {path.suffix for path in newest(halfway[1]).iterdir()}
    assert names == {".safetensors", ".json"}


def test_only_the_newest_are_kept(halfway):
    words, output = halfway
    run(grpo.train, [*words, "--checkpoints_kept", 3])
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == [f"step-0000000{n}" for n in (2, 3, 4)]


@pytest.mark.parametrize("kept", [1, 2])
def test_after_damaged_newer_ones_what_is_written_stays(halfway, kept, capsys):
    words, output = halfway
    for place in (output / "checkpoints").iterdir():
        damage(place, "of another format")
        place.rename(place.with_name(f"step-0000001{place.name[-1]}"))  # newer than all that will be written
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        (output / name).unlink()
    assert run(grpo.train, [*words, "--checkpoints_kept", kept]) == 4
    left = sorted(path.name for path in (output / "checkpoints").iterdir())
    assert left == [f"step-0000000{n}" for n in range(5 - kept, 5)]


def test_the_best_by_another_measure_is_not_the_one_to_beat(folder, tmp_path):
    words, best = words_of(grpo.train, folder, tmp_path), tmp_path / "best.json"
    with pytest.raises(Killed):
        run(grpo.train, [*words, "--valid_metric", "unparsable"], killed_in_step=3)
    assert read_state(newest(tmp_path))["best"] > json.loads(best.read_text())["valid"]["f1"]
    best.unlink()
    run(grpo.train, [*words, "--resume", "changed", "--valid_metric", "f1"])
    assert best.exists()  # the first validation after it is kept, by whichever figure


def test_a_measure_that_is_no_number_ends_the_run_with_its_name(halfway, monkeypatch):
    words, _ = halfway
    monkeypatch.setattr(rewards.more, "metrics", lambda texts, samples: {"f1": float("nan")})
    with pytest.raises(ValueError, match="--valid_metric f1 is nan after step 3; a finite number expected"):
        run(grpo.train, words)


def test_adams_moments_are_read_into_host_memory_where_they_wait_there(halfway, monkeypatch):
    asked, real = [], grpo.runtime.checkpoints.read_parts
    monkeypatch.setattr(grpo.runtime.checkpoints, "read_parts", lambda *a: asked.append(a[3]) or real(*a))
    run(grpo.train, [*halfway[0], "--offload_optimizer", True])
    assert asked == [True]


REFUSED = {
    "a file that was given and is not": (["--predictions", ""], "predictions '[0-9a-f]{16}' → None"),
    "the learning rate": (["--learning_rate", "5e-3"],
                          "made with other settings: learning_rate 0.001 → 0.005; --resume changed"),
    "the seed": (["--seed", "1"], "seed 0 → 1"),
    "the objective's own": (["--beta", "0.5"], "beta 0.001 → 0.5"),
    "an adapter": (["--lora_rank", "4"], "is of another run: lora_rank 0 → 4"),
}


@pytest.mark.parametrize("more,expected", REFUSED.values(), ids=REFUSED.keys())
def test_other_settings_are_refused_with_the_difference(halfway, more, expected):
    words, output = halfway
    with pytest.raises(ValueError, match=expected) as refused:
        run(grpo.train, [*words, *more])
    assert "step-00000002" in str(refused.value) and "\n" not in str(refused.value)
    assert len(lines(output / "metrics.jsonl")) == 3  # nothing was touched


def test_another_model_or_other_data_is_refused(halfway, folder, tmp_path_factory):
    words, _ = halfway
    with pytest.raises(ValueError, match="is of another run: model_hash '[0-9a-f]{16}' → '[0-9a-f]{16}'"):
        run(grpo.train, [*words, "--model", folder / "world" / "model"])
    data = tmp_path_factory.mktemp("data") / "MORE"
    shutil.copytree(folder / "world" / "MORE", data)
    assert run(grpo.train, [*words, "--data", data, "--max_rollouts", 4]) == 2  # the same data in another place
    shutil.rmtree(newest(halfway[1]))
    text = (data / "txt" / "train.txt").read_text().splitlines()
    (data / "txt" / "train.txt").write_text("\n".join(text[::-1]) + "\n")
    with pytest.raises(ValueError, match="data_hash"):
        run(grpo.train, [*words, "--data", data])


def test_what_may_change_changes_when_asked_for_and_what_may_not_does_not(halfway):
    words, output = halfway
    with pytest.raises(ValueError, match="lora_rank 0 → 4"):
        run(grpo.train, [*words, "--resume", "changed", "--lora_rank", "4"])
    assert run(grpo.train, [*words, "--resume", "changed", "--max_rollouts", 6]) == 4
    assert [line["step"] for line in lines(output / "metrics.jsonl")] == [0, 1, 2, 3, 4, 5, 6]


def test_what_is_memory_and_not_result_may_change_unasked(halfway):
    words, _ = halfway
    assert run(grpo.train,
               [*words, "--rollout_rows", 3, "--tokens_per_pass", 300, "--gradient_checkpointing", True]) == 2


def test_resume_never_begins_anew(halfway, capsys):
    words, output = halfway
    assert run(grpo.train, [*words, "--resume", "never", "--seed", 5]) == 4
    assert [line["step"] for line in lines(output / "metrics.jsonl")] == [0, 1, 2, 3, 4]


def test_a_setting_that_an_older_version_did_not_have_is_no_difference():
    ran = {"settings": {"seed": 1}, "model_hash": "a", "data_hash": "b", "file_hashes": {}}
    assert differences(ran, {**ran, "settings": {"seed": 1, "new": 2}}, {}) == {}
    assert differences(ran, {**ran, "settings": {"seed": 2}}, {}) == {"seed": (1, 2)}
    assert differences(ran, {**ran, "file_hashes": {"responses": "c"}}, {}) == {"responses": (None, "c")}
    rules = resume_rules(grpo.train.Settings())
    assert refusal({"task": ("more", "jmere")}, "place", "changed",
                   rules) and not refusal({"seed": (1, 2)}, "place", "changed", rules)


# ── other numbers of processes ───────────────────────────────────────────────────────────────────────────────────


def trained(steps, shard_size=0):
    """A tiny policy and its optimizer after some updates, sharded where there are several processes."""
    from types import SimpleNamespace

    from grpo.runtime.dist import split_across_ranks
    from grpo.runtime.optim import make_optimizer
    from tiny import tiny_groups, tiny_policy, update

    policy = shard(tiny_policy(), torch.float32, torch.device("cpu"), shard_size=shard_size)
    policy.freeze_vision()
    s = SimpleNamespace(weight_decay=0.1, learning_rate=1e-3, adam_beta1=0.9, adam_beta2=0.95, offload_optimizer=False)
    optimizer = make_optimizer(policy, s)
    groups = tiny_groups(lengths=((5, 1), (3, 4), (6, 2), (4, 4)))
    for _ in range(steps):
        update(policy, optimizer, [split_across_ranks(groups)], lambda scores: -scores.logp.sum() / 30, 1.0, 1.0,
               rate=1e-3)
    return policy, optimizer


def everything(policy, optimizer):
    """Whole tensors of weights and optimizer."""
    from grpo.runtime.checkpoints import state_tensors

    return {key: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            for key, (_, tensor) in state_tensors(policy, optimizer).items()}


def write(output, shard_size):
    policy, optimizer = trained(2, shard_size=shard_size)
    Checkpoints(output, 1).save(policy, optimizer, 2, {})
    found = everything(policy, optimizer)
    if torch.distributed.get_rank() == 0:
        save_file({key: tensor.contiguous().clone() for key, tensor in found.items()}, output / "expected.safetensors")


def read(output, shard_size):
    policy, optimizer = trained(0, shard_size=shard_size)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    checkpoints = Checkpoints(output, 1)
    assert checkpoints.newest()["step"] == 2
    checkpoints.load(policy, optimizer)
    found, expected = everything(policy, optimizer), load_file(output / "expected.safetensors")
    assert found.keys() == expected.keys() and any(key.startswith("step/") for key in found)
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key


@pytest.mark.parametrize("writers,readers", [((2, 0), (3, 0)), ((3, 0), (1, 0)), ((1, 0), (2, 0)), ((4, 2), (3, 0))],
                         ids=["two to three", "three to one", "one to two", "two copies of two parts to three"])
def test_any_number_of_processes_reads_what_any_other_number_has_written(tmp_path, writers, readers):
    run_processes(write, writers[0], tmp_path, writers[1])
    assert len(list(newest(tmp_path).glob("part-*"))) == writers[0]
    run_processes(read, readers[0], tmp_path, readers[1])


def check_rows():
    policy, _ = trained(0)
    for parameter in policy.parameters():
        start, stop = rows_of(parameter)
        whole = parameter.detach().full_tensor()
        assert torch.equal(whole[start:stop], parameter.detach().to_local())


def test_a_process_knows_which_rows_it_holds_where_they_do_not_divide():
    run_processes(check_rows, 3)
