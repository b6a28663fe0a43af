"""The recipes for one card, a step of Stage 2 in their own settings on this GPU: what it takes beside what was planned.

    python -m benchmarks.one_card [--recipes more-r1-24gb more-r1-80gb] [--record]
    python -m benchmarks.one_card --shape tiny --prompt 600 …      the same code on whatever there is, to try it

Random weights in the published shapes, made where they are used; prompts of 1,500 tokens with two images, completions
that all go to the limit. A step has fewer prompts than the recipe's 16 (that is planned, too): more take longer, and
room for their image features alone.
"""

import argparse
import gc
import tempfile
from pathlib import Path

import torch

from benchmarks import gpu, plan_check
from benchmarks.record import append, machine
from benchmarks.shapes import whole_vocabulary, words_for, write_all_but_weights

RECIPES = {"more-r1-24gb": "3b", "more-r1-80gb": "7b"}
SIDE = 616  # pixels a side of both images: 484 tokens each


def write_shape(folder: Path, shape: str) -> Path:
    """Everything of a checkpoint but its weights."""
    numbers = dict(gpu.SHAPES[shape])
    vision = {
        "intermediate_size": numbers.pop("vision_intermediate"),
        "num_heads": numbers.pop("vision_heads"),
        "fullatt_block_indexes": gpu.full_attention(numbers["vision_depth"]),
    }
    return write_all_but_weights(folder, vision=vision, **numbers)


class AtRandom:
    """In a checkpoint's place: it fits every network."""

    names = slices = None

    def __init__(self, model: str):
        pass

    def fit(self, network):
        return self


def draw_rows(slices, names, tensors: dict) -> None:
    """In the place of weights.copy_rows: norms are 1, the rest small numbers. Buffers are left as they are."""
    from grpo.engine.weights import local

    for tensor in tensors.values():
        if isinstance(tensor, torch.nn.Parameter):
            mine = local(tensor.detach())
            mine.fill_(1.0) if mine.ndim == 1 else mine.normal_(0, 0.02)


def settings_of(recipe: str, folder: Path, text: str, output: Path, given):
    """The recipe's own, but for what a random model has no use for."""
    from grpo.runtime.settings import parse
    from grpo.train import Settings

    words = dict(model=folder, data=f"{SIDE}/{text}", output=output, task="benchmarks.two_images", valid_split="",
                 mixing="raw", reward_weights="luck=1", reward_options="", prompts_per_rollout=given.prompts,
                 rollout_log_groups=0, tensorboard="off", max_completion_tokens=given.tokens)
    file = Path(__file__).parent.parent / "docs" / "recipes" / recipe / "stage_2.json"
    return parse(Settings, ["--config", str(file), *(str(w) for name, v in words.items() for w in (f"--{name}", v))])


def planned(folder: Path, settings, prompt: int):
    from grpo.plan.__main__ import Settings, plan
    from grpo.plan.costs import read_shape

    same = ("max_completion_tokens", "prompts_per_rollout", "rollout_rows", "tokens_per_pass", "lora_rank",
            "gradient_checkpointing", "offload_reference", "offload_optimizer")
    objective = {name: getattr(settings.objective, name) for name in ("group_size", "updates", "beta")}
    device = "gpu" if torch.cuda.is_available() else "cpu"
    return plan(read_shape(str(folder)), Settings(
        model=str(folder), gpus=[1], device=device, prompt_tokens=prompt, image_tokens=2 * (SIDE // 28) ** 2,
        **objective, **{name: getattr(settings, name) for name in same}), 1)


def measure(recipe: str, shape: str, given) -> dict:
    from grpo.engine import weights
    from grpo.engine.encode import Encoder
    from grpo.runtime import run
    from grpo.train import Trainer

    whole_vocabulary()
    weights.copy_rows, run.Checkpoint = draw_rows, AtRandom
    on_gpu = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as place:
        folder = write_shape(Path(place) / "model", shape)
        text = words_for(Encoder(str(folder)), given.prompt, SIDE)
        settings = settings_of(recipe, folder, text, Path(place) / "output", given)
        expected = planned(folder, settings, given.prompt)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        ours = run.Run(settings)
        ours.encoder.end_tokens = ()  # nothing ends a completion but the limit
        trainer, samples = Trainer(ours, settings), ours.load("train")[: given.prompts]
        peak = torch.cuda.max_memory_allocated() if on_gpu else 0  # while it loads; the clock has the step's
        with gpu.Clock(ours.device) as clock:
            plan_check.step(trainer, samples)
        reserved = torch.cuda.max_memory_reserved() if on_gpu else 0
    row = {"recipe": recipe, "shape": shape, "planned_bytes": round(expected.peak), "phase": expected.peak_phase,
           "measured_bytes": max(peak, clock.peak), "reserved_bytes": reserved, "seconds": clock.seconds}
    row["off"] = row["planned_bytes"] / row["measured_bytes"] - 1 if on_gpu else None
    print(row, flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--shape", choices=list(gpu.SHAPES), help="another shape than the recipe's")
    parser.add_argument("--prompts", type=int, default=4, help="of a step")
    parser.add_argument("--prompt", type=int, default=1500, help="tokens of each")
    parser.add_argument("--tokens", type=int, default=1024, help="of every completion")
    parser.add_argument("--record", action="store_true", help="append the figures to results.jsonl")
    given = parser.parse_args()
    rows = []
    for recipe in given.recipes:
        rows.append(measure(recipe, given.shape or RECIPES[recipe], given))
        gc.collect()
        torch.cuda.empty_cache()
    gib = lambda number: f"{number / 2**30:.1f}"
    summary = f"{machine()}: " + "; ".join(
        f"{row['recipe']}: {gib(row['planned_bytes'])} GiB planned, {gib(row['measured_bytes'])} measured, "
        f"{gib(row['reserved_bytes'])} reserved, {row['seconds']:.0f} s" for row in rows)
    print(summary)
    if given.record:
        append("one_card", {name: value for name, value in vars(given).items() if name != "record"}, rows, summary)
    from grpo.runtime.dist import finish

    finish()


if __name__ == "__main__":
    main()
