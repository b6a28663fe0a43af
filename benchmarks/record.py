"""What every benchmark needs: where figures go (results.jsonl, and from it RESULTS.md), and the peak of memory."""

import ctypes
import datetime
import json
import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

RESULTS = Path(__file__).parent / "results.jsonl"


def machine() -> str:
    """Processor and cores, and the GPU if there is one."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    names = (
        re.findall(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        if os.path.exists("/proc/cpuinfo")
        else []
    )
    return f"{names[0].strip() if names else platform.processor()}, {len(os.sched_getaffinity(0))} cores"


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("torch", "transformers", "trl"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            pass
    return found


def commit() -> str:
    root = Path(__file__).parent.parent
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True)
    return done.stdout.strip()


def append(benchmark: str, settings: dict, figures: list[dict], summary: str = "") -> None:
    """One line of results.jsonl; `figures` are the rows of the printed table."""
    line = {
        "benchmark": benchmark,
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "versions": versions(),
        "commit": commit(),
        "settings": settings,
        "figures": figures,
        "summary": summary,
    }
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")


class PeakMemory:
    """Peak of this process's resident set in bytes since `start`, less what it was then (Linux)."""

    def start(self) -> None:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed before and kept by the allocator would hide what is new
        Path("/proc/self/clear_refs").write_text("5")
        self.before = self.read("VmRSS")

    def beyond(self) -> int:
        return self.read("VmHWM") - self.before

    @staticmethod
    def read(field: str) -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
        return int(line.split()[1]) * 1024


def without_vision_operators() -> None:
    """Let torchvision be imported beside a torch for which it was not built: it declares operators that are missing."""
    from torch import library

    register = library.register_fake

    def lenient(name, *arguments, **keywords):
        if isinstance(name, str) and name.startswith("torchvision::"):
            return lambda function: function
        return register(name, *arguments, **keywords)

    library.register_fake = lenient
