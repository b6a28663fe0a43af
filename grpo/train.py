"""Stage 2: Group Relative Policy Optimization. One rollout, one update, from top to bottom:

    prompts → sample G completions each → rewards → advantages → reference log-probabilities → μ updates

    torchrun --nproc-per-node 8 -m grpo.train --model runs/stage-1/model --data MORE \\
        --predictions runs/split/predictions.jsonl --output runs/stage-2

What is kept of GRPO: group-normalised advantages, the clipped ratio, the KL to the frozen starting policy. There is
no critic, no learned reward, no replay: a rollout is used for μ updates and forgotten.
"""

import math
from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor

from data.curriculum import LAST_BATCHES, MIXINGS, Epoch, epoch_batches, none_share
from grpo.advantage import (
    combine_rewards,
    group_advantages,
    kl_penalised_rewards,
    overlong_penalty,
    zero_variance_groups,
)
from grpo.engine.lora import adapter_off
from grpo.engine.policy import Policy
from grpo.engine.rollout import Sampling
from grpo.group import Group, packs, pad_rows, row_mask
from grpo.objective import count_terms, mean_statistics, truncation_mask
from grpo.runtime.answer import check_reward_options
from grpo.runtime.dist import all_gather, all_reduce_max, all_reduce_sum, finish, rank, split_across_ranks, world_size
from grpo.runtime.fsdp import encode_images_unsharded, reshard, sample_unsharded
from grpo.runtime.liveness import heartbeat
from grpo.runtime.log import Stopwatch, progress, say
from grpo.runtime.memory import enough_memory
from grpo.runtime.metrics import MetricsLog
from grpo.runtime.optim import idle_pack, learning_rate, make_optimizer, pass_over, update
from grpo.runtime.rollout_log import RolloutLog
from grpo.runtime.run import Run, read_lines
from grpo.runtime.settings import TrainingSettings, parse, parse_options, run_program, setting
from grpo.variants import Preset, load_objective, loss_options, resolve

OVERRIDES = ("group_size", "updates", "temperature", "beta", "kl", "clip_low", "clip_high", "scale", "ddof", "eps",
             "level", "aggregate", "truncated", "zero_variance_groups", "surrogate", "kl_weighted", "combine", "overlong_share", "length")


def override(help: str):
    """A setting whose default is the objective's own."""
    return setting(None, help + " (default: the objective's)")


@dataclass
class Settings(TrainingSettings):
    """Stage 2: GRPO. The defaults are MORE-R1's."""

    predictions: str = setting("", "grpo.evaluate's predictions of the training split: right is easy, wrong is hard; "
                                   "empty: train on the whole split in one shuffle")
    objective: str = setting("more-r1", "a preset of grpo.variants, or a module of yours with a function `loss`")
    epochs: int = setting(4, "epochs of the curriculum")
    max_rollouts: int = setting(0, "stop after so many rollouts; 0 for all that the epochs hold")
    prompts_per_rollout: int = setting(16, "prompts of one rollout, over all processes")
    learning_rate: float = setting(1e-6, "peak of AdamW's learning rate")
    max_prompt_tokens: int = setting(4096, "longer prompts are dropped and counted, never cut")
    mixing: str = setting("progressive", "progressive: all hard samples and γ^(t−1) easy ones each; raw: all", choices=MIXINGS)
    decay: float = setting(0.5, "γ of the progressive mixing; 1: always 1:1, 0: hard only")
    last_batch: str = setting("fill", "an epoch's incomplete last rollout", choices=LAST_BATCHES)
    reward_weights: str = setting("", "name=number[,name=number]; others keep the task's weight")
    reward_options: str = setting("", "options of the task's reward, name=number[,name=number]")
    validate_every: int = setting(0, "rollouts between validations; 0: at the end of every epoch")
    rollout_log_every: int = setting(10, "rollouts between records of whole groups in rollouts.jsonl; the last is one too")
    rollout_log_groups: int = setting(4, "groups of one record; 0 for no log of rollouts")
    rollout_log_megabytes: float = setting(64.0, "largest rollouts.jsonl: a run that outgrows it keeps every second record")
    resample_tries: int = setting(3, "for zero_variance_groups=resampled: how often a flat group is drawn again before it is dropped")
    group_size: Optional[int] = override("G, completions a prompt")
    updates: Optional[int] = override("μ, updates a rollout")
    temperature: Optional[float] = override("of the rollouts and of the scored distribution")
    beta: Optional[float] = override("weight of the KL to the reference")
    kl: Optional[str] = override("estimator of the KL: k1, k2, k3")
    kl_weighted: Optional[bool] = override("weight the KL by the ratio, as TRL does unless told otherwise")
    surrogate: Optional[str] = override("what the clip bounds: ppo, cispo")
    clip_low: Optional[float] = override("ε below 1; inf for no clip")
    clip_high: Optional[float] = override("ε above 1; inf for no clip")
    scale: Optional[str] = override("advantages are divided by: group, batch, centred-batch, leave-one-out, none")
    ddof: Optional[int] = override("of the standard deviation: 0 or 1")
    eps: Optional[float] = override("added to the standard deviation")
    level: Optional[str] = override("ratio per token or sequence")
    aggregate: Optional[str] = override("mean over sequence, token, constant")
    length: Optional[int] = override("tokens of aggregate=constant; 0 for the completion limit")
    combine: Optional[str] = override("reward parts: sum, or normalised each before they are summed")
    overlong_share: Optional[float] = override("last share of the completion limit in which length is punished")
    truncated: Optional[str] = override("completions cut by the limit: kept or masked")
    zero_variance_groups: Optional[str] = override("groups of equal rewards: kept, dropped, resampled")

    def preset(self) -> Preset:
        """The objective with this run's overrides."""
        given = {name: getattr(self, name) for name in OVERRIDES if getattr(self, name) is not None}
        return resolve(self.objective, **given)

    def check(self) -> None:
        super().check()
        preset = self.preset()
        if preset.group_size < 2:
            raise ValueError(f"--group_size is {preset.group_size}; a group of one has no advantage: at least 2 expected")
        if preset.temperature <= 0:
            raise ValueError(f"--temperature is {preset.temperature}; rollouts are drawn, which takes a temperature above 0")
        if self.validate_every < 0 or self.max_rollouts < 0:
            raise ValueError(f"--validate_every is {self.validate_every}, --max_rollouts {self.max_rollouts}; "
                             f"each must be 0 (every epoch; no limit) or more")
        if self.max_prompt_tokens < 1:
            raise ValueError(f"--max_prompt_tokens is {self.max_prompt_tokens}; at least 1 expected")
        if self.rollout_log_every < 1 or self.rollout_log_groups < 0 or self.rollout_log_megabytes <= 0:
            raise ValueError(f"--rollout_log_every {self.rollout_log_every} --rollout_log_groups {self.rollout_log_groups} --rollout_log_megabytes "
                             f"{self.rollout_log_megabytes}: expected at least 1, at least 0, above 0")
        if preset.updates < 1:
            raise ValueError(f"--updates is {preset.updates}; at least 1 expected")
        if self.prompts_per_rollout < 1 or self.prompts_per_rollout % world_size():
            raise ValueError(f"--prompts_per_rollout is {self.prompts_per_rollout}; "
                             f"expected a multiple of the {world_size()} processes")


# ── samples ──────────────────────────────────────────────────────────────────────────────────────────────────────


def read_predictions(path: str, samples: list) -> tuple[list, list]:
    """(hard, easy): the samples that grpo.evaluate got wrong and right. Those it did not answer are in neither."""
    answered = read_lines(path, samples, "correct", bool)
    return [sample for sample, right in answered if not right], [sample for sample, right in answered if right]


class Curriculum:
    """Which samples each epoch's rollouts hold; see data/curriculum.py for how they are mixed."""

    def __init__(self, settings: Settings, samples: list, is_none):
        self.settings, self.is_none = settings, is_none
        self.none_share = none_share(samples, is_none)
        self.mixing = settings.mixing if settings.predictions else "raw"
        self.hard, self.easy = read_predictions(settings.predictions, samples) if settings.predictions else (samples, [])
        # All epochs at once: the learning rate's schedule needs the number of rollouts, and a fault shows at once.
        self.epochs = [self.epoch(index) for index in range(settings.epochs)]
        everything = sum(len(epoch.batches) for epoch in self.epochs)
        self.rollouts = min(everything, settings.max_rollouts or everything)
        metrics_log, drawn = (MetricsLog(settings.output, f"{name}.jsonl") for name in ("curriculum", "drawn"))
        for index, epoch in enumerate(self.epochs):
            metrics_log.write(epoch.record)
            drawn.write({"epoch": index, "batches": [[sample.id for sample in batch] for batch in epoch.batches]})

    def plan(self) -> list[tuple[int, list, bool]]:
        """(epoch, samples, whether they are the epoch's last) of every rollout."""
        every = [(index, batch, batch is epoch.batches[-1]) for index, epoch in enumerate(self.epochs) for batch in epoch.batches]
        return every[: self.rollouts]

    def epoch(self, index: int) -> Epoch:
        s = self.settings
        return epoch_batches(
            self.hard, self.easy, epoch=index, batch_size=s.prompts_per_rollout, is_none=self.is_none,
            none_share=self.none_share, decay=s.decay, mixing=self.mixing, last=s.last_batch, seed=s.seed)


# ── one rollout ──────────────────────────────────────────────────────────────────────────────────────────────────


class Trainer:
    """The state of Stage 2: policy and optimizer, reference, objective, rewards."""

    def __init__(self, run: Run, settings: Settings):
        self.run, self.settings = run, settings
        self.preset = settings.preset()
        self.loss = load_objective(settings.objective)
        self.options = loss_options(self.preset, settings.max_completion_tokens)
        self.optimizer = make_optimizer(run.policy, settings)
        self.reference: Policy | None = run.reference(settings.model) if self.preset.beta else None
        rewards = run.task.rewards
        self.weights = {**rewards.WEIGHTS, **parse_options(settings.reward_weights, "reward_weights")}
        if unknown := set(self.weights) - set(rewards.WEIGHTS):
            raise ValueError(f"--reward_weights: no reward {sorted(unknown)[0]!r}; the task has {', '.join(rewards.WEIGHTS)}")
        self.reward_options = parse_options(settings.reward_options, "reward_options")
        self.part_weights = torch.tensor(list(self.weights.values()), dtype=torch.float64)
        before = run.restore(self.optimizer)
        first = rank() == 0  # counts of all processes until then go on with the first one's
        self.too_long, self.longest = (before.get(name, 0) if first else 0 for name in ("too_long", "longest"))
        self.learned = before.get("learned", False)
        self.rollout_log = RolloutLog(run, self.preset.temperature, settings.rollout_log_every * before.get("rollout_log_thinned", 1),
                           settings.rollout_log_groups, int(settings.rollout_log_megabytes * 2**20), run.step)

    def progress(self) -> dict:
        """What a run that goes on must know besides weights and optimizer."""
        return {"too_long": sum(all_gather([self.too_long])), "longest": max(all_gather([self.longest])),
                "learned": any(all_gather([self.learned])), "rollout_log_thinned": self.rollout_log.every // self.settings.rollout_log_every}

    def rollout(self, samples: list, seed: int | str) -> list[Group]:
        """This process's groups. Prompts over the limit are dropped: a cut one would split its image's tokens."""
        settings, preset = self.settings, self.preset
        encoded = [self.run.prompts(sample) for sample in samples]
        prompts = [prompt for prompt in encoded if len(prompt) <= settings.max_prompt_tokens]
        self.too_long += len(encoded) - len(prompts)
        self.longest = max([self.longest, *map(len, encoded)])
        if self.run.policy.vision_is_frozen:
            encode_images_unsharded(self.run.policy, prompts)
        sampling = Sampling(settings.max_completion_tokens, self.run.encoder.end_tokens, preset.temperature,
                            rows=settings.rollout_rows, seed=f"{settings.seed}/{seed}").check_training()
        most = len(prompts) * preset.group_size * settings.max_completion_tokens
        with progress(most, "rollout", "token") as bar:
            def count(written: int, ended: int, spared: int) -> None:
                heartbeat()
                bar.total -= spared  # what ended early will not be written: time left is an upper bound that sinks
                bar.update(written)
            return sample_unsharded(self.run.policy, prompts, preset.group_size, sampling, count)

    def rewards(self, groups: list[Group]) -> Tensor:
        """(groups, G, K) unweighted parts. An error in a task's reward names its sample."""
        parts = torch.zeros(len(groups), self.preset.group_size, len(self.weights), dtype=torch.float64)
        for g, group in enumerate(groups):
            for i, completion in enumerate(group.completions):
                heartbeat()
                sample = group.prompt.sample
                try:
                    reward = self.run.task.rewards.reward(self.run.encoder.decode(completion), sample, **self.reward_options)
                    parts[g, i] = torch.tensor([float(reward[name]) for name in self.weights], dtype=torch.float64)
                except Exception as error:
                    raise ValueError(f"{sample.id}: its reward raised {type(error).__name__}: {error}") from error
                if not parts[g, i].isfinite().all():
                    raise ValueError(f"{sample.id}: reward {reward}; every part must be a finite number")
        return parts

    def advantages(self, groups: list[Group], parts: Tensor, ref_logps: list[Tensor] | None) -> Tensor:
        """(groups, G) of this process; scales over a batch see all processes' rewards."""
        preset, limit = self.preset, self.settings.max_completion_tokens
        rewards = self.totals(parts)
        if preset.overlong_share:
            lengths = torch.tensor([group.lengths for group in groups]).reshape(rewards.shape)
            rewards = rewards + overlong_penalty(lengths, limit, max(1, round(preset.overlong_share * limit)))
        if preset.kl_in_reward and ref_logps is not None and groups:
            lengths = [length for group in groups for length in group.lengths]
            logp = pad_rows(torch.cat([row for group in groups for row in group.logps]), lengths)
            ref = pad_rows(torch.cat(ref_logps).cpu(), lengths)
            rewards = kl_penalised_rewards(rewards, logp, ref, row_mask(lengths), preset.beta)
        counts = all_gather([len(groups)])
        everyones = torch.tensor(all_gather(rewards.tolist()), dtype=torch.float64).reshape(-1, preset.group_size)
        if not len(everyones):
            return rewards
        scaled = group_advantages(everyones, preset.scale, preset.ddof, preset.eps)
        start = sum(counts[: rank()])
        return scaled[start : start + len(groups)]

    @torch.no_grad()
    def reference_logps(self, parts: list[list[Group]]) -> list[Tensor] | None:
        """(T,) a pack, under the policy that the run began with. Every process joins every collective forward."""
        if self.reference is None:
            return None
        passes = int(all_reduce_max(torch.tensor(len(parts), device=self.run.device)))
        packs = parts + [idle_pack(self.reference)] * (passes - len(parts))
        logps = []
        for pack in packs:
            with adapter_off(self.reference), enough_memory(*pass_over(pack)):
                logps.append(self.reference.score(pack, self.preset.temperature).logp)
        reshard(self.reference)
        return logps[: len(parts)]

    def learn(self, parts: list[list[Group]], advantages: Tensor, ref_logps: list[Tensor] | None, rates: list[float]) -> dict:
        """μ updates on the packs of one rollout. The old log-probabilities are the first pass's own, detached."""
        device, old_logps, sums = self.run.device, {}, {}
        advantages_of = advantages.split([len(part) for part in parts]) if parts else ()
        masks = [self.mask(part).to(device) for part in parts]
        aggregate = self.options["aggregate"]
        denominator = float(all_reduce_sum(torch.tensor(float(sum(count_terms(mask, aggregate) for mask in masks)), device=device)))
        if not denominator:
            return {}
        losses = []

        def loss_of_pack(index: int, scores) -> Tensor:
            mask, lengths = masks[index], scores.lengths
            logp = pad_rows(scores.logp, lengths)
            old_logp = old_logps.setdefault(index, logp.detach())
            ref_logp = None if ref_logps is None else pad_rows(ref_logps[index], lengths)
            loss, statistics = self.loss(
                logp, old_logp, ref_logp, advantages_of[index].flatten().to(device, logp.dtype), mask,
                denominator=denominator, entropy=pad_rows(scores.entropy, lengths), **self.options)
            for name, value in statistics.items():
                sums[name] = sums.get(name, 0.0) + value.double()
            losses.append(loss.detach())
            bar.update()
            return loss

        with progress(len(parts) * len(rates), "update", "pack") as bar:
            norms = [update(self.run.policy, self.optimizer, parts, loss_of_pack, self.preset.temperature,
                            self.settings.max_grad_norm, rate) for rate in rates]
        names = sorted({name for names in all_gather([list(sums)]) for name in names})
        summed = all_reduce_sum(torch.tensor([float(sums.get(name, 0.0)) for name in names], dtype=torch.float64, device=device))
        loss = all_reduce_sum(torch.tensor(float(sum(losses)), device=device)) / len(rates)
        good = [norm for norm in norms if math.isfinite(norm)]
        return {"loss": float(loss), "grad_norm": sum(good) / len(good) if good else math.nan, "learning_rate": rates[-1],
                **self.run.judge(norms), **mean_statistics(dict(zip(names, summed)))}

    def mask(self, part: list[Group]) -> Tensor:
        """(N, L): the end token is inside; completions cut by the limit are out if the objective says so."""
        truncated = torch.tensor([not finished for group in part for finished in group.finished])
        return truncation_mask(row_mask([n for group in part for n in group.lengths]), truncated, self.preset.truncated)

    def step(self, samples: list, step: int, rates: list[float], epoch: int = 0) -> dict:
        """One rollout and its updates; returns the line for the metrics_log."""
        watch = Stopwatch()
        heartbeat("rollout")
        with watch("rollout"):
            drawn, drawn_parts = self.drawn(samples, step)
        keep = self.kept(drawn_parts)
        groups, parts = [drawn[i] for i in keep], drawn_parts[keep]
        packed = packs(groups, self.settings.tokens_per_pass)
        heartbeat("score")
        with watch("score"):
            ref_logps = self.reference_logps(packed)
        advantages = self.advantages(groups, parts, ref_logps)
        with watch("rollout_log"):
            watched = self.rollout_log.begin(step, epoch, groups, advantages)
        heartbeat("update")
        with watch("update"):
            learned = self.learn(packed, advantages, None if self.preset.kl_in_reward else ref_logps, rates)
        with watch("rollout_log"):
            named = dict(zip(self.weights, parts.unbind(-1)))
            self.rollout_log.end(watched, named, self.totals(parts), advantages, ref_logps)
        self.learned |= bool(learned)
        self.run.prompts.release_features([group.prompt for group in drawn])
        seconds = {f"seconds/{phase}": round(value, 3) for phase, value in watch.seconds.items()}
        return {**self.describe(drawn, drawn_parts, len(keep)), **learned, "step_time": round(watch.total(), 3), **seconds}

    def drawn(self, samples: list, step: int) -> tuple[list[Group], Tensor]:
        """Groups and reward parts; with zero_variance_groups=resampled, flat ones are drawn again with other noise (DAPO)."""
        groups = self.rollout(split_across_ranks(samples), step)
        parts = self.rewards(groups)
        tries = self.settings.resample_tries if self.preset.zero_variance_groups == "resampled" else 0
        for attempt in range(tries):  # every process goes through every try: unsharding is a collective
            flat = self.flat(parts).nonzero()[:, 0].tolist()
            again = self.rollout([groups[i].prompt.sample for i in flat], f"{step}/{attempt}")
            for i, group, part in zip(flat, again, self.rewards(again)):
                groups[i], parts[i] = group, part
        return groups, parts

    def totals(self, parts: Tensor) -> Tensor:
        """(groups, G, K) reward parts → (groups, G), also of no group at all."""
        return combine_rewards(parts, self.part_weights, self.preset.combine) if len(parts) else parts.sum(-1)

    def flat(self, parts: Tensor) -> Tensor:
        """(groups,) bool."""
        return zero_variance_groups(self.totals(parts)) if len(parts) else torch.zeros(0, dtype=torch.bool)

    def kept(self, parts: Tensor) -> list[int]:
        """The groups that are learned from: all, or those that are not flat."""
        keep = torch.ones(len(parts), dtype=torch.bool) if self.preset.zero_variance_groups == "kept" else ~self.flat(parts)
        return keep.nonzero()[:, 0].tolist()

    def describe(self, groups: list[Group], parts: Tensor, kept: int) -> dict:
        """Rewards and lengths of everything drawn, over all processes, under TRL's names."""
        rewards = torch.tensor(all_gather(self.totals(parts).tolist()), dtype=torch.float64).reshape(-1, self.preset.group_size)
        too_long, kept = (sum(all_gather([count])) for count in (self.too_long, kept))
        parts = torch.tensor(all_gather(parts.flatten(0, 1).tolist()), dtype=torch.float64).reshape(-1, len(self.weights))
        lengths = torch.tensor(all_gather([n for group in groups for n in group.lengths]), dtype=torch.float64)
        finished = torch.tensor(all_gather([f for group in groups for f in group.finished]), dtype=torch.float64)
        if not len(rewards):
            return {"prompts": 0, "prompts_too_long": too_long, "groups_dropped": 0}
        return {
            "prompts": len(rewards),
            "prompts_too_long": too_long,  # since the run began
            "groups_dropped": len(rewards) - kept,
            "reward": rewards.mean().item(),
            "reward_std": rewards.std(dim=1).mean().item(),
            "frac_reward_zero_std": zero_variance_groups(rewards).double().mean().item(),
            **{f"rewards/{name}/mean": parts[:, k].mean().item() for k, name in enumerate(self.weights)},
            "completions/mean_length": lengths.mean().item(),
            "completions/max_length": lengths.max().item(),
            "completions/clipped_ratio": 1 - finished.mean().item(),
        }


# ── the loop ─────────────────────────────────────────────────────────────────────────────────────────────────────


def train(trainer: Trainer, curriculum: Curriculum) -> None:
    """Epochs of rollouts; validation before the first, then every so often, keeps the best checkpoint."""
    run, settings, mu = trainer.run, trainer.settings, trainer.preset.updates
    rollouts = curriculum.rollouts
    split = f"{len(curriculum.hard)} hard and {len(curriculum.easy)} easy" if settings.predictions else len(curriculum.hard)
    say(f"{split} samples, {rollouts} rollouts of "
        f"{settings.prompts_per_rollout} × {trainer.preset.group_size} completions, {mu} updates each")
    trainer.rollout_log.last = rollouts - 1
    if not run.step:
        run.metrics_log.write({"step": 0, **run.validate(0)})
    with progress(rollouts, "GRPO", "rollout") as bar:
        bar.update(run.step)
        for done, (epoch, batch, last_of_epoch) in enumerate(curriculum.plan()[run.step:], run.step):
            rates = [learning_rate(done * mu + i, rollouts * mu, settings.learning_rate, settings.warmup, settings.schedule)
                     for i in range(mu)]
            step, last = done + 1, done + 1 == rollouts
            line = {"step": step, "epoch": epoch, **trainer.step(batch, done, rates, epoch)}
            bar.update()
            if last or (step % settings.validate_every == 0 if settings.validate_every else last_of_epoch):
                line |= run.validate(step)
            run.metrics_log.write(line)
            say(readable(line, rollouts))
            run.checkpoint(trainer.optimizer, step, trainer.progress, last)
    if not sum(all_gather([trainer.learned])):
        raise ValueError(f"nothing was learned: {sum(all_gather([trainer.too_long]))} prompts are longer than --max_prompt_tokens "
                         f"{settings.max_prompt_tokens} (the longest has {max(all_gather([trainer.longest]))} tokens), the rest gave flat groups")


def readable(line: dict, rollouts: int) -> str:
    """One update as one line for people."""
    if "loss" not in line:
        return (f"{line['step']}/{rollouts}  no group to learn from ({line['groups_dropped']} flat ones dropped, "
                f"{line['prompts_too_long']} prompts too long so far)")
    parts = "  ".join(f"{name.split('/')[1]} {value:.2f}" for name, value in line.items() if name.startswith("rewards/"))
    return (f"{line['step']}/{rollouts}  reward {line['reward']:.3f} ({parts})  kl {line.get('kl', 0):.4f}  "
            f"length {line['completions/mean_length']:.0f}  flat {line['frac_reward_zero_std']:.0%}  {line['step_time']:.1f} s")


def main() -> None:
    settings = parse(Settings)
    run = Run(settings)
    samples = run.load(settings.split)
    check_reward_options(run.task, samples, parse_options(settings.reward_options, "reward_options"))
    curriculum = Curriculum(settings, samples, run.task.data.is_none)
    train(Trainer(run, settings), curriculum)
    run.close()
    finish()


if __name__ == "__main__":
    run_program(main)
