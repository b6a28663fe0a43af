"""GRPO for vision-language models: a group is one prompt and G continuations, and no prompt is computed twice."""
import sys
from pathlib import Path

home = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(home))  # as data/__init__.py says
import data  # noqa: E402

sys.path.pop(0)
if home not in Path(data.__file__ or "/").resolve().parents:
    raise ImportError(f"{data} hides the package data in {home}: it was imported before, and needs another name")
