"""Processes that are stopped: they clear up, and do not outlive the one that started them."""

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
    """Inside the block SIGTERM raises KeyboardInterrupt, so that what has begun is cleared up."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


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
