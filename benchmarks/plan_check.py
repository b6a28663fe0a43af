"""Does grpo.plan's arithmetic tell the truth? Its peak on a CPU against the peak of a real step, on one rank and two.

    python -m benchmarks.plan_check [--ranks 1 2] [--cases plain adapter] [--record]

A random Qwen2.5-VL of 107M parameters (429 MB) goes through one Trainer.step of GRPO, in processes of their own for
each case: rollout, reference, two updates. Measured is the peak of the resident set from before the weights are loaded,
less what the process held then, of the rank where it is largest; a step of a small model has gone before, so that
everything is imported. The plan sees config.json and the settings. Nothing in it is fitted to these figures.

Each rank gives every block of 128 kB and more back when it is freed (MALLOC_MMAP_THRESHOLD_): what it holds then are
tensors, and within 10% of them is what the plan promises. glibc by itself keeps blocks below 32 MB as holes of its
heap, which belong to no tensor and which the plan leaves to --spare: --holes measures with them too. Nor does oneDNN
keep its kernels, 120 MB in the case in bfloat16.
"""

import argparse
import gc
import itertools
import json
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.record import PeakMemory, append, on_ranks
from benchmarks.shapes import MODELS, write_model

TOLERANCE = 0.1
# bytes of a block; and no kernels that are kept: in bfloat16 oneDNN makes one for every length of a rollout's caches
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "131072", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0"}


@dataclass
class Case:
    """Two prompts of two images, `side` pixels each; `completion` tokens in each of the four completions."""

    prompt: int
    side: int
    completion: int
    gradient_checkpointing: bool = False
    tokens_per_pass: int = 4096
    lora_rank: int = 0
    dtype: str = "float32"

    def settings(self) -> dict:
        """What trainer and plan are both told."""
        return dict(max_completion_tokens=self.completion, prompts_per_rollout=2, rollout_rows=64,
                    tokens_per_pass=self.tokens_per_pass, dtype=self.dtype, lora_rank=self.lora_rank,
                    gradient_checkpointing=self.gradient_checkpointing)


OBJECTIVE = dict(group_size=4, updates=2, beta=0.001)
CASES = {
    "plain": Case(240, 112, 64),
    "checkpointing": Case(240, 112, 64, gradient_checkpointing=True),
    "long prompt": Case(800, 224, 32),
    "two passes": Case(240, 112, 64, tokens_per_pass=600),
    "bfloat16": Case(240, 112, 64, dtype="bfloat16"),  # masters, gathered copies, reduced gradients: the way of a GPU
    "adapter": Case(400, 112, 64, lora_rank=16),
    "group in parts": Case(400, 112, 64, lora_rank=16, tokens_per_pass=530),  # two of its four completions a pass
}


def prepare(folder: Path, case: Case, output: Path, **more) -> tuple:
    """The product's own trainer, with everything loaded on every rank, and the samples of a rollout."""
    from benchmarks.shapes import words_for
    from grpo.engine.encode import Encoder
    from grpo.runtime.run import Run
    from grpo.train import Settings, Trainer
    from grpo.variants import resolve

    text = words_for(Encoder(str(folder)), case.prompt, case.side)
    objective = resolve("more-r1", **{**OBJECTIVE, **more.pop("objective", {})})
    settings = Settings(model=str(folder), data=f"{case.side}/{text}", output=str(output), valid_split="",
                        task="benchmarks.two_images", learning_rate=1e-6, rollout_log_groups=0, objective=objective,
                        **case.settings(), **more)
    run = Run(settings)
    run.encoder.end_tokens = ()  # nothing ends a completion but the limit
    return Trainer(run, settings), run.load("train")[: settings.prompts_per_rollout]


def step(trainer, samples: list) -> None:
    trainer.step(samples, 0, [1e-6] * trainer.preset.updates)


def measured(models: Path, case: Case, output: Path) -> int:
    """Peak bytes of a step beyond what this rank holds when it has done the same in small. What is held is counted and
    the loading itself is not, see benchmarks.memory: meanwhile pages of mapped files are there, which nobody needs."""
    step(*prepare(models / "small", replace(case, prompt=60, side=112, completion=8), output / "small"))
    gc.collect()
    memory = PeakMemory()
    memory.start()
    ready = prepare(models / "planned", case, output / "planned")
    memory.forget()
    step(*ready)
    return memory.beyond()


def planned(models: Path, case: Case, ranks: int = 1, device: str = "cpu"):
    """The plan for the same step."""
    from grpo.plan.__main__ import Settings, plan
    from grpo.plan.costs import read_shape

    images = 2 * (case.side // 28) ** 2
    settings = Settings(model=str(models / "planned"), gpus=[ranks], device=device, prompt_tokens=case.prompt,
                        image_tokens=images, **OBJECTIVE, **case.settings())
    return plan(read_shape(settings.model), settings, ranks)


def measure_apart(models: Path, name: str, ranks: int = 1, holes: bool = False) -> int:
    """`measured` in processes of their own, as torchrun would start them; the largest of the ranks' peaks."""
    for shape in ("planned", "small"):
        write_model(models / shape, shape)
    with tempfile.TemporaryDirectory() as output:
        words = ["--measure", name, "--models", models, "--output", output]
        return max(on_ranks("benchmarks.plan_check", words, ranks, {} if holes else GIVE_BACK))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2], help="how many share the step")
    parser.add_argument("--holes", action="store_true", help="measure what the allocator keeps too")
    parser.add_argument("--measure", choices=list(CASES), help="only this one, in this process, as a number of bytes")
    parser.add_argument("--models", type=Path, default=MODELS, help="folder for the random checkpoints")
    parser.add_argument("--output", type=Path, help="folder for what --measure writes")
    parser.add_argument("--record", action="store_true", help="append the figures to results.jsonl")
    settings = parser.parse_args()
    models = settings.models.absolute()
    if settings.measure:
        from grpo.runtime.dist import finish

        print(json.dumps(measured(models, CASES[settings.measure], settings.output)))
        return finish()
    write_model(models / "planned", "planned")
    print(f"{'case':16}{'ranks':>6}{'planned, MB':>13}{'measured':>10}{'off by':>8}{'with holes':>12}   phase")
    rows = []
    for name, ranks in itertools.product(settings.cases, settings.ranks):
        expected, found = planned(models, CASES[name], ranks), measure_apart(models, name, ranks)
        row = {"case": name, "ranks": ranks, "planned_bytes": round(expected.peak), "measured_bytes": found,
               "off": expected.peak / found - 1, "phase": expected.peak_phase}
        if settings.holes:
            row["with_holes_bytes"] = measure_apart(models, name, ranks, holes=True)
        rows.append(row)
        holes = f"{row['with_holes_bytes'] / 1e6:.0f}" if settings.holes else ""
        print(f"{name:16}{ranks:6}{expected.peak / 1e6:13.0f}{found / 1e6:10.0f}{row['off']:8.1%}{holes:>12}   "
              f"{expected.peak_phase}", flush=True)
    worst = max(rows, key=lambda row: abs(row["off"]))
    summary = (f"largest error: {worst['off']:+.1%} ({worst['case']}, {worst['ranks']} ranks); {TOLERANCE:.0%} are "
               "allowed")
    print(summary)
    if settings.record:
        append("plan_check", {"tolerance": TOLERANCE}, rows, summary)


if __name__ == "__main__":
    main()
