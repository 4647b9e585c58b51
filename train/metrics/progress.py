"""Rank 0's display of a running training: a live line on a terminal, a plain line every 10 s elsewhere."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from typing import Any, TextIO, cast

from rich.console import Console
from rich.live import Live
from rich.text import Text

from phi1.train.runtime.launch import say

PLAIN_SECONDS = 10.0


class _Terminal:
    """A terminal's stream that drops what it cannot write, because the terminal may be closed."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()


class Progress:
    """Loss, tokens/s and time left.

    Args:
        steps: of the whole run.
        finished: steps that were finished before.
        tokens: of a step, over all processes.
        silent: show nothing, as on all ranks but the first.
    """

    def __init__(self, steps: int, finished: int, tokens: int, silent: bool = False) -> None:
        self.steps, self.first, self.tokens, self.silent = steps, finished, tokens, silent
        self.seconds = 0.0
        """Time spent in steps, without saving and evaluating."""
        self.loss = float("nan")
        self._last_plain = time.monotonic()
        self._live: Live | None = None
        if not silent and sys.stdout.isatty():
            console = Console(file=cast(TextIO, _Terminal(sys.stdout)), highlight=False)
            self._live = Live(console=console, refresh_per_second=4, transient=True)
            self._live.start()

    def step(self, finished: int, loss: float, seconds: float) -> None:
        """Note a step, and show it if a line is due."""
        self.seconds += seconds
        # A running mean over about 20 steps, since a single batch's loss is too noisy.
        self.loss = loss if self.loss != self.loss else 0.95 * self.loss + 0.05 * loss
        if self._live:
            self._live.update(Text(self._line(finished)))
        elif not self.silent and (time.monotonic() - self._last_plain >= PLAIN_SECONDS or finished == self.steps):
            self._last_plain = time.monotonic()
            self.say(self._line(finished))

    def tokens_per_s(self, finished: int) -> float:
        """Return the mean speed over the steps of this process."""
        return (finished - self.first) * self.tokens / self.seconds if self.seconds else 0.0

    def say(self, text: str) -> None:
        """Print a line that stays."""
        if self._live:
            self._live.console.print(text, markup=False, soft_wrap=True)
        elif not self.silent:
            try:
                say(text)
            except BrokenPipeError:  # the reader has gone away; the run continues without it
                self.silent = True

    def close(self) -> None:
        """Give the terminal back."""
        if self._live:
            self._live.stop()
            self._live = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *details: Any) -> None:
        self.close()

    def _line(self, finished: int) -> str:
        left = (self.steps - finished) * self.seconds / max(1, finished - self.first)
        return (f"step {finished:,}/{self.steps:,}  loss {self.loss:.3f}  {self.tokens_per_s(finished):,.0f} tokens/s  "
                f"{duration(left)} left")


def duration(seconds: float) -> str:
    """Format as 1:02:03 or 2:03."""
    hours, rest = divmod(round(seconds), 3600)
    minutes, rest = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
