"""What a run says while it works: a progress bar for long work, one line an update, metrics as JSONL."""

import errno
import json
import math
import os
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
    """A bar with rate and time left on the first process; where there is no terminal, a plain line now and then."""
    if rank() == 0 and not sys.stderr.isatty():
        return PlainProgress(total, what, unit)
    # says 80 × 24 where a terminal does not know its size (many containers'); left to itself the bar draws nothing there
    columns, lines = shutil.get_terminal_size()
    return tqdm(total=total, desc=what, unit=unit, leave=False, ncols=columns, nrows=lines, disable=rank() != 0)


class PlainProgress:
    """A bar's stand-in for logs: what takes less than LINE_SECONDS says nothing, longer work one line in so many."""

    LINE_SECONDS = 30.0

    def __init__(self, total: int, what: str, unit: str):
        self.total, self.what, self.unit, self.n = total, what, unit, 0
        self.start = self.said = time.monotonic()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def set_postfix(self, **_) -> None:
        """A bar shows these beside it; a log has them in the update's own line."""

    def update(self, count: int = 1) -> None:
        self.n += count
        now = time.monotonic()
        if self.n and now - self.said >= self.LINE_SECONDS:
            self.said, rate = now, self.n / (now - self.start)
            left = round(max(0, self.total - self.n) / rate)
            print(f"{self.what}: {self.n}/{self.total} {self.unit}s, {rate:.3g} a second, "
                  f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left", flush=True)


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
    """`metrics.jsonl` in the run's folder: one JSON object an update, written by the first process.

    A run that goes on has `lines` lines already; what a process that was killed wrote beyond them goes away.
    With `events` the same numbers go into TensorBoard event files in <output>/tensorboard: "on", "off", or "auto",
    which is on where tensorboard is installed.
    """

    def __init__(self, output: str, name: str = "metrics.jsonl", events: str = "off", lines: int = 0, step: int = 0):
        self.path, self.lines = Path(output) / name, lines
        self.events = None
        if rank() == 0:
            self.events = open_events(self.path.parent / "tensorboard", events, step)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            keep_lines(self.path, lines)

    def write(self, line: dict) -> None:
        self.lines += 1
        if rank() == 0:
            append_line(self.path, line)
            if self.events:
                for name, value in line.items():
                    if name != "step" and isinstance(value, (int, float)):
                        self.events.add_scalar(name, value, line.get("step", 0))
                self.events.flush()


def append_line(path: Path, content: dict) -> None:
    """One JSON object as one whole line: a single write at the file's end, so that a reader who comes in between finds
    only whole lines, or a last one without its end (a write under way, a full disk), which is to be left out."""
    # a mean of nothing is not a number, and JSON has no word for that but null
    missing = {name for name, value in content.items() if isinstance(value, float) and not math.isfinite(value)}
    content = {name: None if name in missing else value for name, value in content.items()}
    line = json.dumps(content).encode() + b"\n"
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        if (written := os.write(file, line)) < len(line):  # the next line would join the half one
            os.ftruncate(file, os.fstat(file).st_size - written)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    finally:
        os.close(file)


def keep_lines(path: Path, count: int) -> None:
    """The file's first `count` lines, written beside and renamed. ValueError where it has fewer: some were lost."""
    kept = path.read_bytes().splitlines(keepends=True)[:count] if count else []
    if len(kept) < count:
        raise ValueError(f"{path}: {len(kept)} lines; {count} expected, as the checkpoint says: some are lost")
    new = path.with_name(path.name + ".new")
    new.write_bytes(b"".join(kept))
    new.replace(path)


def open_events(folder: Path, choice: str, step: int = 0):
    """A writer of TensorBoard events, or None; ValueError if they are asked for and tensorboard is not there.

    Beyond step 0 it goes on behind what was written up to there.
    """
    if choice == "off":
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        if choice == "on":
            how = "pip install 'grpo-vlm[tensorboard]'"
            raise ValueError(f"--tensorboard on: tensorboard is not installed ({how})") from None
        return None
    for old in folder.glob("events.out.tfevents.*") if not step else ():  # like metrics.jsonl, they begin anew with the run
        old.unlink()
    return SummaryWriter(str(folder), purge_step=step + 1 if step else None)


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
