"""`metrics.jsonl`: one JSON object an update, and the same numbers as TensorBoard events."""

import json
from pathlib import Path

from grpo.runtime.dist import rank
from grpo.runtime.files import append_line, keep_lines


class MetricsLog:
    """`metrics.jsonl` in the run's folder: one JSON object an update, written by rank 0.

    lines: that a run which goes on has already; what a killed run wrote beyond them goes away.
    events: whether the same numbers go into <output>/tensorboard: "on", "off", "auto" (where it is installed)."""

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

    def values(self, name: str) -> list[float]:
        """A metric of all updates so far that have it, of those before a restart too."""
        with self.path.open(encoding="utf-8") as file:
            return [line[name] for line in map(json.loads, file) if line.get(name) is not None]


def open_events(folder: Path, choice: str, step: int = 0):
    """A writer of TensorBoard events, or None; ValueError if they are asked for and tensorboard is not there.

    They begin anew with the run; beyond step 0 they go on behind what was written up to there."""
    if choice == "off":
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        if choice == "auto":
            return None
        raise ValueError("--tensorboard on: tensorboard is not installed "
                         "(pip install 'grpo-vlm[tensorboard]')") from None
    for old in folder.glob("events.out.tfevents.*") if not step else ():
        old.unlink()
    return SummaryWriter(str(folder), purge_step=step + 1 if step else None)
