"""The demo over five seeds: how far F1 rises from Stage 1 to GRPO, and whether it was only the extra time.

    python -m benchmarks.demo_seeds [--seeds 0 1 2 3 4] [--control] [--output runs/seeds]

For each seed: `./launch.sh demo`. With --control also a run that starts from the same Stage-1 checkpoint and, instead
of GRPO, goes on with SFT on the cold start for the wall time that Stage 2 took, best checkpoint by validation like Stage 2.
Prints a Markdown table, F1 on the 800 test samples, each seed and the mean; its last row is the rise. A seed that is
done is not run again.
"""

import argparse
import json
import os
import subprocess
import sys
import time
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


def table(folders: dict[int, Path], with_control: bool) -> list[str]:
    """Markdown: a column a seed, the mean last; the rise in the last row."""
    rows = {title: [f1(folder, name) for folder in folders.values()]
            for title, name in ROWS.items() if with_control or name != "control"}
    rows["GRPO − Stage 1"] = [after - before for before, after in zip(rows["Stage 1 (SFT)"], rows["Stage 1, then GRPO"])]
    head = ["F1, %", *(f"seed {seed}" for seed in folders), "mean"]
    body = [[title, *(f"{value:{'+' if '−' in title else ''}.1f}" for value in [*values, sum(values) / len(values)])]
            for title, values in rows.items()]
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--control", action="store_true", help="more SFT in GRPO's place and time, beside it")
    parser.add_argument("--output", type=Path, default=Path("runs/seeds"))
    settings = parser.parse_args()
    folders = {seed: (settings.output / str(seed)).resolve() for seed in settings.seeds}
    for seed, folder in folders.items():
        if not (folder / "results.json").exists():
            start = time.monotonic()
            run(ROOT / "launch.sh", "demo", "--seed", seed, "--output", folder)
            (folder / "minutes").write_text(f"{(time.monotonic() - start) / 60:.1f}")
        if settings.control and not (folder / "control" / "metrics.json").exists():
            control(folder, seed)
    print("\n".join(table(folders, settings.control)))
    print("minutes: " + ", ".join((folder / "minutes").read_text() for folder in folders.values()))


if __name__ == "__main__":
    main()
