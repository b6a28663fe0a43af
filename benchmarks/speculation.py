r"""Rollouts of a second epoch with and without speculation, in one run: the same tokens, how many steps, how long.

    python -m benchmarks.speculation --model DEMO/stage_1/model --data DEMO/world/MORE --text_model FOLDER \
        --text_data JMERE [--record]

The first epoch's completions, drawn with another seed from the same weights, are the guesses. (In training the weights
have moved a little by then; so the shares here are the upper end.) The text model, of any size, answers JMERE's
questions without their images, or those below, which have no one answer and are the worst case. What GRPO has trained
repeats itself more: the puzzles of `./launch.sh demo --task text`, answered by its `grpo/model`, take

    --text_task jsonl --text_data DEMO/world/TEXT --whole_answer True --reasoning False --temperature 1 \
        --max_completion_tokens 16

Each side runs `--repeats` times, in turn, and its fastest run counts: ratios of one run bear a busy machine. On a GPU
nothing is guessed below --max_completion_tokens of 256 (static.LONG).
"""

import argparse
import time
from pathlib import Path

from benchmarks.record import append

QUESTIONS = [f"Explain in a few sentences {topic}." for topic in (
    "why the sky is blue", "how bread is baked", "what a library is for", "how a bicycle stays upright",
    "why leaves fall", "how to boil an egg", "what a bridge has to bear", "why the sea is salt",
    "how a letter reaches its reader", "what makes a good neighbour", "how glass is made", "why we sleep",
    "how a clock keeps time", "what clouds are", "how birds find their way", "why iron rusts")]


def load(model: str, data: str | None, task: str, settings):
    """Policy, prompts and end tokens. A text model is not shown a sample's images."""
    import torch

    from data.task import load_samples, resolve_task
    from grpo.engine.encode import Encoder
    from grpo.engine.weights import load_policy

    encoder, policy = Encoder(model, settings.max_pixels), load_policy(model).requires_grad_(False)
    policy.vocabulary = encoder.vocabulary
    policy.to("cuda" if torch.cuda.is_available() else "cpu", getattr(torch, settings.dtype))
    if data:
        task = resolve_task(task)
        given = argparse.Namespace(**{**vars(settings), "data": data, "missing_images": "blank"})
        samples = load_samples(task, given, settings.split, encoder.seen_size)[: settings.prompts]
        built = [task.data.build_prompt(sample, reasoning=settings.reasoning) for sample in samples]
        prompts = [encoder.encode([] if policy.backbone.IMAGE_TOKEN is None else images, text, None, sample.id)
                   for (images, text), sample in zip(built, samples)]
    else:
        prompts = [encoder.encode([], question, None, question) for question in QUESTIONS[: settings.prompts]]
    with torch.no_grad():
        policy.keep_image_features(prompts)
    return policy, prompts, encoder.end_tokens


def compare(policy, prompts: list, ends: tuple[int, ...], rows: int, settings) -> dict:
    from grpo.engine.rollout import Sampling, sample
    from grpo.engine.speculation import Speculation

    prompts = prompts[: max(2, 2 * rows // settings.group_size)]
    sampling = lambda seed: Sampling(settings.max_completion_tokens, ends, settings.temperature, rows=rows, seed=seed)
    before, seconds, drawn = sample(policy, prompts, settings.group_size, sampling("epoch 1")), {}, {}
    for side in ("off", "auto") * settings.repeats:
        speculation = Speculation() if side == "auto" else None
        for group in before if speculation else ():
            speculation.remember(group.prompt.id, group.completions)
        start = time.perf_counter()
        groups = sample(policy, prompts, settings.group_size, sampling("epoch 2"), speculation=speculation)
        seconds[side] = min(seconds.get(side, float("inf")), time.perf_counter() - start)
        drawn[side] = [completion.tolist() for group in groups for completion in group.completions]
    counts = speculation.counts
    equal = sum(map(list.__eq__, drawn["off"], drawn["auto"])) / len(drawn["off"])
    return {"rows": rows, "completions": len(drawn["off"]), "tokens": sum(map(len, drawn["off"])),
            "seconds": seconds["auto"], "seconds_without": seconds["off"], "ratio": seconds["off"] / seconds["auto"],
            "tokens_per_step": counts["tokens"] / counts["steps"],
            "accepted": counts["accepted"] / max(1, counts["guessed"]), "equal_completions": equal}


def title(model: str, data: str | None, task: str) -> str:
    """A folder that is called model says nothing; the one it lies in does."""
    folder = Path(model).resolve()
    return f"{folder.parent.name if folder.name == 'model' else folder.name}: {task if data else 'questions'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model's folder; it answers the dataset's samples")
    parser.add_argument("--data", help="the dataset's folder")
    parser.add_argument("--text_model", help="a text model's folder")
    parser.add_argument("--text_data", help="a dataset's folder; without one it answers the questions of this file")
    parser.add_argument("--text_task", default="jmere", help="the task that --text_data belongs to")
    parser.add_argument("--whole_answer", type=lambda word: word == "True", default=False, help="--text_task jsonl's")
    parser.add_argument("--task", default="more")
    parser.add_argument("--split", default="train")
    parser.add_argument("--reasoning", type=lambda word: word == "True", default=True)
    parser.add_argument("--rows", type=int, nargs="+", default=[4, 64], help="live rows, one comparison for each")
    parser.add_argument("--text_rows", type=int, nargs="+", default=[1, 4, 16], help="the same with the text model")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--group_size", type=int, default=8)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--max_completion_tokens", type=int, default=96)
    parser.add_argument("--max_pixels", type=int)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--record", action="store_true", help="append the figures to results.jsonl")
    settings = parser.parse_args()
    if bool(settings.model) != bool(settings.data) or not (settings.model or settings.text_model):
        parser.error("expected --model and --data, --text_model, or all three")
    print(
        f"{'case':20}{'parameters':>12}{'rows':>6}{'completions':>13}{'tokens':>8}{'seconds':>9}{'without':>9}"
        f"{'ratio':>7}{'tokens a step':>15}{'accepted':>10}{'equal':>7}"
    )
    figures = []
    cases = [(settings.model, settings.data, settings.task, rows) for rows in settings.rows if settings.model]
    cases += [(settings.text_model, settings.text_data, settings.text_task, rows) for rows in settings.text_rows
              if settings.text_model]
    for *case, rows in cases:
        policy, prompts, ends = load(*case, settings)
        size = sum(parameter.numel() for parameter in policy.parameters())
        figures.append({"case": title(*case), "parameters": size, **compare(policy, prompts, ends, rows, settings)})
        print(
            "{case:20}{parameters:12}{rows:6}{completions:13}{tokens:8}{seconds:9.2f}{seconds_without:9.2f}{ratio:7.2f}"
            "{tokens_per_step:15.2f}{accepted:10.0%}{equal_completions:7.0%}".format(**figures[-1]),
            flush=True,
        )
    summary = "; ".join(f"{one['case']}, {one['parameters'] / 1e6:.0f}M, {one['rows']} rows: "
                        f"{one['tokens_per_step']:.1f} tokens a step and row, ratio {one['ratio']:.2f}"
                        for one in figures)
    print(summary)
    if settings.record:
        kept = ("group_size", "temperature", "max_completion_tokens", "dtype", "repeats")
        append("speculation", {name: getattr(settings, name) for name in kept}, figures, summary)


if __name__ == "__main__":
    main()
