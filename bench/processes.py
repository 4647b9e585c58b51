"""Processes that are stopped: they clear up, and do not outlive the one that started them."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator


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


def begin_worker() -> None:
    """The initializer of a pool's processes, which end with their parent, and at Ctrl-C without a traceback each."""
    from multiprocessing import parent_process  # only here: help does without it

    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = parent_process()
    assert parent is not None
    end_with_parent(parent.sentinel)
