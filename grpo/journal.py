"""What a run says while it works: a progress bar for long work, one line an update, metrics as JSONL."""

import json
import math
import shutil
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers.utils.logging import tqdm

from grpo.sharding import rank


def say(text: str) -> None:
    """A line on the first process's terminal, above any progress bar."""
    if rank() == 0:
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr, flush=True)  # wipe the bar; its next update draws it below
        print(text, flush=True)


def progress(total: int, what: str, unit: str):
    """A bar with rate and time left on the first process; nothing where the output is not a terminal."""
    # says 80 × 24 where a terminal does not know its size (many containers'); left to itself the bar draws nothing there
    columns, lines = shutil.get_terminal_size()
    return tqdm(total=total, desc=what, unit=unit, leave=False, ncols=columns, nrows=lines,
                disable=rank() != 0 or not sys.stderr.isatty())


class Stopwatch:
    """Seconds by phase: `with watch("rollout"): …`, then `watch.seconds`."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._start = time.perf_counter()

    @contextmanager
    def __call__(self, phase: str):
        start = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # kernels run on after their call: their time belongs here
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

    def total(self) -> float:
        return time.perf_counter() - self._start


class Journal:
    """`metrics.jsonl` in the run's folder: one JSON object an update, written by the first process."""

    def __init__(self, output: str, name: str = "metrics.jsonl"):
        self.path = Path(output) / name
        if rank() == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text("")

    def write(self, line: dict) -> None:
        if rank() == 0:
            # a mean of nothing is not a number, and JSON has no word for that but null
            line = {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in line.items()}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def write_json(path: Path, content) -> None:
    """Whole or not at all: written beside and renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    new.replace(path)


def table(rows: list[list[str]]) -> str:
    """Rows of words, the first one the heading → aligned text."""
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(str(cell).ljust(width) if i == 0 else str(cell).rjust(width) for i, (cell, width) in enumerate(zip(row, widths)))
        for row in rows
    ]
    return "\n".join([lines[0], "  ".join("─" * width for width in widths), *lines[1:]])
