"""A watchdog: it ends a process that hangs, and writes a heartbeat file for observers of the run.

A thread watches, so that the training itself pays nothing. A process that has not reported for `limit` seconds prints
its rank, its activity and the stacks of its threads, and ends; it may hang itself, or wait for one that does. torchrun
then ends the others, and restarts all of them if it was given --max-restarts.

Only the time in which the thread could run counts, so a run that was suspended (Ctrl-Z, a batch system) continues when
it wakes. If one process alone is stopped, the processes that wait for it end the run.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from phi1.train.runtime.launch import GO_ON, say

HEARTBEAT_SECONDS = 5.0


class Watchdog:
    """Watches while its `with` block runs.

    Args:
        rank: of this process.
        limit: seconds without a report after which the process ends; 0 for never.
        heartbeat: file rewritten every few seconds with the process's activity; None for none.
        end: called instead of ending the process, for tests.
    """

    def __init__(self, rank: int, limit: float, heartbeat: Path | None = None,
                 end: Callable[[str], None] | None = None) -> None:
        self.rank, self.limit, self.heartbeat = rank, limit, heartbeat
        self._report = ("the start",)
        self._end = end or _end
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def report(self, doing: str) -> None:
        """Say what begins now, for example "step 7"."""
        self._report = (doing,)  # a new object each time, by which the thread notices a new report

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._over.set()
        self._thread.join()
        self._beat("ended" if error is None else f"ended by {str(error) or type(error).__name__}", 0.0)

    def _watch(self) -> None:
        pause = min(HEARTBEAT_SECONDS, self.limit / 4) if self.limit else HEARTBEAT_SECONDS
        last, silent = self._report, 0.0
        while True:
            self._beat(*last, silent)
            if self.limit and silent >= self.limit:
                # The message is the same for a rank that waits in a collective; the stacks tell the two apart.
                self._end(f"rank {self.rank} has been in {last[0]} for {silent:.0f} s, where run.watchdog allows "
                          f"{self.limit:g}: it hangs, or waits for a rank that does; its threads:")
            if self._over.wait(pause):
                return
            report = self._report
            last, silent = report, silent + pause if report is last else 0.0

    def _beat(self, doing: str, silent: float) -> None:
        if self.heartbeat is None:
            return
        now = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "pid": os.getpid(), "doing": doing,
               "for_seconds": round(silent, 1)}
        temporary = self.heartbeat.with_suffix(".tmp")
        with suppress(OSError):  # checkpoints and the ledger report a full disk
            temporary.write_text(json.dumps(now) + "\n", encoding="utf-8")
            temporary.replace(self.heartbeat)


def _end(message: str) -> NoReturn:
    say(f"{Path(sys.argv[0]).stem}: error: {message}", sys.stderr)
    faulthandler.dump_traceback(sys.stderr, all_threads=True)
    os._exit(GO_ON)
