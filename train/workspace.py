"""A folder that appears complete or not at all: it is filled under another name and put in its place by a rename."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from phi1.train.shards import DataError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_CORPUS_NAME = re.compile(r"manifest\.json|tokenizer|(train|val)-(\d+\.bin|documents\.npy)")


@contextlib.contextmanager
def workspace(out: Path, needed: int) -> Iterator[Path]:
    """A temporary folder beside `out`, removed at the end whatever happens.

    Folders left by processes that were killed are removed first: each is locked by its owner as long as that lives.

    Args:
        out: the folder to be.
        needed: bytes that filling it takes, at the most; 0 if not known.

    Raises:
        DataError: nothing can be written there, or the disk has not that much room, or is full later on.
    """
    out = out.resolve()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(out)
        folder, lock = _make_locked(out)
    except OSError as error:
        raise DataError(f"nothing can be written in {out.parent}: {error.strerror}; choose another place") from None
    free = shutil.disk_usage(out.parent).free
    sizes = f"about {format_bytes(needed)} are needed" if needed else "the needed size is not known beforehand"
    full = (f"no space on the disk of {out.parent}: {sizes}, and {format_bytes(free)} were free at the start; "
            "make room there, or choose a place on another disk")
    try:
        if needed > free:
            raise DataError(full)
        yield folder
    except Exception as error:
        if any(isinstance(cause, OSError) and cause.errno in _FULL for cause in chain(error)):
            raise DataError(full) from error
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def publish(new: Path, out: Path, *, replace: bool) -> bool:
    """Give a finished folder its name.

    Args:
        new: the folder, in a workspace of `out`.
        out: its name to be: nothing is there, or an empty folder, or a corpus to replace.
        replace: take the place of a corpus; it goes with the workspace.

    Returns:
        False if another folder is there already and was left.
    """
    out, old = out.resolve(), new.with_name("old")
    if replace and out.exists():
        os.rename(out, old)
    try:
        os.rename(new, out)
    except BaseException as error:
        if old.exists():
            with contextlib.suppress(OSError):
                os.rename(old, out)
        if isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False
        raise
    parent = os.open(out.parent, os.O_RDONLY)
    os.fsync(parent)
    os.close(parent)
    return True


def foreign_file(folder: Path) -> str | None:
    """The name of something in a folder that is no part of a corpus; None if all could be."""
    return next((name for name in sorted(os.listdir(folder)) if not _CORPUS_NAME.fullmatch(name)), None)


def chain(error: BaseException) -> Iterator[BaseException]:
    """An error and the errors it came from."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def format_bytes(n: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if n < 1000 or unit == "GB":
            break
        n /= 1000
    return f"{n:,.0f} {unit}" if unit == "bytes" else f"{n:,.1f} {unit}"


def _make_locked(out: Path) -> tuple[Path, int]:
    while True:  # until it is locked: before that, the sweep of another process can take it for abandoned
        folder = out.with_name(f".{out.name}.{secrets.token_hex(4)}.tmp")
        folder.mkdir()
        try:
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            continue
        with contextlib.suppress(OSError):  # a file system without locks: nothing is swept there either
            fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.exists():
            return folder, lock
        os.close(lock)


def _remove_abandoned(out: Path) -> None:
    for folder in out.parent.glob(f".{glob.escape(out.name)}.*.tmp"):
        try:
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except OSError:
            continue
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)
