"""Stage 2: Group Relative Policy Optimization. One rollout, one update, from top to bottom:

    prompts → sample G completions each → rewards → advantages → reference log-probabilities → μ updates

    torchrun --nproc-per-node 8 -m grpo.train --model runs/stage-1/model --data MORE \\
        --predictions runs/split/predictions.jsonl --output runs/stage-2

What is kept of GRPO: group-normalised advantages, the clipped ratio, the KL to the frozen starting policy. There is
no critic, no learned reward, no replay: a rollout is used for μ updates and forgotten."""

import math

from grpo.runtime.settings import parse_options, read_settings, refuse_early, run_program
from grpo.settings import Settings

refuse_early(Settings, __name__)  # --help, a misspelled setting and a missing path need not wait for the imports below

import torch

from grpo.advantage import combine_rewards, group_advantages, kl_penalised_rewards, overlong_penalty
from grpo.advantage import zero_variance_groups
from grpo.engine.lora import adapter_off
from grpo.engine.policy import Policy
from grpo.engine.rollout import Sampling
from grpo.engine.split_group import split
from grpo.group import Group, Pack, make_packs, pad_rows, row_mask
from grpo.objective import count_terms, mean_statistics, truncation_mask
from grpo.runtime.answer import check_reward_options, remember_predictions, roll_out
from grpo.runtime.dist import all_gather, all_reduce_sum, any_rank, finish, rank, split_across_ranks
from grpo.runtime.fsdp import reshard
from grpo.runtime.liveness import Phases
from grpo.runtime.log import Means, progress, say
from grpo.runtime.optim import backward, equal_passes, learning_rate, make_optimizer, optimizer_step
from grpo.runtime.optim import packed_pass, passes, skip_idle
from grpo.runtime.reward_calls import RewardCalls, reward_weights
from grpo.runtime.rollout_log import RolloutLog
from grpo.runtime.run import Run
from grpo.runtime.schedule import Curriculum, earlier_appearances
from grpo.runtime.step_metrics import Sums, Symptoms, outcome, readable
from grpo.runtime.step_metrics import rollout_metrics, sampling_metrics, speculation_metrics
from grpo.variants import PRESETS, load_objective, loss_options

# ── one step ─────────────────────────────────────────────────────────────────────────────────────────────────────


class Trainer:
    """The state of Stage 2: policy and optimizer, reference, objective, rewards."""

    def __init__(self, run: Run, settings: Settings):
        self.run, self.settings, self.policy = run, settings, run.policy
        self.preset = settings.objective
        self.loss = load_objective(settings.objective.name)
        self.loss_options = loss_options(self.preset, settings.max_completion_tokens)
        self.may_skip = settings.objective.name in PRESETS and not (self.preset.beta or settings.lora_dropout)
        self.optimizer = make_optimizer(run.policy, settings)
        self.reference: Policy | None = run.reference(settings.model) if self.preset.beta else None
        self.weights = reward_weights(run.task.rewards.WEIGHTS, settings.reward_weights)  # of each reward part, by name
        self.call_reward = RewardCalls(run.task.rewards, run.encoder.decode, list(self.weights),
                                       parse_options(settings.reward_options, "reward_options"),
                                       settings.reward_seconds, settings.reward_failures)
        before = run.restore(self.optimizer)
        if rank() == 0:  # counts of all ranks until then go on with the first one's
            run.prompts.too_long, run.prompts.longest = before.get("too_long", 0), before.get("longest", 0)
        self.learned, self.without_signal = before.get("learned", False), before.get("without_signal", 0)
        self.speculation = run.speculation.get("rollout")
        self.rollout_log = RolloutLog(
            run, self.preset.temperature, settings.rollout_log_every * before.get("rollout_log_thinned", 1),
            settings.rollout_log_groups, int(settings.rollout_log_megabytes * 2**20), run.step)

    def step(self, samples: list, number: int, rates: list[float], epoch: int = 0) -> dict:
        """Rollout `number` on `samples`, and one update for each learning rate: the line for the metrics log."""
        phase = Phases()
        with phase("rollout"):  # sample G completions a prompt, and judge them
            drawn = self.draw(split_across_ranks(samples), number, split_across_ranks(earlier_appearances(samples)))
            failures = self.call_reward.count_failures()
        groups = [group for group in drawn if self.preset.zero_variance_groups == "kept" or not zero_variance(group)]
        packs = equal_passes(self.pack(groups), self.run.device)
        with phase("reference"):  # what the policy that the run began with says to them
            self.score_reference(packs)
        with phase("advantage"):  # how much better each is than its group
            self.fill_advantages(packs)
        with phase("update"):  # μ times: ratio, clip, KL, backward, step
            learned = self.update(packs, rates)
        with phase("rollout_log"):
            self.rollout_log.record(number, epoch, packs, list(self.weights))
        self.run.prompts.release_features([group.prompt for group in drawn])
        self.learned |= bool(learned)
        drawn_metrics = rollout_metrics(drawn, len(groups), self.run.prompts.too_long, list(self.weights))
        self.without_signal += drawn_metrics.get("frac_reward_zero_std", 1) == 1
        drawn_metrics |= {"rollouts_without_signal": self.without_signal, "reward_failures": failures}
        return {**drawn_metrics, **speculation_metrics(self.speculation), **learned, **phase.metrics()}

    # ── sample and reward ────────────────────────────────────────────────────────────────────────────────────────

    def draw(self, samples: list, number: int | str, earlier: list[int] = ()) -> list[Group]:
        """This rank's groups with their rewards; `earlier` as in `sample`. With zero_variance_groups=resampled,
        groups that teach nothing are drawn again with other noise: DAPO's dynamic sampling."""
        groups = self.reward(self.sample(samples, number, earlier))
        tries = self.settings.resample_tries if self.preset.zero_variance_groups == "resampled" else 0
        for attempt in range(tries):  # every rank goes through every try: gathering weights is a collective
            again = [i for i, group in enumerate(groups) if zero_variance(group)]
            new = self.reward(self.sample([groups[i].prompt.sample for i in again], f"{number}/{attempt}",
                                          [groups[i].earlier for i in again]))
            for i, group in zip(again, new):
                groups[i] = group
        return groups

    def sample(self, samples: list, number: int | str, earlier: list[int] = ()) -> list[Group]:
        """G completions for each sample whose prompt is short enough. earlier: how often each sample came before in
        this rollout, over all ranks (empty: never); its completions then have noise of their own."""
        settings = self.settings
        prompts = self.run.prompts.short_enough(samples, settings.max_prompt_tokens)
        short = {id(prompt.sample) for prompt in prompts}
        earlier = tuple(count for sample, count in zip(samples, earlier) if id(sample) in short)
        sampling = Sampling(settings.max_completion_tokens, self.run.encoder.end_tokens, self.preset.temperature,
                            rows=settings.rollout_rows, read_every=settings.read_every,
                            seed=f"{settings.seed}/{number}", earlier=earlier)
        groups = roll_out(self.policy, prompts, self.preset.group_size, sampling, self.speculation)
        for group, count in zip(groups, earlier):
            group.earlier = count
        return groups

    def reward(self, groups: list[Group]) -> list[Group]:
        """The groups, with (G, K) reward parts and (G,) rewards."""
        weights = torch.tensor(list(self.weights.values()), dtype=torch.float64)
        for group in groups:
            group.parts, group.counted = self.call_reward(group)
            group.rewards = combine_rewards(group.parts[None], weights, self.preset.combine,
                counted=group.counted[None])[0]
        return groups

    # ── reference and advantage ──────────────────────────────────────────────────────────────────────────────────

    def pack(self, groups: list[Group]) -> list[Pack]:
        """Groups for one pass each, and those too large for one in parts. Completions whose reward failed do not train,
        and those cut by the limit if the objective says so."""
        apart, budget = [groups], self.settings.tokens_per_pass
        if self.may_skip:  # groups that teach nothing have passes of their own, which need not be made
            apart = [[group for group in groups if zero_variance(group) == flat] for flat in (False, True)]
        packs = split([pack for some in apart for pack in make_packs(some, budget, self.run.device)], budget)
        for pack in packs:
            cut = torch.tensor([not done for group in pack.groups for done in group.finished], device=self.run.device)
            counted = torch.cat([group.counted for group in pack.groups]).to(self.run.device)
            pack.mask = truncation_mask(pack.mask, cut, self.preset.truncated) & counted[:, None]
        return packs

    @torch.no_grad()
    def score_reference(self, packs: list[Pack]) -> None:
        """Each pack's ref_logp: the policy that the run began with, a frozen copy or this one with its adapter off."""
        if self.reference is None:
            return
        for pack, score in passes(self.reference, packs, self.preset.temperature):
            with adapter_off(self.reference), packed_pass(pack):
                scores = score()
            pack.ref_logp = pad_rows(scores.logp, scores.lengths)
        reshard(self.reference)

    def fill_advantages(self, packs: list[Pack]) -> None:
        """Each pack's advantages. A std over the batch sees all ranks' rewards."""
        waiting = [pack for pack in packs if pack.advantages is None]  # all but the idle ones
        mine = [reward for pack in waiting for reward in self.rewards_of(pack).tolist()]
        before, everyone = sum(all_gather([len(mine)])[: rank()]), all_gather(mine)
        counted = all_gather([flag for pack in waiting for group in pack.groups for flag in group.counted.tolist()])
        if not everyone:
            return
        preset, everyone = self.preset, torch.tensor(everyone, dtype=torch.float64).reshape(-1, self.preset.group_size)
        counted = torch.tensor(counted).reshape(everyone.shape)
        every = group_advantages(everyone, preset.scale, preset.ddof, preset.eps, counted).flatten()[before:]
        every = every.to(self.run.device, torch.float32)
        for pack in waiting:
            pack.advantages, every = every[: len(pack.mask)], every[len(pack.mask):]

    def rewards_of(self, pack: Pack) -> torch.Tensor:
        """(N,) float64: the completions' rewards, less what the objective takes for length and for the KL."""
        preset, limit, lengths = self.preset, self.settings.max_completion_tokens, pack.lengths
        rewards = torch.cat([group.rewards for group in pack.groups])
        if preset.overlong_share:
            rewards = rewards + overlong_penalty(torch.tensor(lengths), limit,
                max(1, round(preset.overlong_share * limit)))
        if preset.kl_in_reward and pack.ref_logp is not None:
            logp = pad_rows(torch.cat([row for group in pack.groups for row in group.logps]), lengths)
            rewards = kl_penalised_rewards(rewards, logp, pack.ref_logp.cpu(), row_mask(lengths), preset.beta)
        return rewards

    # ── update ───────────────────────────────────────────────────────────────────────────────────────────────────

    def update(self, packs: list[Pack], rates: list[float]) -> dict:
        """μ updates on the packs of one rollout. The old log-probabilities are the first pass's own, detached."""
        aggregate, device = self.loss_options["aggregate"], self.run.device
        drawn = [pack for pack in packs if pack.groups[0].rewards is not None]  # skipped ones too, idle ones not
        terms = sum(count_terms(pack.mask, aggregate) for pack in drawn)
        denominator = float(all_reduce_sum(torch.as_tensor(terms, dtype=torch.float32, device=device)))
        if not any_rank(any(pack.mask.any() for pack in packs), device):
            return {}
        packs, skipped = skip_idle(packs, device) if self.may_skip else (packs, {})
        norms, sums = [], Sums()
        with progress(len(packs) * len(rates), "update", "pack") as bar:
            for rate in rates:
                loss_of_update = torch.zeros((), device=device)
                for pack, score in passes(self.policy, packs, self.preset.temperature):
                    with packed_pass(pack):
                        scores = score()
                        logp = pad_rows(scores.logp, scores.lengths)
                        if pack.old_logp is None:  # nothing has been learned yet: this is the policy that drew
                            pack.old_logp = logp.detach()
                        ref_logp = None if self.preset.kl_in_reward else pack.ref_logp
                        loss, statistics = self.loss(
                            logp, pack.old_logp, ref_logp, pack.advantages, pack.mask, denominator=denominator,
                            entropy=pad_rows(scores.entropy, scores.lengths), **self.loss_options)
                        backward(loss)
                    pack.loss = loss.detach()
                    loss_of_update += pack.loss
                    sums.add({"loss": loss / len(rates), **statistics})
                    bar.update()
                limit = self.settings.max_grad_norm
                norms.append(optimizer_step(self.policy, self.optimizer, loss_of_update, limit, rate))
        statistics = sums.over_ranks()
        good = [norm for norm in norms if math.isfinite(norm)] or [math.nan]
        return {"loss": statistics.pop("loss"), "grad_norm": sum(good) / len(good),
                "learning_rate": rates[-1], **skipped, **self.run.judge(norms, packs), **mean_statistics(statistics),
                **sampling_metrics(packs)}

    def progress(self) -> dict:
        """What a run that goes on must know besides weights and optimizer."""
        prompts = self.run.prompts
        return {"too_long": sum(all_gather([prompts.too_long])), "longest": max(all_gather([prompts.longest])),
                "learned": any(all_gather([self.learned])), "without_signal": self.without_signal,
                "rollout_log_thinned": self.rollout_log.every // self.settings.rollout_log_every}


def zero_variance(group: Group) -> bool:
    return bool(zero_variance_groups(group.rewards[None], group.counted[None]))


# ── the loop ─────────────────────────────────────────────────────────────────────────────────────────────────────


def train(trainer: Trainer, curriculum: Curriculum) -> None:
    """Epochs of rollouts; validation before the first, then every so often, keeps the best checkpoint."""
    run, settings, mu = trainer.run, trainer.settings, trainer.preset.updates
    rollouts = len(curriculum.plan)
    hard, easy = len(curriculum.hard), len(curriculum.easy)
    say(f"{f'{hard} hard and {easy} easy' if settings.predictions else hard} samples, {rollouts} rollouts of "
        f"{settings.prompts_per_rollout} × {trainer.preset.group_size} completions, {mu} updates each")
    trainer.rollout_log.last, symptoms, means = rollouts - 1, Symptoms(), Means(rollouts)
    if not run.step:
        if settings.predictions and trainer.speculation:
            remember_predictions(trainer.speculation, settings.predictions, run.task,
                curriculum.hard + curriculum.easy, run.encoder)
        run.metrics_log.write({"step": 0, **run.validate(0)})
    with progress(rollouts, "GRPO", "rollout") as bar:
        bar.update(run.step)
        for done, (epoch, batch, last_of_epoch) in enumerate(curriculum.plan[run.step:], run.step):
            rates = [learning_rate(done * mu + i, rollouts * mu, settings.learning_rate, settings.warmup,
                                   settings.schedule) for i in range(mu)]
            step, last = done + 1, done + 1 == rollouts
            line = {"step": step, "epoch": epoch, **trainer.step(batch, done, rates, epoch)}
            bar.update()
            if validated := last or (step % settings.validate_every == 0 if settings.validate_every else last_of_epoch):
                line |= run.validate(step)
            run.metrics_log.write(line)
            found = symptoms.found(line)
            if mean := means.add(line, due=validated or bool(found)):
                say("\n".join([readable(mean, rollouts), *found]))
            run.checkpoint(trainer.optimizer, step, trainer.progress, last)
    if not sum(all_gather([trainer.learned])):
        raise ValueError(f"nothing was learned: {sum(all_gather([run.prompts.too_long]))} prompts are longer than "
                         f"--max_prompt_tokens {settings.max_prompt_tokens} (the longest has "
                         f"{max(all_gather([run.prompts.longest]))} tokens), the rest gave zero-variance groups")
    say(outcome(run.metrics_log.values("reward"), run.metrics_log.values(f"valid/{settings.valid_metric}"),
                f"best {settings.valid_metric} at step {run.best_step}" if run.valid else ""))


def main() -> None:
    settings = read_settings(Settings)
    run = Run(settings)
    samples = run.load(settings.split)
    check_reward_options(run.task, parse_options(settings.reward_options, "reward_options"))
    curriculum = Curriculum(settings, samples, run.task.data.is_none)
    train(Trainer(run, settings), curriculum)
    run.close()
    finish()


if __name__ == "__main__":
    run_program(main)
