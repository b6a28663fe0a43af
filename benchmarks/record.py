"""What every benchmark needs: where figures go (results.jsonl, and from it RESULTS.md), and the peak of memory."""

import ctypes
import datetime
import json
import os
import platform
import re
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
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


def stock_sampling(completions: int, tokens: int) -> dict:
    """generate's words for so many plain draws at temperature 0.8, none of which may end early."""
    return dict(do_sample=True, temperature=0.8, top_p=1.0, top_k=0, repetition_penalty=1.0, eos_token_id=None,
                pad_token_id=0, num_return_sequences=completions, max_new_tokens=tokens, min_new_tokens=tokens)


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
        self.forget()
        self.before = self.read("VmRSS")

    def forget(self) -> None:
        """The peak until now does not count."""
        Path("/proc/self/clear_refs").write_text("5")

    def beyond(self) -> int:
        return self.read("VmHWM") - self.before

    @contextmanager
    def sampled(self):
        """Inside, `most` becomes the peak of what is anonymous, looked up every 2 ms: pages of mapped files,
        which the system takes back when it needs room, are not in it."""
        ended, self.most = threading.Event(), 0

        def look() -> None:
            while not ended.wait(0.002):
                self.most = max(self.most, self.read("RssAnon"))

        thread = threading.Thread(target=look)
        thread.start()
        try:
            yield self
        finally:
            ended.set()
            thread.join()
            self.most = max(self.most, self.read("RssAnon"))

    @staticmethod
    def read(field: str) -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
        return int(line.split()[1]) * 1024


def on_ranks(module: str, words: list, ranks: int, environment: dict) -> list:
    """`python -m module words` on so many ranks, as torchrun would start them: of each the last line, which is JSON."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(free.getsockname()[1])}
    started = [subprocess.Popen(
        [sys.executable, "-m", module, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd=Path(__file__).parent.parent, env={**os.environ, "TOKENIZERS_PARALLELISM": "false", **environment,
        **({**address, "RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {})}) for rank in range(ranks)]
    said = [one.communicate() for one in started]
    if any(one.returncode for one in started):
        raise RuntimeError(f"{module} {words}: " + "\n".join(errors[-3000:] for _, errors in said))
    return [json.loads(text.splitlines()[-1]) for text, _ in said]


def without_vision_operators() -> None:
    """Let torchvision be imported beside a torch for which it was not built: it declares operators that are missing."""
    from torch import library

    register = library.register_fake

    def lenient(name, *arguments, **keywords):
        if isinstance(name, str) and name.startswith("torchvision::"):
            return lambda function: function
        return register(name, *arguments, **keywords)

    library.register_fake = lenient
