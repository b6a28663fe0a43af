"""Every test runs on one thread and the CPU, without network; real data only where MORE_JMERE_DATA points to it."""

import os
import signal
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch


@pytest.fixture(autouse=True)
def deterministic():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def real_data() -> Path:
    folder = os.environ.get("MORE_JMERE_DATA")
    if not folder:
        pytest.skip("real data: set MORE_JMERE_DATA to a folder with jmere/, more-one/ and qwen2.5-vl/")
    return Path(folder)


@pytest.fixture(autouse=True)
def sigterm_ends_pytest():
    """A run takes SIGTERM as a wish; in this process it must not outlive its test."""
    yield
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
