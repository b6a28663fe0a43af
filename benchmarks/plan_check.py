"""Does grpo.plan's arithmetic tell the truth? Its peak for one process on a CPU against the peak of a real step.

    python -m benchmarks.plan_check [--record]

A random Qwen2.5-VL of 107M parameters (429 MB) goes through one Trainer.step of GRPO, in a process of its own for each
case: rollout, reference, two updates. Measured is the peak of the resident set from before the weights are loaded,
less what the process held then; a step of a small model has gone before, so that everything is imported. The plan sees
config.json and the settings. Nothing in it is fitted to these figures.

The second measurement is of the same step in a process that gives each block of 128 kB and more back when it is freed
(MALLOC_MMAP_THRESHOLD_). glibc by itself keeps those below 32 MB as holes of its heap, which belong to no tensor and
which the plan leaves to --spare: the difference of the two.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.record import PeakMemory, append
from benchmarks.shapes import MODELS, write_model

TOLERANCE = 0.15
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "131072"}  # bytes


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
}


def real_step(folder: Path, case: Case) -> None:
    """Load, and one step of the product's own trainer."""
    from benchmarks.shapes import words_for
    from grpo.engine.encode import Encoder
    from grpo.runtime.run import Run
    from grpo.train import Settings, Trainer
    from grpo.variants import resolve

    text = words_for(Encoder(str(folder)), case.prompt, case.side)
    settings = Settings(model=str(folder), data=f"{case.side}/{text}", output=tempfile.mkdtemp(), valid_split="",
                        task="benchmarks.two_images", learning_rate=1e-6, rollout_log_groups=0,
                        objective=resolve("more-r1", **OBJECTIVE), **case.settings())
    run = Run(settings)
    run.encoder.end_tokens = ()  # nothing ends a completion but the limit
    Trainer(run, settings).step(run.load("train")[: settings.prompts_per_rollout], 0, [1e-6] * settings.objective.updates)


def measured(models: Path, case: Case) -> int:
    """Peak bytes beyond what a process holds that has done the same in small."""
    small = write_model(models / "small", "small")
    real_step(small, replace(case, prompt=60, side=112, completion=8))
    gc.collect()
    memory = PeakMemory()
    memory.start()
    real_step(models / "planned", case)
    return memory.beyond()


def planned(models: Path, case: Case):
    """The plan for the same step."""
    from grpo.plan.__main__ import Settings, plan
    from grpo.plan.costs import read_shape

    images = 2 * (case.side // 28) ** 2
    settings = Settings(model=str(models / "planned"), gpus=[1], device="cpu", prompt_tokens=case.prompt,
                        image_tokens=images, **OBJECTIVE, **case.settings())
    return plan(read_shape(settings.model), settings, 1)


def measure_apart(models: Path, name: str, give_back: bool = False) -> int:
    """`measured` in a process of its own."""
    write_model(models / "planned", "planned")
    words = [sys.executable, "-m", "benchmarks.plan_check", "--measure", name, "--models", str(models)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=Path(__file__).parent.parent,
                          env={**os.environ, "TOKENIZERS_PARALLELISM": "false", **(GIVE_BACK if give_back else {})})
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--measure", choices=list(CASES), help="only this one, in this process, as a number of bytes")
    parser.add_argument("--models", type=Path, default=MODELS, help="folder for the random checkpoints")
    parser.add_argument("--record", action="store_true", help="append the figures to results.jsonl")
    settings = parser.parse_args()
    models = settings.models.absolute()
    if settings.measure:
        return print(json.dumps(measured(models, CASES[settings.measure])))
    print(f"{'':14}{'planned, MB':>12}{'measured':>10}{'off by':>8}{'without holes':>15}{'off by':>8}   phase")
    rows = []
    for name in settings.cases:
        expected = planned(write_model(models / "planned", "planned").parent, CASES[name])
        found, tight = measure_apart(models, name), measure_apart(models, name, give_back=True)
        off, tight_off = expected.peak / found - 1, expected.peak / tight - 1
        rows.append({"case": name, "planned_bytes": round(expected.peak), "measured_bytes": found, "off": off,
                     "without_holes_bytes": tight, "off_without_holes": tight_off, "phase": expected.peak_phase})
        print(f"{name:14}{expected.peak / 1e6:12.0f}{found / 1e6:10.0f}{off:8.1%}{tight / 1e6:15.0f}{tight_off:8.1%}   "
              f"{expected.peak_phase}", flush=True)
    worst = max(rows, key=lambda row: abs(row["off"]))
    summary = f"largest error: {worst['off']:+.1%} ({worst['case']}); {TOLERANCE:.0%} are allowed"
    print(summary)
    if settings.record:
        append("plan_check", {"tolerance": TOLERANCE}, rows, summary)


if __name__ == "__main__":
    main()
