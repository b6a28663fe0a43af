"""Stage 1, the supervised cold start: next-token loss on the expert's responses, nothing else.

    torchrun --nproc-per-node 8 -m sft.train --model Qwen/Qwen2.5-VL-7B-Instruct --data MORE \\
        --responses cold_start.jsonl --output runs/stage-1

SFT is `score` with one continuation a prompt and the loss −log p; without --responses that of the gold answer."""

import math
import random
from dataclasses import dataclass

from grpo.runtime.settings import TrainingSettings, read_settings, refuse_early, run_program, setting


@dataclass
class Settings(TrainingSettings):
    """Stage 1: supervised fine-tuning. The defaults are MORE-R1's."""

    responses: str = setting("", "JSONL of {id, response}, as sft.annotate writes it; empty: the gold answer alone",
                             top=True, path="file", resume="free")
    samples: str = setting("", "JSON list of sample ids to train on, as sft.annotate draws them; empty for all",
                           top=True, path="file", resume="free")
    epochs: int = setting(20, "passes over the responses", top=True, above=0)
    batch_size: int = setting(128, "responses per update, over all ranks and accumulation steps", top=True, least=1)
    learning_rate: float = setting(1e-4, "peak of AdamW's learning rate", top=True, above=0)
    max_tokens: int = setting(2096, "prompt and response; longer ones are dropped, never cut", top=True, least=1)
    validate_every: int = setting(1, "epochs between validations", least=1)
    patience: int = setting(0, "stop after so many validations in a row without a new best; 0 for no limit", least=0)
    minutes: float = setting(0.0, "stop after the epoch in which so many minutes are over; 0 for no limit", least=0)

    def check(self) -> None:
        super().check()
        if self.samples and self.responses:
            raise ValueError("--samples with --responses: the responses name their samples; give one of the two")
        if self.patience and not self.valid_split:
            raise ValueError(f"--patience is {self.patience}; expected 0 (no limit), or more with a --valid_split")


refuse_early(Settings, __name__)

import torch

from grpo.group import Group, make_packs, pad_rows
from grpo.runtime.dist import all_gather, all_reduce_sum, broadcast_from_rank_0, finish, rank, split_across_ranks
from grpo.runtime.fsdp import encode_images_unsharded
from grpo.runtime.liveness import heartbeat
from grpo.runtime.log import Means, Stopwatch, progress, say
from grpo.runtime.optim import backward, equal_passes, learning_rate, make_optimizer, optimizer_step, packed_pass
from grpo.runtime.run import Run, read_ids, read_lines


def training_pairs(run: Run) -> list[tuple]:
    """What is learned: the expert's responses, or the gold answers of all (or the named) samples."""
    settings, samples = run.settings, run.load(run.settings.split)
    if settings.responses:
        return read_lines(settings.responses, samples, "response", str, run.task)
    if settings.samples:
        wanted = read_ids(settings.samples, samples, run.task)
        samples = [sample for sample in samples if sample.id in wanted]
    if not samples:
        raise ValueError(f"{settings.samples or settings.data}: no sample of split {settings.split} to train on")
    return [(sample, run.task.data.target(sample)) for sample in samples]


def encode_batch(run: Run, pairs: list[tuple]) -> list[Group]:
    """Groups of one completion; what is longer than --max_tokens is left out."""
    groups = [Group(run.prompts(sample), [run.encoder.completion(response)]) for sample, response in pairs]
    return [group for group in groups if group.packed_tokens <= run.settings.max_tokens]


def step(run: Run, optimizer, groups: list[Group], rate: float) -> dict:
    """One update: −Σ log p over all response tokens of the batch ÷ their number over all ranks."""
    tokens = float(all_reduce_sum(torch.tensor(sum(sum(group.lengths) for group in groups), device=run.device)))
    if not tokens:
        return {}
    prompts = [group.prompt for group in groups]
    if run.settings.keep_features and run.policy.vision_is_frozen:
        encode_images_unsharded(run.policy, prompts)
    total = torch.zeros((), device=run.device)
    packs = equal_passes(make_packs(groups, run.settings.tokens_per_pass, run.device), run.device)
    for pack in packs:
        with packed_pass(pack):
            scores = run.policy.score(pack.groups)
            logp = pad_rows(scores.logp, scores.lengths)
            loss = -(logp * pack.mask).sum() / tokens
            backward(loss)
        pack.old_logp, pack.loss = logp.detach(), loss.detach()
        total += pack.loss
    norm = optimizer_step(run.policy, optimizer, total, run.settings.max_grad_norm, rate)
    run.prompts.release_features(prompts)
    return {"loss": float(all_reduce_sum(total)), "grad_norm": norm, "learning_rate": rate, "num_tokens": tokens,
            **run.judge([norm], packs)}


def train(run: Run, pairs: list[tuple]) -> None:
    """Epochs of shuffled batches; validation keeps the best checkpoint."""
    settings, optimizer = run.settings, make_optimizer(run.policy, run.settings)
    # in_vain: validations since the best one; trained: responses of the epoch at hand, seconds: of all, until then
    before = {"in_vain": 0, "trained": 0, "seconds": 0.0, "over": False, **run.restore(optimizer)}
    per_epoch, clock = -(-len(pairs) // settings.batch_size), Stopwatch()
    steps, done, in_vain = per_epoch * settings.epochs, run.step, before["in_vain"]
    trained = before["trained"] if rank() == 0 else 0
    minutes = lambda: (before["seconds"] + clock.total()) / 60
    over, means = before["over"], Means(steps)
    while done < steps and not over:
        epoch, index = divmod(done, per_epoch)
        order = random.Random(f"{settings.seed}/{epoch}").sample(pairs, len(pairs))
        with progress(per_epoch, f"epoch {epoch + 1}/{settings.epochs}", "update") as bar:
            bar.update(index)
            for start in range(index * settings.batch_size, len(order), settings.batch_size):
                watch = Stopwatch()
                heartbeat("update")
                groups = encode_batch(run, split_across_ranks(order[start : start + settings.batch_size]))
                trained += len(groups)
                rate = learning_rate(done, steps, settings.learning_rate, settings.warmup, settings.schedule)
                line = step(run, optimizer, groups, rate)
                done += 1
                run.metrics_log.write({"step": done, "epoch": epoch, **line, "step_time": watch.total()})
                bar.update()
                if mean := means.add({"loss": math.nan, **line, "step_time": watch.total()}, due=done == steps):
                    say(f"{done}/{steps}  loss {mean['loss']:.4f}  rate {rate:.2g}  {mean['step_time']:.1f} s")
                if done % per_epoch == 0:
                    report_dropped(epoch, sum(all_gather([trained])), len(pairs), settings.max_tokens)
                    trained, (in_vain, over) = 0, end_epoch(run, epoch, done, in_vain, minutes())
                run.checkpoint(optimizer, done, lambda: {
                    "in_vain": in_vain, "trained": sum(all_gather([trained])), "seconds": 60 * minutes(), "over": over},
                    last=done == steps or over)


def end_epoch(run: Run, epoch: int, done: int, in_vain: int, minutes: float) -> tuple[int, bool]:
    """Validation where it is due: (validations since the best one, whether training is over before its time)."""
    settings = run.settings
    # clocks that differ cannot part the ranks
    out_of_time = broadcast_from_rank_0(lambda: bool(settings.minutes) and minutes > settings.minutes)
    if (epoch + 1) % settings.validate_every == 0 or epoch + 1 == settings.epochs or out_of_time:
        best = run.best
        run.metrics_log.write({"step": done, "epoch": epoch, **run.validate(done)})
        in_vain = 0 if run.best > best else in_vain + 1
    in_vain_enough = bool(settings.patience) and in_vain >= settings.patience
    if out_of_time:
        say(f"stopped after epoch {epoch + 1}: --minutes {settings.minutes} are over")
    elif in_vain_enough and epoch + 1 < settings.epochs:
        say(f"stopped after epoch {epoch + 1}: {in_vain} validations without a new best")
    return in_vain, out_of_time or in_vain_enough


def report_dropped(epoch: int, trained: int, given: int, limit: int) -> None:
    longer = f"longer than --max_tokens {limit} with their prompts"
    if not trained:
        raise ValueError(f"no response to train on: all {given} are {longer}")
    if trained < given and epoch == 0:
        say(f"dropped {given - trained} of {given} responses: {longer}")


def main() -> None:
    settings = read_settings(Settings)
    run = Run(settings, reasoning=bool(settings.responses))
    train(run, training_pairs(run))
    run.close()
    finish()


if __name__ == "__main__":
    run_program(main)
