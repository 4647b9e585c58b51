"""The folder in which a corpus is made: its space on the disk, and the names of a corpus's files."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from phi1 import atomic
from phi1.train.data.shards import DataError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_CORPUS_NAME = re.compile(r"manifest\.json|tokenizer|(train|val)-(\d+\.bin|documents\.npy)")


@contextlib.contextmanager
def workspace(out: Path, needed: int) -> Iterator[Path]:
    """Open a workspace of `phi1.atomic` for a corpus.

    Args:
        out: the future folder, without symbolic links.
        needed: upper limit of the bytes that it takes; 0 if not known.

    Raises:
        DataError: nothing can be written there, or the disk has too little room, now or later.
    """
    with contextlib.ExitStack() as stack:
        try:
            folder = stack.enter_context(atomic.workspace(out))
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


def foreign_file(folder: Path) -> str | None:
    """Return the name of something in a folder that is not part of a corpus; None if there is nothing."""
    return next((name for name in sorted(os.listdir(folder)) if not _CORPUS_NAME.fullmatch(name)), None)


def chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and the errors that caused it."""
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
