"""Processes that clear up when they are stopped, and that do not outlive their parent."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # only there: help does without it
    from multiprocessing.connection import Connection


@contextlib.contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """Let SIGTERM raise KeyboardInterrupt inside the block, so that the caller clears up."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def end_with_parent(pipe: int = 0) -> None:
    """End this process when its parent ends, even if the parent is killed.

    Args:
        pipe: descriptor of a pipe that only the parent can write to, and never does; standard input by default.
    """
    def wait() -> None:
        os.read(pipe, 1)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def begin_worker(ended: Connection) -> None:
    """Initialise a process of a pool: Ctrl-C does not end it, the end of its parent does.

    Args:
        ended: the reading end of a pipe. The parent keeps the other end open and writes nothing to it.
    """
    # Not ignored, or what they run would ignore it as well.
    signal.signal(signal.SIGINT, lambda number, frame: None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    end_with_parent(os.dup(ended.fileno()))
