"""Stage 1: the supervised cold start."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # as data/__init__.py says
import grpo  # noqa: E402, F401

sys.path.pop(0)
