"""Files that are written whole or not at all, lines that are, and a lock on a folder."""

import errno
import fcntl
import json
import math
import os
import shutil
import socket
import time
from pathlib import Path

_locks = []  # open as long as this process lives: closing any handle of a locked file would release it


def hold_lock(path: Path, wait: float = 0.0) -> str:
    """Hold the file `path` until this process ends; who holds it where another one does after `wait` seconds, else "".

    The kernel's own lock: it ends with the process, however that ends, and is seen from other hosts of a shared file
    system, where a pid means nothing. OSError where the file system has no locks.
    """
    handle, end = path.open("a+"), time.monotonic() + wait
    while True:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
        if time.monotonic() >= end:
            handle.seek(0)
            return handle.read().strip() or "another process"
        time.sleep(0.2)
    handle.truncate(0)
    handle.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S %z')}\n")
    handle.flush()
    _locks.append(handle)
    return ""


def copy_folder(source: Path, new: Path) -> None:
    """A copy whose files are hard links where the file system has them: weights take no room twice."""
    def link(old: str, other: str) -> None:
        try:
            os.link(old, other)
        except OSError:
            shutil.copyfile(old, other)

    shutil.rmtree(new, ignore_errors=True)
    shutil.copytree(source, new, copy_function=link)


def append_line(path: Path, content: dict) -> None:
    """One JSON object as one whole line: a single write at the file's end, so that a reader who comes in between finds
    only whole lines, or a last one without its end (a write under way, a full disk), which is to be left out."""
    # a mean of nothing is not a number, and JSON has no word for that but null
    missing = {name for name, value in content.items() if isinstance(value, float) and not math.isfinite(value)}
    content = {name: None if name in missing else value for name, value in content.items()}
    line = json.dumps(content).encode() + b"\n"
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        if (written := os.write(file, line)) < len(line):  # the next line would join the half one
            os.ftruncate(file, os.fstat(file).st_size - written)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    finally:
        os.close(file)


def keep_lines(path: Path, count: int) -> None:
    """The file's first `count` lines, written beside and renamed. ValueError where it has fewer: some were lost."""
    kept = path.read_bytes().splitlines(keepends=True)[:count] if count else []
    if len(kept) < count:
        raise ValueError(f"{path}: {len(kept)} lines; {count} expected, as the checkpoint says: some are lost")
    new = path.with_name(path.name + ".new")
    new.write_bytes(b"".join(kept))
    new.replace(path)


def write_json(path: Path, content) -> None:
    """Whole or not at all: written beside and renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    new.replace(path)


def sync(path: Path) -> None:
    """What was written to a file, or renamed in a folder, is on the disk and not only in the system's memory."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
