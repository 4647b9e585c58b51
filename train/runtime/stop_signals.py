"""How processes agree to stop: signals, a time limit, failures on one rank, and a launcher that is gone.

Each process notes what it has seen; before each step, and between the batches of an evaluation, one all-reduce makes it
common knowledge, so that all stop at the same step and can save together.

That the launcher is gone shows in the parent's id, asked for at the same points: it is no longer the one at the start.
PR_SET_PDEATHSIG would tell it at once, but only on Linux, also when no more than the thread that forked has ended, and
never if the launcher ended before it was set.
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
        rank: this process; under torchrun it also stops when the launcher has died, which would orphan it.
        time_limit: minutes since the launch, restarts included, after which all stop; 0 for none.
    """

    def __init__(self, rank: Rank, time_limit: float = 0.0) -> None:
        self.signal_name: str | None = None
        self.failure: RunError | None = None
        """Set where this process alone has failed; it is raised here once every process knows."""
        self.any_writes = False
        """Whether any process, this one included, wrote a checkpoint when all last agreed."""
        self._rank = rank
        launched = time.monotonic() - _age(rank.launcher or os.getpid())
        self._deadline = launched + 60 * time_limit if time_limit else math.inf

    def note(self, number: int, frame: FrameType | None) -> None:
        """Take a signal for the wish to stop.

        A second one is the same wish: a terminal sends Ctrl-C to the workers, and torchrun sends them another one.
        """
        self.signal_name = signal.Signals(number).name

    def agreed_to_stop(self, writes: bool = False) -> bool:
        """Collective: whether any process wants to stop.

        Args:
            writes: whether this process still writes a checkpoint; `any_writes` then says whether any does.

        Raises:
            RunError: a process has failed. On the others it says no more than that.
        """
        if self._rank.is_orphan():
            self.signal_name = self.signal_name or "the end of torchrun"
        if time.monotonic() > self._deadline:
            self.signal_name = self.signal_name or "run.time_limit"
        wishes, failures, writers = all_sum(self.signal_name is not None, self.failure is not None, writes)
        self.any_writes = writers > 0
        if failures:
            raise self.failure or RunError("another process has failed")
        return wishes > 0


def _age(process: int) -> float:
    """Seconds since a process was started; 0 where the system does not say."""
    try:
        started = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):
        return 0.0
