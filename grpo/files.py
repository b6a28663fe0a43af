"""The small files of a checkpoint, from a folder or the hub; and what is written is written."""

import json
import os
from pathlib import Path

from transformers.utils import cached_file


def model_file(model: str, name: str) -> Path:
    """Path of one small file of a checkpoint, local or from the hub; ValueError with the expected name if absent."""
    if Path(model).is_dir():
        path = Path(model) / name
        if not path.is_file():
            raise ValueError(f"{path}: missing; a checkpoint needs config.json, tokenizer and {name}")
        return path
    try:
        return Path(cached_file(model, name))
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{model}: {name}: neither a folder nor a model on the hub that can be reached ({reason})") from None


def read_json(model: str, name: str) -> dict:
    """A checkpoint's JSON file; ValueError with its path if it holds anything else."""
    path = model_file(model, name)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None


def sync(path: Path) -> None:
    """What was written to a file, or renamed in a folder, is on the disk and not only in the system's memory."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
