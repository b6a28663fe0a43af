"""MORE-R1's claims in miniature: the rows of its table and the mixing ablations on the embedded world, five seeds.

    python -m benchmarks.miniature --output runs/miniature

A seed is a world (4,800 training, 300 validation, 2,000 test samples), a random model and all draws; every row of a
seed shares them. Each stage is one of the project's own programs in a process of its own, two at a time; one that is
done (`done.json` in its folder) is skipped, so that a run that was cut off goes on. The figures go between the two
marks in docs/miniature.md, the reading around them is written by hand.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import statistics
import sys
import time
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path

from grpo.runtime.files import write_json
from grpo.runtime.settings import run_program

ROOT = Path(__file__).parent.parent
DOCUMENT, BEGIN, END = ROOT / "docs" / "miniature.md", "<!-- figures -->", "<!-- end of figures -->"
TRAIN, VALID, TEST = 4800, 300, 2000
METRICS = ("accuracy", "precision", "recall", "f1")

# Everything that trains keeps the checkpoint that is best on the validation samples, and SFT stops where three
# validations have brought nothing better.
SFT = "--train_vision True --batch_size 32 --learning_rate 2e-3 --patience 3 --cache_gigabytes 2"
LONG = "--epochs 40 --validate_every 4"  # Stage 1: so many that it stops by itself
QUARTER, ALL = "--epochs 24 --validate_every 4", "--epochs 6 --validate_every 1"  # about as many updates
GRPO = "--learning_rate 2e-4 --validate_every 15 --reward_options min_length=150"
AT_ONCE = "--rollout_rows 256"  # a quarter less time in evaluations than 64; memory, not result
REASON, LABEL = f"--max_completion_tokens 96 {AT_ONCE}", f"--max_completion_tokens 16 {AT_ONCE}"
SPLIT = 600  # of the 3,600 samples that the cold start left: four epochs of what is hard among them fit into the time
MIXINGS = {"raw": "--mixing raw", "equal": "--decay 1", "hard": "--decay 0"}  # against full: --decay 0.5

ROWS = {  # folder of the evaluation -> title, the row of the paper's table
    "zero_shot_test": "zero-shot",
    "label_quarter_test": "label-only SFT (25%)", "label_all_test": "label-only SFT (all)",
    "stage_1_test": "Stage 1", "full_test": "Stage 1 + GRPO, γ = 0.5 (full)",
    "raw_test": "… raw mixing", "equal_test": "… γ = 1", "hard_test": "… γ = 0",
}
PAPER = {"zero_shot_test": 24.84, "label_quarter_test": 52.96, "label_all_test": 59.56, "stage_1_test": 62.69,
         "full_test": 67.80}  # F1
PAIRS = [  # what the paper says is better, and than what
    ("label_all_test", "label_quarter_test"),
    ("stage_1_test", "label_quarter_test"), ("stage_1_test", "label_all_test"),
    ("full_test", "stage_1_test"), ("full_test", "raw_test"), ("full_test", "equal_test"), ("full_test", "hard_test"),
]


@dataclass(frozen=True)
class Stage:
    """One program's run; `{rollouts}` in its words is known only when it starts."""

    folder: Path
    needs: tuple[Path, ...]
    module: str
    words: str

    @property
    def done(self) -> Path:
        return self.folder / "done.json"


# ---- what is run ----


def stages(home: Path, seed: int) -> list[Stage]:
    """All of one seed, those that others wait for first."""
    made, data, model = [], home / "world" / "MORE", home / "world" / "model"
    drawn, responses = home / "cold_start" / "data.drawn.json", home / "cold_start" / "data.jsonl"

    def add(name: str, need: str, module: str, words: str, file: str = "") -> None:
        made.append(Stage(home / name, (home / need,) if need else (), module,
                          f"--seed {seed} --output {home / name}{file} {words}"))

    def train(name: str, need: str, module: str, words: str, how: str) -> None:
        """Training, and the test of what it kept."""
        add(name, need, module, f"--data {data} {words}")
        add(f"{name}_test", name, "grpo.evaluate", f"--model {home / name / 'model'} --data {data} {how}")

    add("world", "", "data.toy", f"--train {TRAIN} --valid {VALID} --test {TEST}")
    expert = home / "world" / "expert.jsonl"
    add("cold_start", "world", "sft.annotate", f"--data {data} --expert file:{expert}", "/data.jsonl")
    sft = f"--model {model} {SFT} {REASON} --responses {responses} {LONG}"
    train("stage_1", "cold_start", "sft.train", sft, REASON)
    split = f"--data {data} {REASON} --split train --exclude {drawn} --limit {SPLIT}"
    add("split", "stage_1", "grpo.evaluate", f"--model {home / 'stage_1' / 'model'} {split}")
    grpo = f"--model {home / 'stage_1' / 'model'} {GRPO} {REASON} --predictions {home / 'split' / 'predictions.jsonl'}"
    train("full", "split", "grpo.train", grpo, REASON)
    for name, mixing in MIXINGS.items():  # as many rollouts as the full one's four epochs, whatever epochs those are
        train(name, "full", "grpo.train", f"{grpo} {mixing} --epochs 6 --max_rollouts {{rollouts}}", REASON)
    label = f"--model {model} {SFT} {LABEL}"
    train("label_all", "cold_start", "sft.train", f"{label} {ALL}", f"--reasoning False {LABEL}")
    quarter = f"{label} --samples {drawn} {QUARTER}"
    train("label_quarter", "cold_start", "sft.train", quarter, f"--reasoning False {LABEL}")
    add("zero_shot_test", "world", "grpo.evaluate", f"--model {model} --data {data} --reasoning False {LABEL}")
    return made


def rollouts_of(folder: Path) -> int:
    """How many rollouts a finished Stage 2 had."""
    return sum(json.loads(line)["batches"] for line in (folder / "curriculum.jsonl").read_text().splitlines())


def run_stage(stage: Stage, words: list[str]) -> None:
    """In a process of its own: the program, what it says into log.txt, what it took into done.json."""
    log = os.open(stage.folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    start = time.perf_counter(), time.process_time()
    sys.argv = [stage.module, *words]
    program = importlib.import_module(stage.module)
    try:
        program.main()
    except (ValueError, OSError) as error:
        print(f"error: {error}")
        sys.exit(2)
    seconds, core_seconds = time.perf_counter() - start[0], time.process_time() - start[1]
    write_json(stage.done, {"command": f"python -m {stage.module} {' '.join(words)}", "seconds": round(seconds, 1),
                            "core_seconds": round(core_seconds, 1)})


def run_all(waiting: list[Stage], at_once: int) -> None:
    """Every stage that is not done, as soon as those it needs are; the first that fails ends it all."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["grpo.runtime.run", "grpo.train"])  # imports cost seconds: once, not once a stage
    for stage in waiting:
        if stage.done.exists():
            print(f"{stage.folder}: done already", flush=True)
    waiting, running = [stage for stage in waiting if not stage.done.exists()], {}
    while waiting or running:
        ready = [stage for stage in waiting if all((need / "done.json").exists() for need in stage.needs)]
        for stage in ready[: at_once - len(running)]:
            waiting.remove(stage)
            stage.folder.mkdir(parents=True, exist_ok=True)
            words = stage.words
            if "{rollouts}" in words:
                words = words.replace("{rollouts}", str(rollouts_of(stage.needs[0])))
            process = context.Process(target=run_stage, args=(stage, words.split()), daemon=True)
            process.start()
            running[process.sentinel] = process, stage
        for sentinel in wait(running):
            process, stage = running.pop(sentinel)
            process.join()
            if process.exitcode:
                raise ValueError(f"{stage.folder}: ended with {process.exitcode}; {stage.folder / 'log.txt'} says why")
            seconds = json.loads(stage.done.read_text())["seconds"]
            print(f"{time.strftime('%H:%M:%S')}  {stage.folder}: {seconds:.0f} s", flush=True)


# ---- what is said about it ----


def metrics_of(homes: list[Path], row: str) -> dict[str, list[float]]:
    """Metric → one percentage a seed."""
    found = [json.loads((home / row / "metrics.json").read_text()) for home in homes]
    return {metric: [100 * figures[metric] for figures in found] for metric in METRICS}


def spread(values: list[float]) -> str:
    """Mean ± standard deviation over the seeds."""
    deviation = statistics.stdev(values) if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):.1f} ± {deviation:.1f}"


def markdown(heading: list[str], rows: list[list[str]]) -> str:
    lines = [heading, ["---"] + ["--:"] * (len(heading) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def results(homes: list[Path]) -> dict:
    """Every row's percentages by seed, the paired differences in F1, the course of the training, the time."""
    rows = {row: metrics_of(homes, row) for row in ROWS}
    differences = {f"{better} - {worse}": [a - b for a, b in zip(rows[better]["f1"], rows[worse]["f1"])]
                   for better, worse in PAIRS}
    took = [json.loads(path.read_text()) for home in homes for path in home.glob("*/done.json")]
    return {"rows": rows, "differences": differences, "course": [course(home) for home in homes],
            "seconds": sum(stage["seconds"] for stage in took),
            "core_seconds": sum(stage["core_seconds"] for stage in took)}


def course(home: Path) -> dict:
    """One seed's validation F1 in Stage 1, its split, and at which rollout each Stage 2 was best."""
    lines = [json.loads(line) for line in (home / "stage_1" / "metrics.jsonl").read_text().splitlines()]
    easy = [json.loads(line)["correct"] for line in (home / "split" / "predictions.jsonl").read_text().splitlines()]
    best = {name: json.loads((home / name / "best.json").read_text())["step"] for name in ("full", *MIXINGS)}
    return {"stage_1_validation": [round(100 * line["valid/f1"], 1) for line in lines if "valid/f1" in line],
            "hard": easy.count(False), "easy": easy.count(True), "rollouts": rollouts_of(home / "full"),
            "best_rollout": best}


def figures(found: dict, seeds: list[int]) -> str:
    """What goes into the document."""
    table = [[title, *(spread(found["rows"][row][metric]) for metric in METRICS), f"{PAPER.get(row, '')}"]
             for row, title in ROWS.items()]
    pairs = [[f"{ROWS[better]} − {ROWS[worse]}", spread(values), f"{sum(v > 0 for v in values)} of {len(values)}",
              *(f"{value:+.1f}" for value in values)]
             for (better, worse), values in zip(PAIRS, found["differences"].values())]
    courses = [[str(seed), " ".join(map(str, one["stage_1_validation"])), f"{one['hard']} / {one['easy']}",
                str(one["rollouts"]), " / ".join(map(str, one["best_rollout"].values()))]
               for seed, one in zip(seeds, found["course"])]
    return "\n\n".join(
        [
            f"{len(seeds)} seeds, {TEST:,} test samples each, percent, mean ± standard deviation over the seeds; "
            f"`python -m benchmarks.miniature`, {time.strftime('%Y-%m-%d')}, "
            f"{found['core_seconds'] / 60:.0f} core-minutes.",
            markdown(["", "Acc", "P", "R", "F1", "F1 in the paper"], table),
            "F1, paired by seed:",
            markdown(["", "difference", "above 0", *(f"seed {seed}" for seed in seeds)], pairs),
            "How it went:",
            markdown(
                [
                    "seed",
                    "Stage 1, validation F1 every fourth epoch",
                    "hard / easy",
                    "rollouts",
                    "best rollout: " + " / ".join(["full", *MIXINGS]),
                ],
                courses,
            ),
        ]
    )


def put_into(document: Path, text: str) -> None:
    """Between the two marks; what stands around them is left alone."""
    before, begin, rest = document.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{document}: {BEGIN} and {END} expected, where the figures go")
    document.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--output", type=Path, default=Path("runs/miniature"))
    parser.add_argument("--at_once", type=int, default=2, help="stages at a time, each on one core")
    parser.add_argument("--document", type=Path, default=DOCUMENT, help="Markdown file to put the figures into")
    settings = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
    homes = [(settings.output / str(seed)).resolve() for seed in settings.seeds]
    run_all([stage for home, seed in zip(homes, settings.seeds) for stage in stages(home, seed)], settings.at_once)
    found = results(homes)
    write_json(settings.output / "results.json", found)
    text = figures(found, settings.seeds)
    put_into(settings.document, text)
    print(text)


if __name__ == "__main__":
    run_program(main)
