"""What a run says while it works: a progress bar for long work, one line an update, tables. Imports neither torch nor
transformers before a bar is drawn, so that a message costs nothing."""

import math
import os
import shutil
import sys
import time
from contextlib import AbstractContextManager, contextmanager


def is_rank_0() -> bool:
    """As torchrun has numbered it; asked of the environment, so that a line needs no torch."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str) -> None:
    """A line on rank 0's terminal, above any progress bar."""
    if is_rank_0():
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr, flush=True)  # wipe the bar; its next update draws it below
        print(text, flush=True)


def progress(total: int, what: str, unit: str):
    """A bar with rate and time left on rank 0; where there is no terminal, a plain line now and then."""
    if is_rank_0() and not sys.stderr.isatty():
        return PlainProgress(total, what, unit)
    from transformers.utils.logging import tqdm  # here, for it brings transformers along

    # 80 × 24 where a terminal does not know its size (many containers'); left to itself the bar draws nothing there
    columns, lines = shutil.get_terminal_size()
    return tqdm(total=total, desc=what, unit=unit, leave=False, ncols=columns, nrows=lines, disable=not is_rank_0())


class PlainProgress(AbstractContextManager):
    """A bar's stand-in for logs: what takes less than LINE_SECONDS says nothing, longer work one line in so many."""

    LINE_SECONDS = 30.0

    def __init__(self, total: int, what: str, unit: str):
        self.total, self.what, self.unit, self.n = total, what, unit, 0
        self.start = self.said = time.monotonic()

    __exit__ = lambda *_: None

    def update(self, count: int = 1) -> None:
        self.n += count
        now = time.monotonic()
        if self.n and now - self.said >= self.LINE_SECONDS:
            self.said, rate = now, self.n / (now - self.start)
            left = round(max(0, self.total - self.n) / rate)
            print(f"{self.what}: {self.n}/{self.total} {self.unit}s, {rate:.3g} a second, "
                  f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left", flush=True)


class Means:
    """Lines about a run's updates: the first, the last, and between them at most LINES, SECONDS apart at least.
    Each is the mean since the one before: single updates are noise, and every one of them is in metrics.jsonl."""

    LINES, SECONDS = 50, 10.0

    def __init__(self, total: int):
        self.total, self.since, self.said = total, [], 0.0

    def add(self, line: dict, due: bool = False) -> dict | None:
        """The mean of this update and those before it that no line has told, where it is time for a line or one is due;
        of whole numbers and of what is no number the last one."""
        self.since.append(line)
        now, few = time.monotonic(), len(self.since) < self.total / self.LINES
        if not due and self.said and (few or now - self.said < self.SECONDS):
            return None
        told, self.since, self.said = self.since, [], now
        finite = lambda value: isinstance(value, float) and math.isfinite(value)
        names = {name: [entry[name] for entry in told if finite(entry.get(name))] for entry in told for name in entry}
        return {name: sum(values) / len(values) if values else told[-1].get(name) for name, values in names.items()}


class Stopwatch:
    """Seconds by phase: `with watch("rollout"): …`, then `watch.seconds`."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._start = time.perf_counter()

    @contextmanager
    def __call__(self, phase: str):
        start, torch = time.perf_counter(), sys.modules.get("torch")
        yield
        if torch is not None and torch.cuda.is_available():
            torch.cuda.synchronize()  # kernels run on after their call: their time belongs here
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

    def total(self) -> float:
        return time.perf_counter() - self._start

    def metrics(self) -> dict[str, float]:
        seconds = {f"seconds/{phase}": round(value, 3) for phase, value in self.seconds.items()}
        return {"step_time": round(self.total(), 3), **seconds}


def table(rows: list[list[str]]) -> str:
    """Rows of words, the first one the heading → aligned text."""
    first, *others = (max(len(str(cell)) for cell in column) for column in zip(*rows))
    rows = [rows[0], ["─" * width for width in (first, *others)], *rows[1:]]
    right = lambda cells: [str(cell).rjust(width) for cell, width in zip(cells, others)]
    return "\n".join("  ".join([str(word).ljust(first), *right(cells)]) for word, *cells in rows)
