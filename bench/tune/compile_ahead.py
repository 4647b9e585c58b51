"""Compile a search's candidates ahead, in several processes, so that the search finds all of them compiled."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import IO


def compile_ahead(command: Sequence[str], count: int, seconds: float) -> str:
    """Run a command `count` times side by side, each with its `--compile-share I/COUNT`. None outlives this call.

    Returns:
        A line on the processes that failed, "" if none did.
    """
    end = time.monotonic() + seconds
    workers: list[subprocess.Popen[bytes]] = []
    with ExitStack() as stack:
        logs = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(count)]
        theirs, ours = os.pipe()  # nothing is written: its end tells them that this process is there no more
        stack.callback(os.close, ours)
        stack.callback(os.close, theirs)
        try:
            for i, log in enumerate(logs):
                workers.append(subprocess.Popen([*command, "--compile-share", f"{i}/{count}"], stdin=theirs,
                                                stdout=subprocess.DEVNULL, stderr=log))
            complaints = [_complaint(worker, log, end) for worker, log in zip(workers, logs, strict=True)]
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
    failed = [complaint for complaint in complaints if complaint]
    return f"{len(failed)} of {count} processes that compile ahead failed: {failed[-1]}" if failed else ""


def _complaint(worker: subprocess.Popen[bytes], log: IO[str], end: float) -> str:
    """Wait for a process; the last line that it wrote if it failed, "" if it did not."""
    try:
        code = worker.wait(max(1.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        worker.kill()
        worker.wait()
        return "killed, as its time was up"
    log.seek(0)
    lines = [line.strip() for line in log if line.strip()]
    return (lines or [f"exit code {code}"])[-1] if code else ""
