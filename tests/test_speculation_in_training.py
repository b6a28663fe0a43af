"""What training adds to speculation: a history that all ranks know and that a resumed run has; and what a step
spares."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from programs import COMMON, lines
import rewards.more
from data.task import sample_hash
from test_answer import SAMPLING, Encoder, samples, task
from test_loop import make, weights

from grpo.runtime.optim import skip_idle
from grpo import evaluate
from grpo.engine import rollout
from grpo.engine.speculation import Speculation
from grpo.group import Group, Pack, row_mask
from grpo.runtime.optim import idle_pack
from grpo.runtime.answer import Prompts, answer, remember, remember_predictions
from grpo.runtime.dist import rank
from grpo.runtime.run import Run
from grpo.runtime.settings import parse
from grpo.runtime.step_metrics import sampling_metrics, speculation_metrics
from grpo.train import Settings, train
from processes import run_processes
from tiny import END, tiny_policy, tiny_prompt


def test_speculation_in_a_second_epoch_draws_the_same_in_fewer_steps(folder, tmp_path):
    texts, steps = {}, {}
    for how in ("auto", "off"):
        trainer, _, some = make(folder, tmp_path / how, "--speculate", how, "--temperature", 0.2)
        trainer.step(some[:2], 0, [0.0, 0.0])
        steps[how] = trainer.step(some[:2], 1, [0.0, 0.0])
        texts[how] = [[c.tolist() for c in group.completions] for group in trainer.sample(some[:2], 1)]
    assert texts["auto"] == texts["off"]
    assert steps["auto"]["speculation/tokens_per_step"] > 1.3 and 0.3 < steps["auto"]["speculation/accepted"] <= 1
    assert "speculation/tokens_per_step" not in steps["off"]


def test_speculation_begins_with_what_the_split_was_answered(folder, tmp_path):
    trainer, curriculum, _ = make(folder, tmp_path, "--predictions", folder / "split" / "predictions.jsonl",
                                  "--max_rollouts", 1)
    train(trainer, curriculum)
    history = trainer.speculation.history
    answered = {line["id"]: line["completion"] for line in lines(folder / "split" / "predictions.jsonl")}
    decode = trainer.run.encoder.decode
    drawn = set(lines(tmp_path / "drawn.jsonl")[0]["batches"][0])
    assert set(history) == set(answered) and {len(history[one]) for one in drawn} == {4}
    assert all(decode(history[one][0]) == text for one, text in answered.items() if one not in drawn)


def test_a_resumed_run_speculates_with_the_history_that_it_had(folder, tmp_path):
    trainer, _, some = make(folder, tmp_path)
    trainer.step(some[:2], 0, [1e-3, 1e-3])
    trainer.run.checkpoint(trainer.optimizer, 1, trainer.progress, last=True)
    again, _, _ = make(folder, tmp_path)
    before, after = (one.speculation.state() for one in (trainer, again))
    assert len(before["tokens"]) > 8 and all(torch.equal(before[name], after[name]) for name in before)


def check_ranks_know():
    speculation = Speculation()
    completions = [torch.tensor([rank(), 7, index]) for index in range(2)]
    remember(speculation, [Group(tiny_prompt(0, (), name=f"of rank {rank()}"), completions)])
    assert {name: [row.tolist() for row in group] for name, group in speculation.history.items()} == {
        f"of rank {r}": [[r, 7, 0], [r, 7, 1]] for r in range(2)}
    speculation.counts.update(steps=10 * (1 + rank()), tokens=60, guessed=5, accepted=4)
    assert speculation_metrics(speculation) == {"speculation/tokens_per_step": 4.0, "speculation/accepted": 0.8}
    assert not any(speculation.counts.values())


def test_every_rank_knows_the_speculation_history_of_all():
    run_processes(check_ranks_know, 2)


def test_speculation_repeats_an_evaluation_in_fewer_passes():
    policy, passes, speculation = tiny_policy(), [], Speculation()
    policy.trunk_layers[0].register_forward_hook(lambda *_: passes.append(1))
    texts, counts = [], []
    for one in (None, speculation, speculation):
        passes.clear()
        texts.append(answer(policy, Prompts(Encoder(), task()), samples(3), SAMPLING, speculation=one))
        counts.append(len(passes))
    assert texts[0] == texts[1] == texts[2] and counts[2] < counts[1]


def test_predictions_of_another_dataset_are_no_speculation_and_said_once(tmp_path, capsys):
    path, speculation, some = tmp_path / "predictions.jsonl", Speculation(), samples(4)
    task = SimpleNamespace(data=SimpleNamespace(target=lambda sample: f"of {sample.id}"))
    mine = {"id": "test/1", "completion": "a b", "sample": sample_hash(task, some[1])}
    lines_of = [mine, {"id": "test/2", "completion": "a"}, {**mine, "id": "elsewhere/7"}, {**mine, "id": "test/3"},
                {"id": "test/0"}, []]  # of test/3 the id alone is right
    path.write_bytes(b"\xef\xbb\xbf" + "\n".join([*map(json.dumps, lines_of), "no JSON"]).encode() + b"\n\xff\n")
    encoder = SimpleNamespace(completion=lambda text: torch.tensor([len(text), END]))
    remember_predictions(speculation, str(path), task, some, encoder)
    assert {name: [row.tolist() for row in group] for name, group in speculation.history.items()} == {
        "test/1": [[3, END]], "test/2": [[1, END]]}
    assert capsys.readouterr().out.count("6 lines are no completion of a sample here") == 1


def test_an_evaluation_guesses_from_the_predictions_it_is_given_unless_it_is_told_not_to(folder, tmp_path, monkeypatch):
    known, real = [], evaluate.answer

    def spy(*given, speculation, **more):
        known.append(speculation and set(speculation.history))
        return real(*given, speculation=speculation, **more)

    monkeypatch.setattr(evaluate, "answer", spy)
    words = ["--model", folder / "sft" / "model", "--data", folder / "world" / "MORE", "--split", "train",
             "--limit", 2, *COMMON]
    for more in ((), ("--guesses", folder / "split" / "predictions.jsonl"), ("--speculate", "off")):
        monkeypatch.setattr("sys.argv", ["", *map(str, [*words, "--output", tmp_path / f"{len(known)}", *more])])
        evaluate.main()
    asked = {line["id"] for line in lines(folder / "split" / "predictions.jsonl")} & {"train/0", "train/1"}
    assert asked and known == [set(), asked, None]
    assert len({(tmp_path / str(run) / "predictions.jsonl").read_text() for run in range(3)}) == 1


def test_an_evaluation_whose_reward_fails_names_the_sample_and_keeps_the_completions(folder, tmp_path, monkeypatch):
    real, seen = rewards.more.reward, []

    def reward(text, sample, *, min_length=1):
        seen.append(text)
        return 1 / 0 if len(seen) == 2 else real(text, sample, min_length=min_length)

    monkeypatch.setattr(rewards.more, "reward", reward)
    words = ["--model", folder / "sft" / "model", "--data", folder / "world" / "MORE", "--split", "train",
             "--limit", 3, "--output", tmp_path, *COMMON]
    monkeypatch.setattr("sys.argv", ["", *map(str, words)])
    with pytest.raises(ValueError, match="^train/1: its reward raised ZeroDivisionError: division by zero; --guesses"):
        evaluate.main()
    left = lines(tmp_path / "predictions.jsonl")
    assert [line["id"] for line in left] == ["train/0", "train/1", "train/2"]
    assert all("completion" in line for line in left)
    assert ["reward" in line for line in left] == [True, False, False]


def test_a_validation_speculates_with_the_one_before(folder, tmp_path):
    trainer, _, _ = make(folder, tmp_path, "--valid_split", "valid", "--valid_samples", 3)
    run = trainer.run
    first = run.validate(1)
    assert set(run.speculation["validate"].history) == {sample.id for sample in run.valid}
    assert run.validate(2) == first and run.speculation["validate"].counts["accepted"] > 0


def test_read_every_is_the_fixed_shape_steps_between_two_reads_in_every_program(folder, tmp_path, monkeypatch):
    periods, real = [], rollout.Static.decode_steps
    monkeypatch.setattr(rollout.Static, "decode_steps", lambda self, one: periods.append(self.steps) or real(self, one))
    words, drawn, answered = ("--valid_split", "valid", "--valid_samples", 2), [], []
    split = ["--model", folder / "sft" / "model", "--data", folder / "world" / "MORE", "--limit", 2, *COMMON]
    for period in (0, 3):
        trainer, _, some = make(folder, tmp_path / f"{period}", "--read_every", period, *words)
        drawn.append([row.tolist() for group in trainer.sample(some[:2], 0) for row in group.completions])
        assert set(periods) == {period} - {0}
        periods.clear()
        answered.append(trainer.run.validate(1))
        assert set(periods) == {period} - {0}
        periods.clear()
        given = [*split, "--output", tmp_path / f"split {period}", "--read_every", period]
        monkeypatch.setattr("sys.argv", ["", *map(str, given)])
        evaluate.main()
        assert set(periods) == {period} - {0}
        answered[-1]["text"] = (tmp_path / f"split {period}" / "predictions.jsonl").read_text()
    assert drawn[0] == drawn[1] and answered[0] == answered[1]


def check_packs_left():
    """Two packs that teach on the first rank, one that does not on the second: passes are collectives."""
    packs = [pack_with([[0.5]], [[True]]) for _ in range(2 - rank())]
    for pack in packs:
        pack.advantages = torch.zeros(1) if rank() else torch.ones(1)
    left, told = skip_idle(packs, torch.device("cpu"))
    assert len(left) == 2 and told == {"groups_skipped": 1}


def test_ranks_pass_equally_often_where_only_some_have_groups_that_teach():
    run_processes(check_packs_left, 2)


# ── is the sampler the scorer? ───────────────────────────────────────────────────────────────────────────────────


def pack_with(differences: list[list[float]], trained: list[list[bool]]) -> Pack:
    """One group whose scorer says so much more than its sampler did."""
    lengths = [len(row) for row in differences]
    group = Group(tiny_prompt(0, ()), [torch.zeros(n, dtype=torch.long) for n in lengths],
                  [torch.full((n,), -2.0) for n in lengths])
    old = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) - 2.0 for row in differences], batch_first=True)
    mask = row_mask(lengths) & torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in trained], batch_first=True)
    return Pack([group], mask, old_logp=old)


def test_the_samplers_distance_from_the_scorer_is_that_of_trls_metrics():
    packs = [pack_with([[0.1, -0.3], [0.0]], [[True, True], [True]]), pack_with([[5.0, 0.2]], [[False, True]]),
             idle_pack()]
    found = sampling_metrics(packs)
    d = torch.tensor([0.1, -0.3, 0.0, 0.2], dtype=torch.float64)
    expected = {"sampling_logp_difference/mean": d.abs().mean(), "sampling_logp_difference/max": d.abs().max(),
                "importance_sampling_ratio/min": d.exp().min(), "importance_sampling_ratio/mean": d.exp().mean(),
                "importance_sampling_ratio/max": d.exp().max()}
    assert found == {f"sampling/{name}": pytest.approx(float(value), rel=1e-5) for name, value in expected.items()}
    assert sampling_metrics([idle_pack()]) == {}


def check_ranks_agree():
    mine = [pack_with([[0.5]], [[True]])] if rank() else [pack_with([[-0.25, 0.25, 0.25]], [[True] * 3])]
    assert sampling_metrics(mine) == pytest.approx({
        "sampling/sampling_logp_difference/mean": 0.3125, "sampling/sampling_logp_difference/max": 0.5,
        "sampling/importance_sampling_ratio/min": math.exp(-0.25),
        "sampling/importance_sampling_ratio/max": math.exp(0.5),
        "sampling/importance_sampling_ratio/mean": (math.exp(-0.25) + 2 * math.exp(0.25) + math.exp(0.5)) / 4})


def test_the_samplers_distance_from_the_scorer_is_over_all_ranks():
    run_processes(check_ranks_agree, 2)


def test_in_float32_the_sampler_is_the_scorer(folder, tmp_path):
    trainer, _, some = make(folder, tmp_path)
    line = trainer.step(some[:2], 0, [1e-3, 1e-3])
    assert line["sampling/sampling_logp_difference/max"] < 1e-4
    assert (
        line["sampling/importance_sampling_ratio/min"]
        <= line["sampling/importance_sampling_ratio/mean"]
        <= line["sampling/importance_sampling_ratio/max"]
    )
    assert line["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=1e-4)


# ── what cannot change the result is not computed ────────────────────────────────────────────────────────────────

MIXED = ("--beta", 0, "--reward_weights", "format=0,length=0,answer=1", "--objective", "dr-grpo", "--updates", 2)


def steps(folder, output, monkeypatch, every_pass: bool, rewards, *words):
    """Two steps on three groups with given rewards: weights, metrics lines, groups scored with a gradient."""
    trainer, _, some = make(folder, output, *MIXED, *words)
    scored, score, rewarded = [], trainer.policy.score, trainer.reward

    def reward(groups):
        for group, values in zip(rewarded(groups), rewards):
            group.rewards = torch.tensor(values, dtype=torch.float64)
        return groups

    def count(groups, temperature=1.0):
        scored.append(sum(group.rewards is not None for group in groups) if torch.is_grad_enabled() else 0)
        return score(groups, temperature)

    monkeypatch.setattr(trainer, "reward", reward)
    monkeypatch.setattr(trainer.policy, "score", count)
    monkeypatch.setattr("grpo.train.skip_idle", (lambda packs, device: (packs, {})) if every_pass else skip_idle)
    found = [trainer.step(some[:3], number, [1e-2, 1e-2]) for number in range(2)]
    return weights(trainer), found, scored


@pytest.mark.parametrize("rewards", [[[0, 1, 0, 1], [1, 1, 1, 1], [0, 0, 0, 1]], [[1] * 4, [0] * 4, [1] * 4]],
                         ids=["one of three teaches nothing", "none teaches anything"])
def test_groups_that_teach_nothing_are_not_passed_and_the_weights_are_the_same_to_the_bit(
    folder, tmp_path, monkeypatch, rewards
):
    plain, plain_lines, plain_scored = steps(folder, tmp_path / "a", monkeypatch, True, rewards)
    spared, spared_lines, spared_scored = steps(folder, tmp_path / "b", monkeypatch, False, rewards)
    assert all(torch.equal(plain[name], spared[name]) for name in plain)
    flat = sum(len(set(row)) == 1 for row in rewards)
    assert sum(plain_scored) == 2 * 2 * 3 and sum(spared_scored) == 2 * 2 * (3 - flat)
    assert len(spared_scored) > 4 or flat < 3  # at least one pass an update all the same
    for before, after in zip(plain_lines, spared_lines):
        assert (
            after["groups_skipped"] == flat
            and after["loss"] == before["loss"]
            and after["grad_norm"] == before["grad_norm"]
        )


@pytest.mark.parametrize("words",
                         [("--beta", 0.1), ("--lora_rank", 4, "--lora_dropout", 0.1),
                          ("--objective", "rloo", "--beta", 0.1)])
def test_groups_that_may_teach_are_all_passed(folder, tmp_path, monkeypatch, words):
    _, found, scored = steps(folder, tmp_path, monkeypatch, False, [[1] * 4, [0, 1, 0, 1], [0] * 4], *words)
    assert sum(scored) == 2 * 2 * 3 and "groups_skipped" not in found[0]


def test_a_validation_whose_numbers_lie_beside_the_model_is_not_run_again(folder, tmp_path, monkeypatch, capsys):
    words = ["--model", folder / "sft" / "model", "--data", folder / "world" / "MORE", "--valid_samples", 3, *COMMON]
    settings = lambda output, *more: parse(Settings, [*map(str, [*words, "--output", output, *more])])
    first = Run(settings(tmp_path / "a")).validate(0)
    asked = []
    monkeypatch.setattr("grpo.runtime.run.answer", lambda *_, **__: asked.append(1) or [["<answer>none</answer>"]] * 3)
    after = ["--model", tmp_path / "a" / "model"]
    again = Run(settings(tmp_path / "b", *after))
    assert again.validate(0) == first and not asked and (tmp_path / "b" / "model").is_dir()
    assert "as it was when" in capsys.readouterr().out
    again.validate(1)  # what comes later is another model
    Run(settings(tmp_path / "c", *after, "--max_completion_tokens", 25)).validate(0)  # other settings
    best = json.loads((tmp_path / "a" / "best.json").read_text())
    (tmp_path / "a" / "best.json").write_text(json.dumps({**best, "of": {**best["of"], "model_hash": "another"}}))
    Run(settings(tmp_path / "d", *after)).validate(0)
    (tmp_path / "a" / "best.json").write_text("torn")
    Run(settings(tmp_path / "e", *after)).validate(0)
    assert len(asked) == 4
