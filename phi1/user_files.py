"""Reads files that a user hands us, perhaps from a stranger: regular files of a limited size, and JSON in them.

A pipe would keep the reader waiting, and a device has no end. This file imports the standard library alone.
"""

from __future__ import annotations

import errno
import io
import json
import os
import stat
from pathlib import Path
from typing import Any

MIB = 1 << 20
LARGEST_JSON = 64 * MIB  # phi-1's tokenizer.json has 2 MB; a corpus of 10,000 shards has a manifest of 2 MB
_PRETENDERS = {b"version https://git-lfs": "a pointer of Git LFS, not the file; `git lfs pull` fetches that",
               b"<!doctype": "an HTML page", b"<html": "an HTML page"}


def open_regular(path: Path) -> io.BufferedReader:
    """Open a regular file, or a link to one, for reading.

    Raises:
        OSError: there is none, it cannot be read, or it is a folder, a pipe or a device; `strerror` says which.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe is opened without waiting
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        raise OSError(errno.EINVAL, "not a regular file, but a pipe, a socket or a device", str(path))
    return open(descriptor, "rb")


def read_file(path: Path, most: int) -> bytes:
    """Return a regular file's content.

    Raises:
        OSError: as `open_regular`, or the file is larger than `most` bytes.
    """
    with open_regular(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise OSError(errno.EFBIG, f"larger than {most:,} bytes, the most that is read of such a file", str(path))
    return content


def read_json(path: Path, most: int = LARGEST_JSON) -> Any:
    """Return the value in a JSON file.

    Raises:
        OSError: as `read_file`.
        ValueError: it is not JSON in UTF-8; the message does not name the file.
    """
    content = read_file(path, most)
    if what := pretender(content):
        raise ValueError(what)
    return parse_json(content)


def parse_json(content: bytes | str) -> Any:
    """Return the value of a JSON text, with or without a byte-order mark. Raises ValueError if it is none."""
    try:
        return json.loads(content if isinstance(content, str) else content.decode("utf-8-sig"))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def pretender(begin: bytes) -> str:
    """Return what a file with this beginning is, if it stands in another's place; "" if it is not known to be so."""
    text = begin[:64].lstrip().lower()
    return next((what for mark, what in _PRETENDERS.items() if text.startswith(mark)), "")
