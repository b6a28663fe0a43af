"""What ran: settings, versions, the commit, and a cheap hash of data and model, so that a result can be traced."""

import hashlib
import os
import platform
import subprocess
import time
from pathlib import Path

import torch
import transformers

from grpo.engine.files import TRAINING, model_file, read_json
from grpo.runtime.files import sha256
from grpo.runtime.settings import as_dict

PIECE = 2**20  # bytes hashed at either end of a file
CONTENTS = 256  # files of which contents are hashed, the largest first
FILES = ("responses", "samples", "predictions", "adapter")  # settings that name a file which decides what is learned
IMAGES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp"}


def what_ran(settings) -> dict:
    """The content of settings.json for one run of a program."""
    given = {name: Path(path) for name in FILES if isinstance(path := getattr(settings, name, ""), str) and path}
    return {"settings": as_dict(settings), "versions": {
        "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__},
        "commit": commit(), "data_hash": fingerprint(Path(settings.data)), "model_hash": model_hash(settings.model),
        "file_hashes": {name: sha256(path / "adapter_model.safetensors" if path.is_dir() else path)[:16]
                        for name, path in given.items()},
        "ranks": int(os.environ.get("WORLD_SIZE", 1)), "started": time.strftime("%Y-%m-%d %H:%M:%S %z")}


def model_hash(model: str) -> str:
    return fingerprint(model_file(model, "config.json").parent)


def check_base(adapter: str, model: str) -> None:
    """ValueError where an adapter was trained here on another checkpoint than `model`; PEFT's own files do not say."""
    base = read_json(adapter, TRAINING) if (Path(adapter) / TRAINING).is_file() else {}
    if base.get("model_hash") not in (None, model_hash(model)):
        raise ValueError(f"--adapter {adapter}: it was trained on {base['model']}, whose files --model {model} has not")


def commit(root: Path = Path(__file__).parents[2]) -> str | None:
    """The checkout's commit, with "+changes" where tracked files differ from it; None outside a checkout."""
    if not (root / ".git").exists():  # git itself would find whatever repository an installed package lies in
        return None
    words = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changes"]
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def fingerprint(folder: Path) -> str:
    """sha256 over every file's name and size below `folder`, in the order of names, and over the first and the last
    MiB of the 256 largest that are no images. Well under a second for 16 GB of weights, about a second for 20,000
    images; a change in the middle of a large file that keeps its size goes unseen. The first 16 hexadecimal digits."""
    paths = [os.path.join(place, name) for place, _, names in os.walk(folder) for name in names]
    sizes = {os.path.relpath(path, folder): os.stat(path).st_size for path in paths if os.path.exists(path)}
    texts = [name for name in sizes if os.path.splitext(name)[1].lower() not in IMAGES]
    read = set(sorted(texts, key=lambda name: -sizes[name])[:CONTENTS])
    digest = hashlib.sha256()
    for name in sorted(sizes):
        digest.update(f"{name}\0{sizes[name]}\0".encode(errors="surrogateescape"))
        if name in read:
            with open(folder / name, "rb") as file:
                digest.update(file.read(PIECE))
                file.seek(max(PIECE, sizes[name] - PIECE))
                digest.update(file.read(PIECE))
    return digest.hexdigest()[:16]
