"""How processes agree to stop: signals, failures on one rank, and a launcher that is gone.

Each process notes what it has seen; before each step, and between the batches of an evaluation, one all-reduce makes it
common knowledge, so that all stop at the same step and can save together.
"""

from __future__ import annotations

import os
import signal
from types import FrameType

from phi1.train.engine import all_sum
from phi1.train.launch import Place, RunError

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Control:
    """Collects reasons to stop.

    Args:
        place: this process; under torchrun it also stops when the launcher has died, which would orphan it.
    """

    def __init__(self, place: Place) -> None:
        self.signal_name: str | None = None
        self.failure: RunError | None = None
        self.any_writes = False
        """Whether any process, this one included, wrote a checkpoint when all last agreed."""
        self._parent = os.getppid() if place.under_torchrun else None

    def listen(self) -> None:
        """From now on SIGINT, SIGTERM and SIGUSR1 ask for a stop instead of ending the process.

        A second signal is the same wish: a terminal sends Ctrl-C to the workers, and torchrun sends them another one.
        """
        for number in SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal_name = signal.Signals(number).name

    def fail(self, error: RunError) -> None:
        """Note a failure of this process alone; it is raised here once every process knows."""
        self.failure = self.failure or error

    def agreed_to_stop(self, writes: bool = False) -> bool:
        """Collective: whether any process wants to stop.

        Args:
            writes: whether this process still writes a checkpoint; `any_writes` then says whether any does.

        Raises:
            RunError: a process has failed. On the others it says no more than that.
        """
        if self._parent is not None and os.getppid() != self._parent:
            self.signal_name = self.signal_name or "the end of torchrun"
        wishes, failures, writers = all_sum(self.signal_name is not None, self.failure is not None, writes)
        self.any_writes = writers > 0
        if failures:
            raise self.failure or RunError("another process has failed")
        return wishes > 0

    @staticmethod
    def ignore() -> None:
        """Signals end the process again: nothing that a stop would have to save is left."""
        for number in SIGNALS:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
