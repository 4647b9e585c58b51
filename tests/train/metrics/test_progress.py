"""The output of a run: a live line on rank 0's terminal, plain lines elsewhere, and nothing from the other ranks."""

import contextlib
import io
import os
import re
import sys
import time

import pytest

from phi1.train.metrics import progress as progress_module
from phi1.train.metrics.progress import Progress, duration


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def shown(monkeypatch):
    def show(stream, silent=False):
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", "100")
        with Progress(10, 0, 100, silent) as progress:
            for step in (1, 2):
                progress.step(step, 2.5, 0.5)
                time.sleep(0.3 if stream.isatty() and not silent else 0)  # the line is drawn four times a second
            progress.say("a line that stays")
        return stream.getvalue()
    return show


def test_rank_0_shows_a_live_line_on_a_terminal(shown):
    text = shown(Terminal())
    assert "step 2/10  loss 2.500  200 tokens/s  0:04 left" in text
    assert "a line that stays\n" in text.replace("\r", "")
    assert re.search(r"\x1b\[2K", text), "the live line is drawn over"


def test_a_terminal_that_goes_away_ends_nothing(monkeypatch):
    (here, there), ended = os.openpty(), False
    monkeypatch.setenv("TERM", "xterm")
    # Closing the terminal's file may raise for unwritten output, which is the test's own error.
    with contextlib.suppress(OSError), open(there, "w") as terminal, monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", terminal)
        with Progress(10, 0, 100) as progress:
            progress.say("one")
            os.close(here)
            with pytest.raises(OSError, match="Input/output error"):
                os.write(there, b"two")
            progress.step(1, 2.5, 0.5)
            progress.say("two")
        ended = True
    assert ended


def test_elsewhere_it_says_a_line_now_and_then(shown, monkeypatch):
    assert shown(io.StringIO()) == "a line that stays\n"
    monkeypatch.setattr(progress_module, "PLAIN_SECONDS", 0.0)
    assert shown(io.StringIO()).splitlines() == ["step 1/10  loss 2.500  200 tokens/s  0:04 left",
                                                "step 2/10  loss 2.500  200 tokens/s  0:04 left", "a line that stays"]


def test_other_ranks_show_nothing(shown):
    assert shown(Terminal(), silent=True) == ""
    assert shown(io.StringIO(), silent=True) == ""


def test_durations():
    assert [duration(seconds) for seconds in (0, 59.6, 3599, 3600, 90061)] == ["0:00", "1:00", "59:59", "1:00:00",
                                                                            "25:01:01"]


def test_the_figures_of_a_resumed_run_are_of_its_own_steps(capsys, monkeypatch):
    monkeypatch.setattr(progress_module, "PLAIN_SECONDS", 0.0)
    with Progress(steps=20, finished=10, tokens=300) as progress:
        for step, loss in ((11, 4.0), (12, 3.0), (13, 3.0)):
            progress.step(step, loss, 0.5)
    assert progress.tokens_per_s(13) == 3 * 300 / 1.5
    assert progress.loss == pytest.approx(0.95 * (0.95 * 4 + 0.05 * 3) + 0.05 * 3)
    assert capsys.readouterr().out.splitlines()[-1] == "step 13/20  loss 3.902  600 tokens/s  0:04 left"
