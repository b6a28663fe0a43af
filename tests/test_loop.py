"""The loop of Stage 2 in this process: every objective trains, and what a step does with groups."""

import json
import re
import sys
import types
from dataclasses import dataclass

import pytest
import torch

import grpo.train
from grpo.objective import grpo_loss
from grpo.runtime.optim import idle_pack
from grpo.runtime.run import Run
from grpo.runtime.settings import parse
from grpo.runtime.step_metrics import readable
from grpo.runtime.schedule import Curriculum, earlier_appearances
from grpo.train import Settings, Trainer
from grpo.variants import PRESETS, Preset, setting
from programs import COMMON, lines
from tiny import pack_of


def make(folder, tmp_path, *words):
    settings = parse(Settings, [str(word) for word in (
        "--model", folder / "sft" / "model", "--data", folder / "world" / "MORE", "--output", tmp_path, "--group_size",
        4, "--prompts_per_rollout", 2, "--learning_rate", 1e-3, "--reward_options", "min_length=60", "--valid_split",
        "", *COMMON, *words)])
    run = Run(settings)
    samples = run.load("train")
    return Trainer(run, settings), Curriculum(settings, samples, run.task.data.is_none), samples


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.run.policy.named_parameters()}


@pytest.mark.parametrize("objective", PRESETS)
def test_every_preset_trains_a_step(folder, tmp_path, objective):
    trainer, _, samples = make(folder, tmp_path, "--objective", objective)
    before, rates = weights(trainer), [1e-3] * trainer.preset.updates
    line = trainer.step(samples[:6], 0, rates)
    assert line["prompts"] >= 1 and line["grad_norm"] > 0
    assert any(not torch.equal(before[name], p) for name, p in trainer.run.policy.named_parameters())


def test_a_forks_module_takes_the_place_of_the_objective(folder, tmp_path, monkeypatch):
    calls = []
    fork = types.ModuleType("my_objective")
    fork.loss = lambda *arguments, **options: calls.append(options) or grpo_loss(*arguments, **options)
    monkeypatch.setitem(sys.modules, "my_objective", fork)
    trainer, _, samples = make(folder, tmp_path, "--objective", "my_objective")
    trainer.step(samples[:2], 0, [1e-3])
    assert calls and calls[0]["denominator"] == 8


@dataclass(frozen=True)
class Bounded(Preset):
    bound: float = setting(1.0, "largest advantage", above=0)


def test_a_forks_settings_and_statistics_are_like_ours(folder, tmp_path, monkeypatch, capsys):
    def loss(logp, old_logp, ref_logp, advantages, mask, *, bound, **options):
        value, sums = grpo_loss(logp, old_logp, ref_logp, advantages.clamp(-bound, bound), mask, **options)
        return value, {**sums, "bounded": (mask * (advantages.abs() > bound).unsqueeze(1)).sum()}

    fork = types.ModuleType("my_bounded")
    fork.loss, fork.PRESET = loss, Bounded(beta=0.0, updates=1)
    monkeypatch.setitem(sys.modules, "my_bounded", fork)
    with pytest.raises(SystemExit):
        parse(Settings, ["--objective", "my_bounded", "--help"])
    assert re.search(r"objective my_bounded.*--bound X +largest advantage \(default 1.0\)", capsys.readouterr().out,
                     re.S)
    with pytest.raises(ValueError, match="no setting --bound"):
        parse(Settings, ["--bound", "0.5"])
    trainer, curriculum, _ = make(folder, tmp_path, "--objective", "my_bounded", "--bound", 0.5, "--max_rollouts", 1)
    grpo.train.train(trainer, curriculum)
    assert json.loads((tmp_path / "settings.json").read_text())["settings"]["bound"] == 0.5
    step = lines(tmp_path / "metrics.jsonl")[-1]
    assert 0 < step["bounded"] <= 1 and step["ratio_mean"] == 1


def test_a_rollout_of_zero_variance_groups_alone_moves_nothing_without_a_kl(folder, tmp_path):
    trainer, _, samples = make(folder, tmp_path, "--beta", 0, "--reward_weights", "format=0,length=0,answer=0")
    before = weights(trainer)
    line = trainer.step(samples[:2], 0, [0.0, 0.0])
    assert line["frac_reward_zero_std"] == 1 and line["grad_norm"] == 0
    assert all(torch.equal(before[name], p) for name, p in trainer.run.policy.named_parameters())


def test_a_rollout_without_signal_moves_the_weights_further_than_their_decay(folder, tmp_path, monkeypatch):
    """Adam divides the KL's gradient by its own size, however small it is."""
    trainer, _, samples = make(folder, tmp_path, "--updates", 1, "--beta", 1e-3, "--learning_rate", 1e-4)
    lines = [trainer.step(samples[2 * i : 2 * i + 2], i, [1e-4]) for i in range(3)]
    before = weights(trainer)
    monkeypatch.setattr(trainer.run.task.rewards, "reward", lambda *_, **__: dict.fromkeys(trainer.weights, 0.0))
    line = trainer.step(samples[:2], 3, [1e-4])
    distance = lambda tensors: sum(float(tensor.norm() ** 2) for tensor in tensors) ** 0.5
    decay = distance(1e-4 * 0.1 * before[name] for name, p in trainer.policy.named_parameters() if p.requires_grad
                     and p.ndim > 1)
    moved = distance(p.detach() - before[name] for name, p in trainer.policy.named_parameters())
    assert (
        line["rollouts_without_signal"] == lines[-1]["rollouts_without_signal"] + 1
        and line["frac_reward_zero_std"] == 1
    )
    assert moved > 5 * decay


def test_dropped_zero_variance_groups_leave_a_step_that_says_so(folder, tmp_path):
    trainer, _, samples = make(folder, tmp_path, "--zero_variance_groups", "dropped", "--reward_weights",
                               "format=0,length=0,answer=0")
    line = trainer.step(samples[:2], 0, [1e-3, 1e-3])
    assert line["prompts"] == line["groups_dropped"] == 2 and line["frac_reward_zero_std"] == 1
    assert "no group to learn from" in readable({"step": 1, **line}, 5)


def test_a_run_in_which_no_group_teaches_points_to_the_training_guide_once(folder, tmp_path, capsys):
    trainer, curriculum, _ = make(folder, tmp_path, "--reward_weights", "format=0,length=0,answer=0", "--max_rollouts",
                                  5)
    grpo.train.train(trainer, curriculum)
    said = capsys.readouterr().out.splitlines()
    pointer, = [i for i, text in enumerate(said) if text.startswith("All groups have zero variance")
                and "training-guide" in text]
    assert said[pointer - 1].startswith("3/5")
    assert [line["rollouts_without_signal"] for line in lines(tmp_path / "metrics.jsonl")[1:]] == [1, 2, 3, 4, 5]


def test_the_first_update_of_a_rollout_is_exactly_on_policy(folder, tmp_path):
    trainer, _, samples = make(folder, tmp_path, "--updates", 1)
    line = trainer.step(samples[:2], 0, [1e-3])
    assert line["ratio_mean"] == 1 and line["kl"] == 0 and line["clip_ratio/region_mean"] == 0
    again = trainer.step(samples[:2], 1, [1e-3])  # a new rollout: on-policy again, but away from the reference
    assert again["ratio_mean"] == 1 and again["kl"] > 0


def test_the_second_inner_update_is_off_policy(folder, tmp_path):
    trainer, _, samples = make(folder, tmp_path, "--updates", 2)
    assert trainer.step(samples[:2], 0, [1e-2, 1e-2])["ratio_mean"] != 1


def test_the_reference_stays_where_stage_1_left_it(folder, tmp_path):
    trainer, _, samples = make(folder, tmp_path)
    before = {name: p.clone() for name, p in trainer.reference.named_parameters()}
    trainer.step(samples[:2], 0, [1e-2, 1e-2])
    assert all(torch.equal(before[name], p) for name, p in trainer.reference.named_parameters())


def test_shuffled_pixels_change_the_references_log_probabilities_too(folder, tmp_path):
    trainer, _, samples = make(folder, tmp_path)
    pack = pack_of(trainer.sample(samples[:2], 0))
    for group in pack.groups:
        group.prompt.features = None
    trainer.score_reference([pack])
    before = pack.ref_logp
    for group in pack.groups:
        group.prompt.pixels = group.prompt.pixels[torch.randperm(len(group.prompt.pixels))]
    trainer.score_reference([pack])
    assert (pack.ref_logp - before).abs().max() > 1e-4


def test_a_prompt_over_the_limit_is_dropped_whole_and_not_cut(folder, tmp_path):
    trainer, _, samples = make(folder, tmp_path)
    lengths = sorted(len(trainer.run.prompts(sample)) for sample in samples[:12])
    trainer.settings.max_prompt_tokens = lengths[5]
    groups = trainer.sample(samples[:12], 0)
    kept = [len(trainer.run.prompts(sample)) for sample in samples[:12]
            if len(trainer.run.prompts(sample)) <= lengths[5]]
    assert [len(group.prompt) for group in groups] == kept and len(kept) < 12
    assert trainer.run.prompts.too_long == 12 - len(kept) and trainer.run.prompts.longest == lengths[-1]


def test_a_run_in_which_every_prompt_is_too_long_says_so(folder, tmp_path):
    trainer, curriculum, _ = make(folder, tmp_path, "--max_prompt_tokens", 5, "--max_rollouts", 1)
    with pytest.raises(ValueError, match="nothing was learned: 2 prompts are longer than --max_prompt_tokens 5"):
        grpo.train.train(trainer, curriculum)


def test_features_of_dropped_groups_do_not_stay_on_the_device(folder, tmp_path):
    trainer, _, samples = make(folder, tmp_path, "--zero_variance_groups", "dropped", "--reward_weights",
                               "format=0,length=0,answer=0")
    trainer.step(samples[:2], 0, [1e-3, 1e-3])
    assert all(trainer.run.prompts(sample).features is None for sample in samples[:2])


def test_rloo_without_a_kl_needs_no_reference(folder, tmp_path):
    trainer, _, samples = make(folder, tmp_path, "--objective", "rloo", "--beta", 0)
    assert trainer.reference is None and trainer.step(samples[:2], 0, [1e-3])["prompts"] == 2


def test_a_completion_whose_reward_failed_is_left_out_counted_and_not_trained(folder, tmp_path, monkeypatch, capsys):
    trainer, _, samples = make(folder, tmp_path, "--reward_failures", "mask", "--beta", 0, "--weight_decay", 0)
    real, seen = trainer.run.task.rewards.reward, []

    def reward(text, sample, **options):
        seen.append(text)
        return None if len(seen) in (2, 5) else {**real(text, sample, **options), "length": float(len(seen))}

    monkeypatch.setattr(trainer.run.task.rewards, "reward", reward)
    packs, fill = [], trainer.fill_advantages
    monkeypatch.setattr(trainer, "fill_advantages", lambda p: (fill(p), packs.extend(p)))
    line = trainer.step(samples[:2], 0, [1e-3])
    assert line["reward_failures"] == 2 and line["rewards/length/mean"] == sum((1, 3, 4, 6, 7, 8)) / 6
    mask, advantages = torch.cat([pack.mask.any(dim=1)
                                  for pack in packs]), torch.cat([pack.advantages for pack in packs])
    assert mask.tolist() == [True, False, True, True, False, True, True, True] and (advantages[~mask] == 0).all()
    assert abs(advantages[:4].sum()) < 1e-6 and line["grad_norm"] > 0
    assert "2 rewards failed (--reward_failures mask); the first: " in capsys.readouterr().out
    assert trainer.step(samples[:2], 1, [1e-3])["reward_failures"] == 0


@pytest.mark.parametrize("objective", ["more-r1", "dr-grpo", "bnpo"])
def test_a_pass_that_a_rank_makes_for_others_alone_counts_nothing(folder, tmp_path, monkeypatch, objective):
    steps, equal = [], grpo.train.equal_passes
    for idle in (0, 3):
        trainer, _, samples = make(folder, tmp_path / str(idle), "--objective", objective, "--updates", 1)
        monkeypatch.setattr(grpo.train, "equal_passes",
                            lambda packs, device: equal(packs, device) + [idle_pack(device) for _ in range(idle)])
        line = trainer.step(samples[:4], 0, [1e-3])
        steps.append((line["loss"], line["grad_norm"], weights(trainer)))
    assert steps[0][:2] == steps[1][:2] and steps[0][1] > 0
    assert all(torch.equal(steps[0][2][name], tensor) for name, tensor in steps[1][2].items())


@pytest.mark.parametrize("objective", ["more-r1", "dapo"])
def test_a_run_in_which_every_reward_failed_says_so(folder, tmp_path, monkeypatch, objective):
    trainer, curriculum, _ = make(folder, tmp_path, "--objective", objective, "--reward_failures", "mask",
                                  "--max_rollouts", 1)
    monkeypatch.setattr(trainer.run.task.rewards, "reward", lambda *_, **options: None)
    before = weights(trainer)
    with pytest.raises(ValueError, match="nothing was learned"):
        grpo.train.train(trainer, curriculum)
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(trainer).items())


def test_a_sample_that_comes_twice_in_a_rollout_is_answered_in_two_ways(folder, tmp_path, monkeypatch):
    trainer, _, samples = make(folder, tmp_path, "--zero_variance_groups", "resampled", "--reward_weights",
                               "format=0,length=0,answer=0", "--resample_tries", 1)
    assert earlier_appearances([samples[0], samples[1], samples[0], samples[0]]) == [0, 0, 1, 2]
    written = lambda groups: [[completion.tolist() for completion in group.completions] for group in groups]
    alone = written(trainer.sample(samples[:2], 0))
    monkeypatch.setattr(trainer.settings, "max_prompt_tokens",
                        max(len(trainer.run.prompts(sample)) for sample in samples[:2]))
    too_long = next(sample for sample in samples
                    if len(trainer.run.prompts(sample)) > trainer.settings.max_prompt_tokens)
    batch = [samples[0], too_long, samples[0], samples[1]]
    drawn = trainer.sample(batch, 0, earlier_appearances(batch))
    first, again, other = written(drawn)
    assert [first, other] == alone and [group.earlier for group in drawn] == [0, 1, 0]
    assert not any(completion in first for completion in again)
    other_rank = written(trainer.sample([samples[0]], 0, [1]))  # the second appearance falls to another rank
    assert other_rank == [again]
    first, again, other = written(trainer.draw(batch, 0,
                                               earlier_appearances(batch)))  # all are drawn again, these two apart
    assert [first, other] != alone and not any(completion in first for completion in again)


def test_the_same_seed_gives_the_same_run(folder, tmp_path):
    ends = []
    for name in ("a", "b"):
        trainer, curriculum, _ = make(folder, tmp_path / name, "--predictions", folder / "split" / "predictions.jsonl")
        for step, batch in enumerate(curriculum.epochs[0].batches[:2]):
            trainer.step(batch, step, [1e-3, 1e-3])
        ends.append(weights(trainer))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_the_curriculum_of_every_epoch_is_written_down(folder, tmp_path):
    _, curriculum, _ = make(folder, tmp_path, "--predictions", folder / "split" / "predictions.jsonl", "--epochs", 3)
    records, drawn = lines(tmp_path / "curriculum.jsonl"), lines(tmp_path / "drawn.jsonl")
    assert [epoch["batches"] for epoch in drawn] == [[[sample.id for sample in batch] for batch in epoch.batches]
                                                    for epoch in curriculum.epochs]
    assert [record["epoch"] for record in records] == [0, 1, 2]
