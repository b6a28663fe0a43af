"""The small files of a checkpoint, from a folder or the hub."""

import os
import urllib.error
import urllib.request
from functools import cache
from pathlib import Path

from data.read import read_object

TRAINING = "training.json"  # beside exported weights: how the next stage is to ask
HUB = os.environ.get("HF_ENDPOINT", "https://huggingface.co")


def hub_options(model: str) -> dict:
    """Where transformers is to look for a hub's model: without a network, only among what was downloaded before."""
    return {} if Path(model).is_dir() or hub_answers() else {"local_files_only": True}


@cache
def hub_answers() -> bool:
    """One attempt of seconds, where the hub's library would take half a minute for every file."""
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        return False
    try:
        urllib.request.urlopen(urllib.request.Request(HUB, method="HEAD"), timeout=5).close()
    except urllib.error.HTTPError:  # an answer too
        return True
    except (OSError, ValueError):
        return False
    return True


def model_file(model: str, name: str) -> Path:
    """Path of one small file of a checkpoint, local or from the hub; ValueError with the expected name if absent."""
    if Path(model).is_dir():
        path = Path(model) / name
        if path.is_file():
            return path
        if (Path(model) / "adapter_config.json").is_file():
            raise ValueError(f"{model}: holds an adapter; its base is the model, it goes to --adapter")
        raise ValueError(f"{path}: missing; a checkpoint needs config.json, tokenizer and {name}")
    from transformers.utils import cached_file  # here, for it brings transformers along

    options = hub_options(model)
    try:
        if (path := cached_file(model, name, **options)) is not None:
            return Path(path)
        reason = f"the hub's model has no file {name}"
    except OSError as error:
        reason = " ".join(str(error).split("\n")[:2])  # the second line says where to ask for access to a gated model
    if options:
        reason = (f"not among the models that were downloaded before, while {HUB} cannot be reached "
                  "(or HF_HUB_OFFLINE is set)")
    raise ValueError(f"{model}: {name}: no folder here, and {reason}")


def read_json(model: str, name: str) -> dict:
    """A checkpoint's JSON object; ValueError with its path if it holds anything else."""
    return read_object(model_file(model, name), f"a checkpoint's {name}")


def reasoning_of(model: str, given: bool | None = None) -> bool:
    """Whether <think>…</think> is asked for: as given, else as the model was trained (of an export here), else yes."""
    path = Path(model) / TRAINING
    return given if given is not None else read_json(model, TRAINING).get("reasoning", True) if path.is_file() else True
