"""The demo over several seeds: how far it rises, and whether that was only the extra time.

    python -m benchmarks.demo_seeds [--seeds 0 1 2 3 4] [--control] [--record]
    python -m benchmarks.demo_seeds --task jmere --seeds 0 1 2 [--record]
    python -m benchmarks.demo_seeds --task text --model DIR --seeds 0 1 2 [--record]

For each seed: `./launch.sh demo`. Prints a Markdown table, a column a seed and the mean, its last rows the rise and the
minutes. A seed that is done is not run again.

more: F1 on the 800 test samples. With --control also a run that starts from the same Stage-1 checkpoint and, instead of
GRPO, goes on with SFT on the cold start for the wall time that Stage 2 took, best checkpoint by validation like
Stage 2.

jmere: per cent on the 800 test posts, greedy; accuracy: all quintuples of a post right; unclear: answers that call
someone unclear, which is what imitation learns of hard posts.

text: GRPO alone on a pretrained text model, as HuggingFaceTB/SmolLM2-135M-Instruct; accuracy on the 200 test puzzles,
drawn at temperature 1 and greedily. Draws benchmarks/text_demo.svg: the reward of every rollout, the mean of ten of
them.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.record import append

ROOT = Path(__file__).parent.parent
ROWS = {  # a row's title: the folder, and what of it if not METRIC
    "more": {"zero-shot": "test/zero_shot", "Stage 1 (SFT)": "test/stage_1",
             "Stage 1, then more SFT (control)": "control", "Stage 1, then GRPO": "test/stage_2"},
    "jmere": {"zero-shot": "test/zero_shot", "CoT-SFT": "test/cot_sft", "CoT-SFT, then GRPO": "test/grpo",
              **{f"{title}, {metric}": (name, metric) for metric in ("precision", "recall", "accuracy", "unclear")
                 for title, name in (("CoT-SFT", "test/cot_sft"), ("then GRPO", "test/grpo"))}},
    "text": {"drawn, before": "test/before", "drawn, after GRPO": "test/grpo",
             "greedy, before": "test/before_greedy", "greedy, after GRPO": "test/grpo_greedy"}}
RISES = {"more": {"GRPO − Stage 1": ("Stage 1 (SFT)", "Stage 1, then GRPO")},
         "jmere": {"GRPO − CoT-SFT": ("CoT-SFT", "CoT-SFT, then GRPO")},
         "text": {"drawn, after − before": ("drawn, before", "drawn, after GRPO"),
                  "greedy, after − before": ("greedy, before", "greedy, after GRPO")}}
METRIC = {"more": "f1", "jmere": "f1", "text": "accuracy"}
# Stage 1's settings, but a learning rate that neither forgets what was learned nor stands still.
CONTROL = ("--train_vision True --epochs 1000 --batch_size 32 --learning_rate 5e-4 --schedule constant "
           "--validate_every 3 --max_completion_tokens 96")
COLORS = ("#3b6fb6", "#2a9d8f", "#e09f3e", "#c8553d", "#7a5195")


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
    many("sft.train", "--seed", seed, *CONTROL.split(), "--model", folder / "stage_1" / "model", "--data", data,
         "--responses", folder / "cold_start.jsonl", "--output", folder / "more_sft",
         "--minutes", f"{wall_minutes(folder / 'stage_2'):.3f}")
    many("grpo.evaluate", "--seed", seed, "--max_completion_tokens", 96, "--model", folder / "more_sft" / "model",
         "--data", data, "--output", folder / "control")


def score(folder: Path, metric: str) -> float:
    """Per cent, of what an evaluation has left in its folder."""
    if metric == "unclear":
        lines = (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
        return 100 * sum("unclear" in json.loads(line)["completion"] for line in lines) / len(lines)
    return 100 * json.loads((folder / "metrics.json").read_text())[metric]


def figures(task: str, folders: dict[int, Path], with_control: bool) -> list[dict]:
    """Rows of the table: per cent of the task's metric, the rises, minutes; a column a seed and their mean."""
    of = lambda name: (name, METRIC[task]) if isinstance(name, str) else name
    rows = {title: [score(folder / of(name)[0], of(name)[1]) for folder in folders.values()]
            for title, name in ROWS[task].items() if with_control or name != "control"}
    for title, (before, after) in RISES[task].items():
        rows[title] = [last - first for first, last in zip(rows[before], rows[after])]
    rows["minutes"] = [float((folder / "minutes").read_text()) for folder in folders.values()]
    columns = [f"seed {seed}" for seed in folders] + ["mean"]
    return [{f"{METRIC[task]}, %": title} | {name: round(value, 1)
            for name, value in zip(columns, [*values, sum(values) / len(values)])} for title, values in rows.items()]


def rewards(folder: Path) -> list[float]:
    lines = map(json.loads, (folder / "grpo" / "metrics.jsonl").read_text().splitlines())
    return [line["reward"] for line in lines if "reward" in line]


def plot(curves: dict[int, list[float]], path: Path) -> None:
    """One line a seed, the mean of ten rollouts; behind it every rollout as a dot."""
    width, height, left, bottom = 640, 300, 52, 40
    most = max(map(len, curves.values()))
    low, high = min(map(min, curves.values())), max(map(max, curves.values()))
    across = lambda step: left + (width - left - 16) * step / most
    down = lambda value: 28 + (height - bottom - 28) * (high - value) / (high - low)
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
             f'font-family="system-ui, sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>',
             f'<text x="{left}" y="16" font-weight="600">mean reward of a rollout, over rollouts</text>']
    for share in (0, 0.25, 0.5, 0.75, 1):
        value, step = low + share * (high - low), round(share * most)
        parts.append(f'<line x1="{left}" x2="{width - 16}" y1="{down(value)}" y2="{down(value)}" stroke="#ddd"/>'
                     f'<text x="{left - 6}" y="{down(value) + 4}" text-anchor="end" fill="#555">{value:.2f}</text>'
                     f'<text x="{across(step)}" y="{height - 20}" text-anchor="middle" fill="#555">{step}</text>')
    for place, (color, (seed, curve)) in enumerate(zip(COLORS, curves.items())):
        means = [sum(curve[max(0, step - 9):step + 1]) / min(10, step + 1) for step in range(len(curve))]
        points = " ".join(f"{across(step + 1):.1f},{down(value):.1f}" for step, value in enumerate(means))
        parts += [f'<circle cx="{across(step + 1):.1f}" cy="{down(value):.1f}" r="1.5" fill="{color}" opacity="0.4"/>'
                  for step, value in enumerate(curve)]
        parts.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2"/>'
                     f'<text x="{left + 90 * place}" y="{height - 4}" fill="{color}">— seed {seed}</text>')
    path.write_text("\n".join([*parts, "</svg>"]) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=sorted(ROWS), default="more")
    parser.add_argument("--model", help="text: the pretrained model")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--control", action="store_true", help="more: more SFT in GRPO's place and time, beside it")
    parser.add_argument("--output", type=Path, help="runs/seeds-TASK")
    parser.add_argument("--record", action="store_true", help="append the figures to results.jsonl")
    settings = parser.parse_args()
    task, folder = settings.task, settings.output or Path("runs") / f"seeds-{settings.task}"
    if (settings.model is None) == (task == "text") or settings.control and task != "more":
        parser.error("--model is for --task text and needed there, --control for --task more")
    folders = {seed: (folder / str(seed)).resolve() for seed in settings.seeds}
    for seed, folder in folders.items():
        if not (folder / "results.json").exists():
            start = time.monotonic()
            run(ROOT / "launch.sh", "demo", "--task", task, "--seed", seed, "--output", folder,
                *(["--model", settings.model] if settings.model else []))
            (folder / "minutes").write_text(f"{(time.monotonic() - start) / 60:.1f}")
        if settings.control and not (folder / "control" / "metrics.json").exists():
            control(folder, seed)
    rows = figures(task, folders, settings.control)
    for row in [dict.fromkeys(rows[0], "---"), *rows]:
        if row["mean"] == "---":
            print(f"| {' | '.join(row)} |")
        print(f"| {' | '.join(map(str, row.values()))} |")
    if settings.record:
        said = {"task": task} | ({"model": Path(settings.model).name} if settings.model else {})
        append(
            "demo_seeds",
            said,
            rows,
            "; ".join(
                f"{title}: {row['mean']:+} points in the mean"
                for row in rows
                if (title := next(iter(row.values()))) in RISES[task]
            ),
        )
        if task == "text":
            plot({seed: rewards(folder) for seed, folder in folders.items()}, Path(__file__).with_name("text_demo.svg"))


if __name__ == "__main__":
    main()
