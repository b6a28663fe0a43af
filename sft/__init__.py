"""Stage 1: the supervised cold start."""
import sys
from pathlib import Path

home = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(home))  # as data/__init__.py says
import grpo  # noqa: E402

sys.path.pop(0)
if home not in Path(grpo.__file__ or "/").resolve().parents:
    raise ImportError(f"{grpo} hides the package grpo in {home}: it was imported before, and needs another name")
