"""Folders and files that appear complete or not at all: they are made beside their place, and put there by a rename.

`workspace(path)` makes `.NAME.TOKEN.tmp` beside `path`. Its owner holds a lock on it as long as it lives, so that
the next workspace for the same path knows one whose owner was killed, and clears it up. In it `new` is filled;
`publish` gives that its name, and keeps what had the name before as `old` meanwhile. If `old` and `new` are both there
and `path` is not, the renames were cut short, and whoever clears up, the owner or the next, puts `old` back. So a
signal or a kill at any line leaves `path` as it was, or as it was to be.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

NEW = "new"
"""What is filled in a workspace."""
_OLD = "old"
_FOLDER = os.O_RDONLY | os.O_DIRECTORY
# A holder that stalls in its renames looks like `flock FOLDER phi1 ...`, which waits for us: both are there. To go on
# beside the first may cost a spurious "it is taken", and no data; to wait for the second would be for ever.
_LOCK_LOOKS, _LOOK_SECONDS = 100, 0.01
_TAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)

T = TypeVar("T")


@contextlib.contextmanager
def workspace(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path`, removed at the end whatever happens.

    Args:
        path: of what is to be, without symbolic links; its parents are made.

    Raises:
        OSError: nothing can be written there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path)
    work, lock = _make_locked(path)
    try:
        yield work
    finally:
        try:
            _clear(work, path)
        finally:
            os.close(lock)


def publish(work: Path, path: Path, check: Callable[[Path], None] | None = None) -> bool:
    """Give the finished folder `new` of a workspace its name.

    Args:
        work: the workspace.
        path: whose it is.
        check: replaces a folder that is there: called with it when it lies where nobody puts anything into it any more,
            it raises if it must stay. None: the name must be free, or that of an empty folder.

    Returns:
        False if something is there that is not to be replaced; it was left.
    """
    _flush(work / NEW)
    shutil.rmtree(work / _OLD, ignore_errors=True)  # of a call before this one, which found the name taken
    with _renaming(work, path):
        if check is not None and path.is_dir():
            os.rename(path, work / _OLD)
            check(work / _OLD)
        try:
            os.rename(work / NEW, path)
        except OSError as error:
            if error.errno in _TAKEN:
                return False
            raise
    _flush(path.parent)
    return True


def write_file(path: Path, text: str) -> None:
    """Give a file this text, in UTF-8; it is there with the old one or the new one. Its folder is made.

    Raises:
        OSError: it cannot be written.
    """
    path = Path(os.path.realpath(path))
    with workspace(path) as work:
        with (work / NEW).open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(work / NEW, path)


def sweep(path: Path) -> None:
    """Clear up after processes that were killed in a workspace of `path`."""
    for work in path.parent.glob(f".{glob.escape(path.name)}.{'[0-9a-f]' * 8}.tmp"):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):  # it is gone, or its owner lives
            lock = os.open(work, _FOLDER)
            stack.callback(os.close, lock)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _clear(work, path)


def identity(path: Path) -> tuple[int, int] | None:
    """What tells a folder or file from another of its name; None if there is none. Not asked between two renames."""
    with _locked(Path(os.path.realpath(path)).parent, fcntl.LOCK_SH), contextlib.suppress(OSError):
        found = os.stat(path)
        return found.st_dev, found.st_ino
    return None


def read_unreplaced(caller: str, folder: Path, read: Callable[[], T]) -> T:
    """What `read` makes of a folder, and of that alone: if another has taken its place meanwhile, it reads once more.

    Raises:
        ValueError: another has taken its place again.
    """
    for _ in range(2):
        before = identity(folder)
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):  # as long as it is open, no other gets its number
                stack.callback(os.close, os.open(folder, _FOLDER))
            try:
                result = read()
            except Exception:
                if identity(folder) == before:
                    raise
            else:
                if identity(folder) == before:
                    return result
                del result  # there is no memory for two models
    raise ValueError(f"{caller}: {folder} was replaced while it was read, and once more while it was read again")


def _make_locked(path: Path) -> tuple[Path, int]:
    while True:  # until it is locked: before that, the sweep of another process can take it for abandoned
        work = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        work.mkdir()
        try:
            lock = os.open(work, _FOLDER)
        except FileNotFoundError:
            continue
        with contextlib.suppress(OSError):  # a file system without locks: nothing is swept there either
            fcntl.flock(lock, fcntl.LOCK_EX)
        if work.exists():
            return work, lock
        os.close(lock)


def _clear(work: Path, path: Path) -> None:
    with _renaming(work, path):
        pass
    # `new` first: where it is gone, no later sweep takes what is left of `old` for something to put back.
    shutil.rmtree(work / NEW, ignore_errors=True)
    shutil.rmtree(work, ignore_errors=True)


@contextlib.contextmanager
def _renaming(work: Path, path: Path) -> Iterator[None]:
    """No other process renames in the parent folder; at the end, what was moved aside for nothing is back."""
    with _locked(path.parent, fcntl.LOCK_EX):
        try:
            yield
        finally:
            if (work / _OLD).exists() and (work / NEW).exists() and not os.path.lexists(path):
                os.rename(work / _OLD, path)


@contextlib.contextmanager
def _locked(folder: Path, how: int) -> Iterator[None]:
    """A lock on a folder, for the length of two renames. Who holds it for a second is somebody else, not waited for."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # it may not be read, or the file system has no locks
            lock = os.open(folder, _FOLDER)
            stack.callback(os.close, lock)
            for _ in range(_LOCK_LOOKS):
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(lock, how | fcntl.LOCK_NB)
                    break
                time.sleep(_LOOK_SECONDS)
        yield


def _flush(folder: Path) -> None:
    """A folder's names to the disk."""
    with contextlib.ExitStack() as stack, contextlib.suppress(OSError):  # some file systems refuse
        descriptor = os.open(folder, _FOLDER)
        stack.callback(os.close, descriptor)
        os.fsync(descriptor)
