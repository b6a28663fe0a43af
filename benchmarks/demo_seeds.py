"""The demo over several seeds, and the control that asks whether it was only the extra time.

    python -m benchmarks.demo_seeds --seeds 0 1 2 --output runs/seeds

For each seed: `./launch.sh demo`, then a control that starts from the same Stage-1 checkpoint and, instead of GRPO,
goes on with SFT on the cold start for the wall time that Stage 2 took, best checkpoint by validation like Stage 2.
Prints a Markdown table: F1 on the 800 test samples, each seed and the mean.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
ROWS = {"zero-shot": "test/zero_shot", "Stage 1 (SFT)": "test/stage_1", "Stage 1, then more SFT (control)": "control",
        "Stage 1, then GRPO": "test/stage_2"}
# Stage 1's settings, but a learning rate that neither forgets what was learned nor stands still.
CONTROL = ("--train_vision True --epochs 1000 --batch_size 32 --learning_rate 5e-4 --schedule constant --validate_every 3 "
           "--max_completion_tokens 96")


def run(*words) -> None:
    environment = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([str(word) for word in words], check=True, env=environment, cwd=ROOT)


def many(module: str, *words) -> None:
    run(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", 2, "--rdzv-backend", "c10d",
        "--rdzv-endpoint", "localhost:0", "-m", module, *words)


def wall_minutes(stage: Path) -> float:
    """From the first thing that a training run writes to its last update, validations included."""
    return ((stage / "metrics.jsonl").stat().st_mtime - (stage / "settings.json").stat().st_mtime) / 60


def control(folder: Path, seed: int) -> None:
    data = folder / "world" / "MORE"
    many("sft.train", "--seed", seed, *CONTROL.split(), "--model", folder / "stage_1" / "model", "--data", data, "--responses",
         folder / "cold_start.jsonl", "--output", folder / "more_sft", "--minutes", f"{wall_minutes(folder / 'stage_2'):.3f}")
    many("grpo.evaluate", "--seed", seed, "--max_completion_tokens", 96, "--model", folder / "more_sft" / "model", "--data", data,
         "--output", folder / "control")


def f1(folder: Path, name: str) -> float:
    return 100 * json.loads((folder / name / "metrics.json").read_text())["f1"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("runs/seeds"))
    settings = parser.parse_args()
    folders = {seed: (settings.output / str(seed)).resolve() for seed in settings.seeds}
    for seed, folder in folders.items():
        if not (folder / "results.json").exists():
            run(ROOT / "launch.sh", "demo", "--seed", seed, "--output", folder)
        if not (folder / "control" / "metrics.json").exists():
            control(folder, seed)
    print("| F1, % | " + " | ".join(f"seed {seed}" for seed in folders) + " | mean |")
    print("|---|" + "---|" * (len(folders) + 1))
    for title, name in ROWS.items():
        values = [f1(folder, name) for folder in folders.values()]
        print(f"| {title} | " + " | ".join(f"{value:.1f}" for value in [*values, sum(values) / len(values)]) + " |")


if __name__ == "__main__":
    main()
