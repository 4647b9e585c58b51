"""Reasons to stop that all processes agree on: signals, a time limit, a failure on one rank, a launcher that is gone.

Each process notes what it has seen. Before each step, and between the batches of an evaluation, one all-reduce shares
it, so that all processes stop at the same step and can save together.

A changed parent id shows that the launcher is gone; it is read at the same points. PR_SET_PDEATHSIG would tell at once,
but only on Linux; it also fires when just the forking thread ends, and never if the launcher ended before the call.
"""

from __future__ import annotations

import math
import os
import signal
import time
from pathlib import Path
from types import FrameType

from phi1.train.runtime.engine import all_sum
from phi1.train.runtime.launch import Rank, RunError


class StopSignals:
    """Collects reasons to stop.

    Args:
        rank: this process; under torchrun it also stops when the launcher has died.
        time_limit: minutes since the launch, restarts included, after which all stop; 0 for none.
    """

    def __init__(self, rank: Rank, time_limit: float = 0.0) -> None:
        self.signal_name: str | None = None
        self.failure: RunError | None = None
        """Set if this process alone has failed; agreed_to_stop raises it once every process knows."""
        self.any_writes = False
        """True if any process, this one included, was writing a checkpoint when all last agreed."""
        self._rank = rank
        launched = time.monotonic() - _age(rank.launcher or os.getpid())
        self._deadline = launched + 60 * time_limit if time_limit else math.inf

    def note(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal: it is a request to stop.

        A second signal changes nothing: a terminal sends Ctrl-C to the workers, and torchrun sends them another one.
        """
        self.signal_name = signal.Signals(number).name

    def agreed_to_stop(self, writes: bool = False) -> bool:
        """Collective: return True if any process wants to stop.

        Args:
            writes: this process still writes a checkpoint; `any_writes` is set to True if any process does.

        Raises:
            RunError: a process has failed. The message names the reason on that process alone.
        """
        if self._rank.is_orphan():
            self.signal_name = self.signal_name or "the end of torchrun"
        if time.monotonic() > self._deadline:
            self.signal_name = self.signal_name or "run.time_limit"
        requests, failures, writers = all_sum(self.signal_name is not None, self.failure is not None, writes)
        self.any_writes = writers > 0
        if failures:
            raise self.failure or RunError("another process has failed")
        return requests > 0


def _age(process: int) -> float:
    """Return the seconds since a process was started; 0 if the system does not say."""
    try:
        started = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):
        return 0.0
