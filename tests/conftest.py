"""Every test runs on one thread and the CPU, without network; real data only where MORE_JMERE_DATA points to it.

How a test runs a program, the cheapest first:
  in this process    call its `main(words)` or its functions: for what one process computes, refuses or prints
  programs.run       `python -m PROGRAM`, alone or under torchrun (`processes=2`), in a forked interpreter: for exit
                     statuses, signals, several ranks; `begin` where it is stopped or killed meanwhile
  run_processes      a function of the test file on several ranks (tests/processes.py)
  interpreter=sys.executable   in `run` and `begin`: a real interpreter, 7 s of a core for each of its processes; for
                     what a fork cannot show, as what is imported at the start
What several files need is a session's fixture here and built once, `built_once`, for all processes of pytest -n.
What takes a minute or more by nature is `@pytest.mark.heavy`: left out of `./launch.sh test`, run by .ci/run.
"""

import fcntl
import os
import shutil
import signal
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["OMP_NUM_THREADS"] = "1"

import pytest


def pytest_configure(config):
    if getattr(config.option, "numprocesses", None):  # pytest -n: one server for all its processes
        from programs import forking_python

        forking_python()


@pytest.fixture(autouse=True)
def deterministic():
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope="session")
def real_data() -> Path:
    folder = os.environ.get("MORE_JMERE_DATA")
    if not folder:
        pytest.skip("real data: set MORE_JMERE_DATA to a folder with jmere/, more-one/ and qwen2.5-vl/")
    return Path(folder)


@pytest.fixture(autouse=True)
def no_run_outlives_its_test():
    """A run takes signals as wishes and ends its process when it hangs; pytest's process must have neither of it."""
    yield
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if "grpo.runtime.liveness" in sys.modules:
        sys.modules["grpo.runtime.liveness"].stop_watching()


@pytest.fixture(scope="session")
def built_once(tmp_path_factory):
    """A function of a name and what fills a folder: the folder, filled by the first process of pytest -n that asks."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def build(name, fill) -> Path:
        folder, done = base / name, base / f"{name}.done"
        with (base / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                fill(folder)
                done.touch()
        return folder

    return build


@pytest.fixture(scope="session")
def folder(built_once) -> Path:
    """A whole pipeline on a very small world, read only: world, cold start, Stage 1, split, Stage 2, evaluation."""
    from programs import COMMON, succeed

    def fill(folder):
        data = folder / "world" / "MORE"
        succeed("data.toy", "--output", folder / "world", "--train", 60, "--valid", 6, "--test", 12)
        succeed("sft.annotate", "--task", "more", "--data", data, "--split", "train", "--fraction", 0.4, "--seed", 0,
                "--expert", f"file:{folder / 'world' / 'expert.jsonl'}", "--output", folder / "cold_start.jsonl")
        succeed("sft.train", "--model", folder / "world" / "model", "--data", data, "--responses",
                folder / "cold_start.jsonl", "--output", folder / "sft", "--epochs", 2, "--batch_size", 8,
                "--learning_rate", 1e-3, "--train_vision", True, *COMMON, processes=2)
        succeed("grpo.evaluate", "--model", folder / "sft" / "model", "--data", data, "--split", "train", "--output",
                folder / "split", "--exclude", folder / "cold_start.drawn.json", *COMMON, processes=2)
        succeed("grpo.train", "--model", folder / "sft" / "model", "--data", data, "--predictions",
                folder / "split" / "predictions.jsonl", "--output", folder / "grpo", "--max_rollouts", 3,
                "--learning_rate", 1e-3, "--prompts_per_rollout", 4, "--group_size", 3, "--reward_options",
                "min_length=60", *COMMON, processes=2)
        succeed("grpo.evaluate", "--model", folder / "grpo" / "model", "--data", data, "--output", folder / "test",
                *COMMON)

    return built_once("pipeline", fill)
