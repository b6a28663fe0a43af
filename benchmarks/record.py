"""Where measured figures go: one JSON line each in results.jsonl, from which RESULTS.md is written."""

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
    names = re.findall(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text()) if os.path.exists("/proc/cpuinfo") else []
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
    line = {"benchmark": benchmark, "date": datetime.date.today().isoformat(), "machine": machine(), "versions": versions(),
            "commit": commit(), "settings": settings, "figures": figures, "summary": summary}
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")
