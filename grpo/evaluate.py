"""Answer every sample of a split and score the answers; the file of predictions is also the hard/easy split.

    torchrun --nproc-per-node 8 -m grpo.evaluate --model runs/stage-1/model --data MORE --split test --output runs/test

writes <output>/predictions.jsonl, one {id, completion, correct, reward parts, votes} a sample, <output>/metrics.json,
and <output>/per_label.json where the task counts by label."""

import json
from dataclasses import dataclass
from pathlib import Path

from grpo.runtime.settings import (CommonSettings, parse_options, read_settings, refuse_early, run_program, setting,
                                   speed)


@dataclass
class Settings(CommonSettings):
    """Evaluation. The defaults are MORE-R1's: greedy, one answer a sample."""

    split: str = setting("test", "split to answer", top=True)
    exclude: str = setting("", "JSON list of sample ids to leave out, as the cold start's", top=True, path="file")
    limit: int = setting(0, "answer only the first so many samples; 0 for all", least=0)
    temperature: float = setting(0.0, "0 is greedy", top=True, least=0)
    samples: int = setting(1, "completions a sample; of several the most frequent answer counts", top=True, least=1)
    top_p: float = setting(1.0, "keep the smallest set of tokens this likely", group="sampling", above=0, most=1)
    top_k: int = setting(0, "keep this many tokens; 0 for all", group="sampling", least=0)
    guesses: str = speed("", "predictions.jsonl of an earlier evaluation of these samples, to guess from: fewer "
                             "decode steps", path="file")
    reward_options: str = setting("", "options of the task's reward, name=number[,name=number]", group="reward")

    def check(self) -> None:
        super().check()
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(f"--samples {self.samples} at --temperature 0 would be as many equal answers; "
                             f"a temperature above 0 expected")


refuse_early(Settings, __name__)

from data.task import load_samples, resolve_task, sample_hash
from grpo.engine.encode import Encoder
from grpo.engine.files import reasoning_of
from grpo.engine.rollout import Sampling
from grpo.engine.speculation import Speculation
from grpo.runtime.answer import Prompts, answer, check_reward_options, remember_predictions
from grpo.runtime.dist import finish, rank, start
from grpo.runtime.files import write_json, write_whole
from grpo.runtime.fsdp import compute_dtype
from grpo.runtime.log import Stopwatch, say, table
from grpo.runtime.provenance import what_ran
from grpo.runtime.run import load_frozen, read_ids
from rewards.vote import majority


def chosen_samples(settings: Settings, task, encoder: Encoder) -> list:
    samples = load_samples(task, settings, settings.split, encoder.seen_size)
    if settings.exclude:
        excluded = read_ids(settings.exclude, samples, task)
        samples = [sample for sample in samples if sample.id not in excluded]
    samples = samples[: settings.limit] if settings.limit else samples
    if not samples:
        raise ValueError(f"{settings.data}: split {settings.split} has no sample left to answer")
    return samples


def write_predictions(path: Path, task, samples: list, voted: list[tuple[str, int]], options: dict) -> None:
    """One JSON line a sample, in the split's order, with the votes for it. Where a reward fails, the completions are
    written all the same, before ValueError names the sample."""
    lines = [{"id": sample.id, "completion": text, "votes": votes, "sample": sample_hash(task, sample)}
             for sample, (text, votes) in zip(samples, voted)]
    try:
        for sample, line in zip(samples, lines):
            line["correct"] = bool(task.rewards.correct(line["completion"], sample))
            line["reward"] = task.rewards.reward(line["completion"], sample, **options)
    except Exception as error:
        raise ValueError(f"{sample.id}: its reward raised {type(error).__name__}: {error}; --guesses {path} spares the "
                         "next run most of the decoding") from error
    finally:
        write_whole(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())


def report_by_label(path: Path, task, samples: list, texts: list[str]) -> None:
    """The task's own figures for each label, as a table to look at and as JSON."""
    figures = task.rewards.per_label(texts, samples)
    write_json(path, figures)
    columns = list(next(iter(figures.values())))
    show = lambda value: f"{100 * value:.2f}" if isinstance(value, float) else str(value)
    rows = [[label, *map(show, row.values())] for label, row in figures.items()]
    say(table([["label (shares in %)", *columns], *rows]))


def main() -> None:
    settings = read_settings(Settings)
    task, output = resolve_task(settings.task, settings.rewards), Path(settings.output)
    options = parse_options(settings.reward_options, "reward_options")
    settings.reasoning = reasoning_of(settings.adapter or settings.model, settings.reasoning)
    encoder = Encoder(settings.model, settings.max_pixels)
    samples = chosen_samples(settings, task, encoder)
    check_reward_options(task, options)
    sampling = Sampling(settings.max_completion_tokens, encoder.end_tokens, settings.temperature, settings.top_p,
                        settings.top_k, settings.rollout_rows, settings.read_every, seed=f"{settings.seed}/evaluate")
    device, watch = start(), Stopwatch()
    policy = load_frozen(settings.model, settings.adapter, compute_dtype(settings.dtype, device), device,
                         encoder.vocabulary)
    speculation = Speculation() if settings.speculate == "auto" else None
    if settings.guesses and speculation:
        remember_predictions(speculation, settings.guesses, task, samples, encoder)
    several = answer(policy, Prompts(encoder, task, settings.reasoning), samples, sampling, group_size=settings.samples,
                     speculation=speculation)
    if rank() == 0:
        voted = [majority(task.rewards, texts, sample) for texts, sample in zip(several, samples)]
        texts = [text for text, _ in voted]
        write_predictions(output / "predictions.jsonl", task, samples, voted, options)
        metrics = {**task.rewards.metrics(texts, samples), "samples": len(samples), "seconds": round(watch.total(), 1)}
        if hasattr(task.rewards, "per_label"):
            report_by_label(output / "per_label.json", task, samples, texts)
        write_json(output / "metrics.json", metrics)
        write_json(output / "settings.json", what_ran(settings))  # so that it can be run again
        say(table([["metric", settings.split], *([name, f"{value:.4g}"] for name, value in metrics.items())]))
        say(f"wrote {output / 'predictions.jsonl'} and {output / 'metrics.json'}")
    finish()


if __name__ == "__main__":
    run_program(main)
