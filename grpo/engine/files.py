"""The small files of a checkpoint, from a folder or the hub."""

import json
import os
import shutil
from pathlib import Path

TRAINING = "training.json"  # beside exported weights: how the next stage is to ask


def model_file(model: str, name: str) -> Path:
    """Path of one small file of a checkpoint, local or from the hub; ValueError with the expected name if absent."""
    if Path(model).is_dir():
        path = Path(model) / name
        if not path.is_file():
            raise ValueError(f"{path}: missing; a checkpoint needs config.json, tokenizer and {name}")
        return path
    from transformers.utils import cached_file  # here, for it brings transformers along

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


def reasoning_of(model: str, given: bool | None = None) -> bool:
    """Whether <think>…</think> is asked for: as given, else as the model was trained (of an export here), else yes."""
    path = Path(model) / TRAINING
    return given if given is not None else read_json(model, TRAINING).get("reasoning", True) if path.is_file() else True


def replace_folder(new: Path, place: Path) -> None:
    """`new` becomes `place`; what stood there is moved aside first and removed last."""
    old = place.with_name(place.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if place.exists():
        os.replace(place, old)
    os.replace(new, place)
    shutil.rmtree(old, ignore_errors=True)
