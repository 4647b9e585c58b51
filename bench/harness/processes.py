"""Processes that are stopped: they clear up, and do not outlive the one that started them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # only there: help does without it
    from multiprocessing.connection import Connection


@contextlib.contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """Inside the block SIGTERM raises KeyboardInterrupt, so that what has begun is cleared up."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def signals_later() -> Iterator[None]:
    """What SIGINT and SIGTERM do is done at the end of the block."""
    came: list[int] = []
    before = {number: signal.signal(number, lambda number, frame: came.append(number))
              for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for missed in came:
            signal.raise_signal(missed)


def end_session(process: subprocess.Popen[bytes], seconds: float) -> None:
    """Kill a process that was started in a session of its own, and all in that, whatever their process groups.

    It returns when none of them can write any more, or the seconds are over.
    """
    end = time.monotonic() + seconds
    while (running := _running(process.pid)) and time.monotonic() < end:  # again, as they may have begun others
        for pid in running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)  # a kill is not at once where a disk is busy
    process.wait()


def _running(session: int) -> list[int]:
    """The processes of a session that run; one that is dead and not reaped does not."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # ended meanwhile
            state, _, _, its_session = stat.read_text(errors="replace").rpartition(")")[2].split()[:4]
            if int(its_session) == session and state not in "ZX":
                found.append(int(stat.parent.name))
    return found


def end_with_parent(pipe: int = 0) -> None:
    """End this process when its parent ends, even if that is killed.

    Args:
        pipe: descriptor of one that the parent alone can write to, and never does; standard input by default.
    """
    def wait() -> None:
        os.read(pipe, 1)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def begin_worker(ended: Connection) -> None:
    """The initializer of a pool's processes, of which their parent alone says when they end, at Ctrl-C too.

    Args:
        ended: their end of a pipe; the parent keeps the other one open, and writes nothing to it.
    """
    # Not ignored, or what they run would ignore it as well.
    signal.signal(signal.SIGINT, lambda number, frame: None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    end_with_parent(os.dup(ended.fileno()))
