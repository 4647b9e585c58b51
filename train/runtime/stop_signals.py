"""Reasons to stop that all processes agree on: signals, a time limit, a failure on one rank, a launcher that is gone.

Each process notes what it has seen. Before each step, and between the batches of an evaluation, one all-reduce shares
it, so that all processes stop at the same step and can save together.

A changed parent id shows that the launcher is gone; it is read at the same points. PR_SET_PDEATHSIG would tell at once,
but only on Linux; it also fires when just the forking thread ends, and never if the launcher ended before the call.
"""

from __future__ import annotations

import signal
import socket
import time
from types import FrameType

from phi1.train.runtime.all_ranks import all_ranks
from phi1.train.runtime.engine import all_sum
from phi1.train.runtime.launch import Rank, RunError, time_left


class StopSignals:
    """Collects reasons to stop.

    Args:
        rank: this process; under torchrun it also stops when the launcher has died.
        time_limit: minutes since the launch, restarts included, after which all stop; 0 for none.
    """

    def __init__(self, rank: Rank, time_limit: float = 0.0) -> None:
        self.reason: str | None = None
        """This process's reason to stop; once all have agreed to stop, the reason of the first process that has one."""
        self.failure: RunError | None = None
        """Set if this process alone has failed; agreed_to_stop raises it once every process knows."""
        self.any_writes = False
        """True if any process, this one included, was writing a checkpoint when all last agreed."""
        self._rank = rank
        self._deadline = time.monotonic() + time_left(rank, time_limit)

    def note(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal: it is a request to stop.

        A second signal changes nothing: a terminal sends Ctrl-C to the workers, and torchrun sends them another one.
        """
        self.reason = signal.Signals(number).name

    def agreed_to_stop(self, writes: bool = False) -> bool:
        """Collective: return True if any process wants to stop.

        Args:
            writes: this process still writes a checkpoint; `any_writes` is set to True if any process does.

        Raises:
            RunError: a process has failed; every process raises the error of the first.
        """
        if self._rank.is_orphan():
            self.reason = self.reason or f"the end of torchrun on {socket.gethostname()}"
        if time.monotonic() > self._deadline:
            self.reason = self.reason or "run.time_limit"
        requests, failures, writers = all_sum(self.reason is not None, self.failure is not None, writes)
        self.any_writes = writers > 0
        if failures:
            raise RunError(self._first(str(self.failure) if self.failure else None))
        if requests:
            self.reason = self._first(self.reason)
        return requests > 0

    def _first(self, own: str | None) -> str:
        return next(text for text in all_ranks(lambda: own) if text is not None)
