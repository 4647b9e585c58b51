"""What a run tells of itself while it goes: to its watchdog, on the terminal, and on rank 0 in the ledger."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from phi1.train.metrics.ledger import Ledger
from phi1.train.metrics.mfu import Mfu
from phi1.train.metrics.progress import Progress
from phi1.train.runtime.launch import RunError
from phi1.train.runtime.watchdog import Watchdog
from phi1.train.step.trainer import Outcome


@dataclass(frozen=True)
class Monitor:
    """The places that a run reports to.

    Args:
        watchdog: told what begins.
        progress: silent on all ranks but the first.
        ledger: rank 0's; None on the others.
        mfu: turns speed into MFU.
    """

    watchdog: Watchdog
    progress: Progress
    ledger: Ledger | None
    mfu: Mfu

    def begin(self, what: str) -> None:
        """Tell the watchdog what begins now."""
        self.watchdog.report(what)

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self.progress.say(text)

    def record(self, write: Callable[[Ledger], None]) -> None:
        """Write to the ledger, if this rank has one."""
        if ledger := self.ledger:
            self.attempt(lambda: write(ledger))

    def attempt(self, action: Callable[[], None]) -> None:
        """Do something that the training can do without: an error is printed, and the run goes on."""
        try:
            action()
        except RunError as error:
            self.say(f"warning: {error}; the run goes on")

    def step(self, outcome: Outcome, seconds: float, memory_gib: float) -> None:
        """Show and record a step."""
        speed = self.progress.tokens / seconds
        measured = {"tokens_per_s": speed, "seconds": seconds, "memory_gib": memory_gib, **self.mfu.of(speed)}
        self.progress.step(outcome.step, outcome.loss, seconds)
        self.record(lambda ledger: ledger.step(outcome, measured))
