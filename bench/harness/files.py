"""Files that other processes write too: replaced whole, changed under a lock, extended by whole lines."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from phi1.user_files import parse_json


def replace(path: Path, text: str) -> None:
    """Put a text into a file, whole or not at all. It is first written beside the file, under a unique name.

    A pipe or a device is written to directly. `phi1.atomic.write_file` would wait for the lock of `locked`.
    """
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8")
        return
    path = path.resolve()  # what a link leads to is replaced, not the link
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())  # a rename can reach the disk before the text does
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make other processes wait at this block for the same folder, so that a file can be read, changed and replaced.

    The lock is on the folder itself and leaves nothing in it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        lock(descriptor, wait=True)
        yield
    finally:
        os.close(descriptor)


def lock(descriptor: int, *, wait: bool = False) -> bool:
    """Lock an open file or folder until it is closed; False if another process has locked it.

    True where the file system has no locks.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def append(path: Path, entry: Mapping[str, Any]) -> None:
    """Add a line of JSON to a file; it is on the disk when this returns."""
    line = json.dumps(entry).encode() + b"\n"
    with path.open("ab+") as file:
        if file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":
            line = b"\n" + line  # what is there was cut short, and must not take this line with it
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def lines(path: Path) -> Iterator[dict[str, Any]]:
    """The entries that `append` has put into a file, without a line that was cut short; none if there is no file."""
    for line in path.read_bytes().split(b"\n") if path.is_file() else []:
        with contextlib.suppress(ValueError):
            yield parse_json(line)
