"""Atomic writes: a folder or file is made beside its path and put there by a rename, so no reader sees it half made.

`workspace(path)` makes the folder `.NAME.TOKEN.tmp` beside `path`. The owner fills `new` in it, and `publish` renames
`new` to `path`; an older folder of that name waits in the workspace as `old` during the renames. The owner holds a lock
on the workspace while it lives. The next workspace for the same path sees from the lock that an owner was killed, and
removes what it left. If `old` and `new` both exist and `path` does not, the renames were interrupted, and the cleanup
puts `old` back. After a signal or a kill at any line, `path` holds either the old content or the new one.
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
"""The entry of a workspace that the owner fills."""
_OLD = "old"
_FOLDER = os.O_RDONLY | os.O_DIRECTORY
# Two processes may hold the lock for long: one that stalls in its renames, and `flock FOLDER phi1 ...`, which waits for
# us. Going on beside the first may cost a wrong "it is taken", but no data; waiting for the second would never end.
_LOCK_LOOKS, _LOOK_SECONDS = 100, 0.01
_TAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)

T = TypeVar("T")


@contextlib.contextmanager
def workspace(path: Path) -> Iterator[Path]:
    """Make a temporary folder beside `path`, and remove it at the end whatever happens.

    Args:
        path: the folder or file to be written, without symbolic links; its parents are made.

    Raises:
        OSError: the parent folder cannot be written to.
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
    """Rename the finished folder `new` of a workspace to `path`.

    Args:
        work: the workspace.
        path: the path that the workspace was made for.
        check: allows an existing folder to be replaced. It is called with that folder after the folder has been moved
            aside, where no other process adds to it, and raises if the folder must stay. With None the name must be
            free, or belong to an empty folder.

    Returns:
        False if the name is taken by something that may not be replaced; that is left as it is.
    """
    _flush(work / NEW)
    shutil.rmtree(work / _OLD, ignore_errors=True)  # left by an earlier call that found the name taken
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
    """Write a file as UTF-8; a reader finds either the old text or the new one. The file's folder is made.

    Raises:
        OSError: the file cannot be written.
    """
    path = Path(os.path.realpath(path))
    with workspace(path) as work:
        with (work / NEW).open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(work / NEW, path)


def sweep(path: Path) -> None:
    """Remove the workspaces of `path` whose owners were killed."""
    for work in path.parent.glob(f".{glob.escape(path.name)}.{'[0-9a-f]' * 8}.tmp"):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):  # the workspace is gone, or its owner lives
            lock = os.open(work, _FOLDER)
            stack.callback(os.close, lock)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _clear(work, path)


def identity(path: Path) -> tuple[int, int] | None:
    """Return (device, inode), which tells a folder or file from a later one of that name; None if there is none.

    The answer is never taken between the two renames of `publish`.
    """
    with _locked(Path(os.path.realpath(path)).parent, fcntl.LOCK_SH), contextlib.suppress(OSError):
        found = os.stat(path)
        return found.st_dev, found.st_ino
    return None


def read_unreplaced(caller: str, folder: Path, read: Callable[[], T]) -> T:
    """Return what `read` gives for a folder. If the folder is replaced meanwhile, read once more.

    Raises:
        ValueError: the folder was replaced in both reads.
    """
    for _ in range(2):
        before = identity(folder)
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):  # while the folder is open, no other gets its inode
                stack.callback(os.close, os.open(folder, _FOLDER))
            try:
                result = read()
            except Exception:
                if identity(folder) == before:
                    raise
            else:
                if identity(folder) == before:
                    return result
                del result  # memory may not hold two models
    raise ValueError(f"{caller}: {folder} was replaced while it was read, and once more while it was read again")


def _make_locked(path: Path) -> tuple[Path, int]:
    while True:  # until the lock is held: before that, the sweep of another process may remove the folder
        work = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        work.mkdir()
        try:
            lock = os.open(work, _FOLDER)
        except FileNotFoundError:
            continue
        with contextlib.suppress(OSError):  # a file system without locks: sweeps remove nothing there either
            fcntl.flock(lock, fcntl.LOCK_EX)
        if work.exists():
            return work, lock
        os.close(lock)


def _clear(work: Path, path: Path) -> None:
    with _renaming(work, path):
        pass
    # `new` goes first: without it, no later sweep puts back what is left of `old`.
    shutil.rmtree(work / NEW, ignore_errors=True)
    shutil.rmtree(work, ignore_errors=True)


@contextlib.contextmanager
def _renaming(work: Path, path: Path) -> Iterator[None]:
    """Keep other processes from renaming in the parent folder; at the end, put `old` back if nothing replaced it."""
    with _locked(path.parent, fcntl.LOCK_EX):
        try:
            yield
        finally:
            if (work / _OLD).exists() and (work / NEW).exists() and not os.path.lexists(path):
                os.rename(work / _OLD, path)


@contextlib.contextmanager
def _locked(folder: Path, how: int) -> Iterator[None]:
    """Lock a folder for the length of two renames. After a second of waiting, go on without the lock."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # the folder is not readable, or the file system has no locks
            lock = os.open(folder, _FOLDER)
            stack.callback(os.close, lock)
            for _ in range(_LOCK_LOOKS):
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(lock, how | fcntl.LOCK_NB)
                    break
                time.sleep(_LOOK_SECONDS)
        yield


def _flush(folder: Path) -> None:
    """Write a folder's names to the disk."""
    with contextlib.ExitStack() as stack, contextlib.suppress(OSError):  # some file systems refuse
        descriptor = os.open(folder, _FOLDER)
        stack.callback(os.close, descriptor)
        os.fsync(descriptor)
