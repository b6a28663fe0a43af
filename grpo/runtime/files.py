"""Files that are written whole or not at all, lines that are, and a lock on a folder."""

import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
import socket
import time
from pathlib import Path

_locks = []  # open as long as this interpreter lives: closing any handle of a locked file would release it


def hold_lock(path: Path) -> tuple[bool, str]:
    """(whether this process holds the file `path` until it ends, who holds it). OSError where there are no locks.

    The kernel's own lock: it ends with the process, and other hosts see it where they share the file system."""
    handle = path.open("a+")
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            raise
        handle.seek(0)
        return False, handle.read().strip()
    me = f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S %z')}"
    handle.truncate(0)
    print(me, file=handle, flush=True)
    os.fsync(handle)  # for who asks from another host
    _locks.append(handle)
    return True, me


def link_folder(source: Path, place: Path) -> None:
    """A copy of hard links, or of files where the file system has none: weights take no room twice."""
    new = place.with_name(place.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    try:
        shutil.copytree(source, new, copy_function=os.link)
    except OSError:
        shutil.copytree(source, new, dirs_exist_ok=True)
    replace_folder(new, place)


def replace_folder(new: Path, place: Path) -> None:
    """`new` becomes `place`, on the disk too; what stood there is moved aside first and removed last."""
    old = place.with_name(place.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if place.exists():
        os.replace(place, old)
    os.replace(new, place)
    shutil.rmtree(old, ignore_errors=True)
    sync(place.parent)


def append_line(path: Path, content: dict) -> None:
    """One JSON object as one whole line: a single write at the file's end, so that a reader who comes in between finds
    only whole lines, or a last one without its end (a write under way, a full disk), which is to be left out."""
    not_a_number = lambda value: isinstance(value, float) and not math.isfinite(value)  # a mean of nothing: null
    content = {name: None if not_a_number(value) else value for name, value in content.items()}
    line = json.dumps(content).encode() + b"\n"
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        if (written := os.write(file, line)) < len(line):  # the next line would join the half one
            os.ftruncate(file, os.fstat(file).st_size - written)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as problem:
        problem.filename = str(path)
        raise
    finally:
        os.close(file)


def keep_lines(path: Path, count: int) -> None:
    """The file's first `count` lines stay. ValueError where it has fewer: some were lost."""
    kept = path.read_bytes().splitlines(keepends=True)[:count] if count else []
    if len(kept) < count:
        raise ValueError(f"{path}: {len(kept)} lines; {count} expected, as the checkpoint says: some are lost")
    write_whole(path, b"".join(kept))


def write_whole(path: Path, content: bytes) -> None:
    """Written beside and renamed, so that a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    new.write_bytes(content)
    new.replace(path)


def write_json(path: Path, content) -> None:
    write_whole(path, json.dumps(content, indent=1, ensure_ascii=False).encode() + b"\n")


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """What was written to a file, or renamed in a folder, is on the disk and not only in the system's memory."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
