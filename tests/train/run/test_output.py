"""Runs whose output cannot be written: to a full disk, or to a reader that has gone away."""

import io
import os
import subprocess
import sys
from contextlib import contextmanager, suppress

import pytest
import torch
from training_runs import command

from phi1.train.metrics.ledger import Ledger
from phi1.train.metrics.progress import Progress
from phi1.train.recipe.file import read_recipe, show_help
from phi1.train.run.corpus import prepare_data
from phi1.train.run.folder import RunFolder
from phi1.train.run.report import Reached, show_complete, show_summary
from phi1.train.run.run import weights_of_best
from phi1.train.runtime import launch
from phi1.train.runtime.launch import GO_ON, Rank, RunError, leave, say, stop_with

pytestmark = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")


class Ended(Exception):
    """Raised in place of the end of this process."""


@contextmanager
def full(monkeypatch):
    """Put standard output and standard error on a full disk, and let the end of the process raise Ended."""
    def end(code):
        raise Ended(code)

    with monkeypatch.context() as patched, open("/dev/full", "w") as out, open("/dev/full", "w", buffering=1) as err:
        patched.setattr(sys, "stdout", out)
        patched.setattr(sys, "stderr", err)
        patched.setattr(launch.os, "_exit", end)
        yield
        for file in (out, err):  # buffered output cannot be written
            with suppress(OSError):
                file.close()


class Gone(io.StringIO):
    """A stream whose reader has gone away."""

    def flush(self):
        raise BrokenPipeError


@pytest.mark.parametrize("code", [0, 130])
def test_a_process_whose_output_is_lost_ends_as_it_would(monkeypatch, code):
    with full(monkeypatch):
        say("a line")
        say("another", sys.stderr)
        with pytest.raises(Ended, match=f"^{code}$"):
            leave(code)


def test_a_refusal_that_cannot_be_printed_has_the_same_exit_code(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    with full(monkeypatch):
        say("a line")
        with pytest.raises(Ended, match=r"^2$"):
            stop_with("no such key", Rank())
    assert "pretrain: error: no such key" in (tmp_path / "error.json").read_text()


def test_help_that_cannot_be_printed_is_an_error(monkeypatch):
    with full(monkeypatch), pytest.raises(RunError, match=r"^--help: No space left on device$"):
        show_help("What it does.", None)


def test_a_reader_that_has_gone_away_is_141_and_ends_no_training(monkeypatch):
    monkeypatch.setattr(sys, "stdout", Gone())
    monkeypatch.setattr(launch.os, "_exit", sys.exit)
    with pytest.raises(SystemExit, match="141"):
        leave(0)
    with pytest.raises(BrokenPipeError):
        say("a line")
    with pytest.raises(BrokenPipeError):
        show_help("What it does.", None)
    say("a line", Gone())
    with Progress(10, 0, 100) as progress:
        progress.say("a line")
        assert progress.silent


def test_progress_is_shown_again_once_there_is_space(monkeypatch):
    class Filling(io.StringIO):
        def flush(self):
            if len(self.getvalue().splitlines()) == 1:
                raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys, "stdout", Filling())
    with Progress(10, 0, 100) as progress:
        progress.say("one")
        progress.say("two")
    assert sys.stdout.getvalue() == "one\ntwo\n"


def test_the_watchdog_ends_a_hang_that_it_cannot_report():
    with open("/dev/full", "w") as out:
        code = "from phi1.train.runtime.watchdog import _end\n_end('it hangs')"
        done = subprocess.run([sys.executable, "-c", code], stderr=out)
    assert done.returncode == GO_ON


def test_a_summary_a_warning_or_a_choice_that_cannot_be_printed_is_no_error(tmp_path, monkeypatch):
    reached = Reached(60, 2.5, 1.25, 1.5, 4000, 15_360, 900.0, 17.0, 0)
    (tmp_path / "ledger.jsonl").write_text("{]\n")
    last = {"head.bias": torch.zeros(1)}
    with full(monkeypatch):
        show_summary(reached, RunFolder(tmp_path), ["def f():"])
        show_complete(vars(reached), RunFolder(tmp_path), Rank())
        Ledger(tmp_path / "ledger.jsonl", 5).close()
        assert weights_of_best(tmp_path / "step-3", last, "the best by validation") is last


def test_a_preparation_that_cannot_print_its_progress_goes_on(tmp_path, monkeypatch):
    def prepare(*_, report, **__):
        report("half")
        raise ValueError("its own mistake")

    monkeypatch.setattr("phi1.train.prepare.prepare.prepare", prepare)
    with full(monkeypatch), pytest.raises(RunError, match="its own mistake"):
        prepare_data(read_recipe(None, {"data.folder": str(tmp_path / "new")}))


@pytest.mark.slow
def test_a_run_whose_output_is_lost_trains_exports_and_succeeds(place):
    for _ in range(2):  # the second time it is complete
        with open("/dev/full", "w") as out:
            done = subprocess.run(command("unheard", train__steps=4, train__warmup_steps=1), cwd=place, stdout=out,
                                  stderr=subprocess.PIPE, text=True, timeout=300)
        assert (done.returncode, done.stderr) == (0, "")
        assert (place / "unheard" / "summary.json").exists()
