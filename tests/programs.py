"""Run the programs as a user does: `python -m PROGRAM SETTINGS`, alone or under torchrun.

`begin`, `run` and `succeed` start them from a Python that forks (tests/forked.py), which costs a twentieth of a second
where a real interpreter costs 7 s of imports, for each of a run's two or three processes. Ask for a real one
(`interpreter=sys.executable`) where the start itself is the claim: what a program imports, limits and namespaces that
are inherited, hash seeds.
"""

import atexit
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

from safetensors import safe_open

ROOT = Path(__file__).parent.parent
TESTS = ROOT / "tests"
COMMON = ["--max_completion_tokens", "24", "--rollout_rows", "8", "--max_pixels", "3136"]
TORCHRUN = ("-m", "grpo.runtime.launch", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0",
            "--monitor-interval", "0.1")


@cache
def forking_python() -> str:
    """Path of a Python that forks; the first call starts its server, which ends with this process."""
    if "FORKING_PYTHON" not in os.environ:  # else pytest-xdist has started this process, and its parent the server
        folder = tempfile.TemporaryDirectory(prefix="forking-")
        python, place = Path(folder.name) / "python", Path(folder.name) / "socket"
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        server = subprocess.Popen([sys.executable, TESTS / "forked.py", place], env=environment, stdin=subprocess.PIPE,
                                  stdout=subprocess.DEVNULL, start_new_session=True)
        python.write_text(f"#!{sys.executable} -SEs\nimport sys\nsys.path.insert(0, {str(TESTS)!r})\n"
                          f"import forked\nforked.ask({str(place)!r}, sys.argv[1:])\n")
        python.chmod(0o755)
        os.environ["FORKING_PYTHON"] = str(python)
        atexit.register(folder.cleanup)
        atexit.register(server.communicate)
    python = os.environ["FORKING_PYTHON"]
    for _ in range(1200):
        if Path(python).with_name("socket").exists():
            return python
        time.sleep(0.1)
    raise RuntimeError("the server of tests/forked.py does not start")


def begin(*words, processes=0, restarts=0, interpreter=None, environment=None, **more) -> subprocess.Popen:
    """`python WORDS`, with `processes` under torchrun, as a process whose output, errors among it, is one pipe of
    text."""
    launcher = [*TORCHRUN, "--nproc-per-node", processes, "--max-restarts", restarts] if processes else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **(environment or {})}
    more = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, **more}
    command = [interpreter or forking_python(), *launcher, *words]
    return subprocess.Popen(list(map(str, command)), env=environment, **more)


def end(process, seconds=240) -> tuple[int, str]:
    """Exit status and output of what `begin` began."""
    text, _ = process.communicate(timeout=seconds)
    return process.returncode, text


def run(module, *words, processes=0, **more) -> tuple[int, str]:
    """Exit status and output of `python -m MODULE WORDS`."""
    return end(begin("-m", module, *words, processes=processes, **more))


def succeed(module, *words, processes=0, **more) -> str:
    status, text = run(module, *words, processes=processes, **more)
    assert status == 0, text
    return text


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def tensors(folder):
    file = safe_open(folder / "model.safetensors", "pt")
    return {name: file.get_tensor(name) for name in file.keys()}
