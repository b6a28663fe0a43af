"""What ran: settings, versions, the commit, and a cheap hash of data and model, so that a result can be traced."""

import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
import transformers

from grpo.engine.files import TRAINING, model_file, read_json
from grpo.runtime.settings import as_dict

PIECE = 2**20  # bytes hashed at either end of a file
CONTENTS = 256  # files of which contents are hashed, the largest first
FILES = ("responses", "samples", "predictions", "adapter")  # settings that name a file which decides what is learned
IMAGES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp"}


def what_ran(settings) -> dict:
    """The content of settings.json for one run of a program."""
    python = sys.version.split()[0]
    return {"settings": as_dict(settings),
        "versions": {"python": python, "torch": torch.__version__, "transformers": transformers.__version__},
        "commit": commit(), "data_hash": fingerprint(Path(settings.data)),
        "model_hash": fingerprint(model_file(settings.model, "config.json").parent),
        "file_hashes": {name: file_hash(path) for name in FILES if isinstance(path := getattr(settings, name, ""), str)
        and path},
        "ranks": int(os.environ.get("WORLD_SIZE", 1)),
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }


def check_base(adapter: str, model: str) -> None:
    """ValueError where an adapter was trained here on another checkpoint than `model`; PEFT's own files do not say."""
    base = read_json(adapter, TRAINING) if (Path(adapter) / TRAINING).is_file() else {}
    if base.get("model_hash") not in (None, fingerprint(model_file(model, "config.json").parent)):
        raise ValueError(f"--adapter {adapter}: it was trained on {base['model']}, whose files are not those of "
                         f"--model {model}")


def commit(root: Path = Path(__file__).parent.parent) -> str | None:
    """The checkout's commit, with "+changes" where tracked files differ from it; None outside a checkout."""
    if not (root / ".git").exists():  # git itself would find whatever repository an installed package lies in
        return None

    def ask(*words: str) -> str:
        git = ["git", "-C", str(root), *words]
        return subprocess.run(git, capture_output=True, text=True, check=True, timeout=20).stdout

    try:
        changed = ask("status", "--porcelain", "--untracked-files=no").strip()
        return ask("rev-parse", "HEAD").strip() + ("+changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def file_hash(path: str) -> str:
    """The first 16 hexadecimal digits of the sha256 of its contents, or of a folder's adapter."""
    if Path(path).is_dir():
        path = Path(path) / "adapter_model.safetensors"
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def fingerprint(folder: Path) -> str:
    """sha256 over every file's name and size below `folder`, in the order of names, and over the first and the last
    MiB of the 256 largest that are no images. Well under a second for 16 GB of weights, about a second for 20,000
    images; a change in the middle of a large file that keeps its size goes unseen. The first 16 hexadecimal digits."""
    sizes = {}
    for place, _, names in os.walk(folder):
        for path in (os.path.join(place, name) for name in names):
            if os.path.exists(path):  # a link to nowhere is no file
                sizes[os.path.relpath(path, folder)] = os.stat(path).st_size
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
