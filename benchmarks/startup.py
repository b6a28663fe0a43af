"""How long a program takes to answer what needs no model: --help, a misspelled setting, a path that is not there.

    python -m benchmarks.startup

Each is `python -m PROGRAM …` from the start of the interpreter to its end, the fastest of several, and beside them what
`import torch` and `import transformers` alone take. The promise is under a second on a machine with nothing beside it.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.record import append

ROOT = Path(__file__).parent.parent
MODEL = ["--model", "gone/model/x", "--data", ".", "--output", "o"]
# program: words with a misspelled setting, the right one; words with a missing path, what is said of it
PROGRAMS = {
    "grpo.train": (["--learning_rat", "1"], "learning_rate", MODEL, "--model gone/model/x: no such folder"),
    "sft.train": (["--lr", "1"], "learning_rate", ["--model", ".", *MODEL[2:], "--responses", "gone"],
                  "--responses gone: no such file"),
    "grpo.minimal": (["--rollout", "1"], "rollouts", MODEL[:4], "--model gone/model/x: no such folder"),
    "grpo.evaluate": (["--smaples", "1"], "samples", ["--model", ".", "--data", "gone", "--output", "o"],
                      "--data gone: no such folder"),
    "grpo.predict": (["--txt", "1"], "text", ["--model", ".", "--image", "gone.jpg"], "--image gone.jpg: no such file"),
    "grpo.plan": (["--gpu", "8"], "gpus", MODEL[:2], "--model gone/model/x: no such folder"),
    "grpo.report": (["run", "--outptu", "x"], "output", ["gone"], "gone: no such folder"),
    "grpo.compare": (["a=b", "--outptu", "x"], "output", ["a=gone"], "gone/metrics.json"),
    "grpo.report.paper_table": (["x", "--rusn", "y"], "runs", ["gone.json", "--runs", ".", "--output", "o"],
                                "recipe gone.json: no such file"),
    "sft.annotate": (["--dta", "x"], "data", ["--data", "gone", "--expert", "openai:m", "--output", "o"],
                     "--data gone: no such folder"),
}


def seconds(words: list[str], folder: str, times: int, status: int) -> float:
    """The fastest of some starts; RuntimeError if one does not end as it should."""
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, *words], cwd=folder, capture_output=True, text=True,
                              env={"PYTHONPATH": str(ROOT), "PATH": ""})
        taken.append(time.perf_counter() - start)
        if done.returncode != status:
            raise RuntimeError(f"{' '.join(words)}: exit status {done.returncode}: {done.stderr[-500:]}")
    return min(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--record", action="store_true", help="append the figures to results.jsonl")
    settings = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for program, (misspelled, _, missing, _) in PROGRAMS.items():
            row = {"program": program}
            for what, words, status in (
                ("--help", ["--help"], 0),
                ("misspelled", misspelled, 2),
                ("missing path", missing, 2),
            ):
                row[what] = seconds(["-m", program, *words], folder, settings.times, status)
            rows.append(row)
            print(
                f"{program:24}" + "".join(f"{name} {value:.2f} s  " for name, value in list(row.items())[1:]),
                flush=True,
            )
        libraries = {
            name: seconds(["-c", f"import {name}"], folder, settings.times, 0) for name in ("torch", "transformers")
        }
    slowest = max(value for row in rows for value in row.values() if isinstance(value, float))
    summary = f"slowest answer {slowest:.2f} s" + "".join(
        f"; import {name} alone {value:.2f} s" for name, value in libraries.items()
    )
    print(summary)
    if settings.record:
        append("startup", {"times": settings.times}, rows, summary)


if __name__ == "__main__":
    main()
