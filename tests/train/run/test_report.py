"""The report of a finished run, also when memory is short."""

import json
import lzma
import os
import resource
from contextlib import contextmanager
from pathlib import Path

import pytest

from phi1.config import preset
from phi1.train.evaluate.validation import xz_bits_per_byte
from phi1.train.run import report
from phi1.train.run.folder import RunFolder
from phi1.train.run.report import (
    Reached,
    export,
    show_complete,
    show_completions,
    show_summary,
    write_summary,
)
from phi1.train.runtime.launch import Rank, RunError

SOURCE = Path(os.__file__).read_bytes() + Path(json.__file__).read_bytes()


@contextmanager
def memory(megabytes):
    """Limit the address space to its present size and some megabytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (megabytes << 20), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize("text", [SOURCE, SOURCE[:5000], b"a" * 70_000, os.urandom(70_000), b"x"],
                         ids=["code", "little", "the same", "noise", "a byte"])
def test_xz_is_xz_9_to_the_byte(text):
    assert xz_bits_per_byte(text) == 8 * len(lzma.compress(text, preset=9)) / len(text)


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")
def test_xz_needs_memory_by_the_text_and_gives_up_without():
    with memory(64):
        assert xz_bits_per_byte(SOURCE[:50_000] * 20) is not None
        assert xz_bits_per_byte(os.urandom(16 << 20)) is None  # which takes 170 MB


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path)


REACHED = Reached(60, 2.5, 1.25, None, 4000, 15_360, 900.0, 17.0, 0)


def test_a_run_without_xz_is_complete(folder, capsys):
    folder.export.mkdir()
    write_summary(REACHED, folder)
    show_summary(REACHED, folder, [])
    show_complete(folder.completed(60), folder, Rank())
    summed_up, again = capsys.readouterr().out.split(f"{folder.path} is complete: ")
    assert "1.2500 on 4,000 held-out bytes; xz -9 on the same bytes not known, for want of memory\n" in summed_up
    assert again.startswith("60 steps, validation loss 2.5000, 1.2500 bits per byte (xz -9 not known, for want of mem")


@pytest.mark.parametrize(("error", "message"), [
    (MemoryError(), "not enough memory"), (RuntimeError("DefaultCPUAllocator: not 8 bytes"), "DefaultCPUAllocator: no"),
    (OSError(28, "No space left on device"), "[Errno 28] No space"),
])
def test_an_export_that_cannot_be_written_is_one_line(folder, monkeypatch, error, message):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr("phi1.weights.huggingface.save_state_dict", fails)
    with pytest.raises(RunError) as raised:
        export({}, preset("nano"), None, folder, 60)
    assert str(raised.value).startswith(f"{folder.export}: {message}")
    assert str(raised.value).endswith("; the same command goes on from the newest checkpoint")


def test_completions_without_enough_memory_are_left_out(folder, monkeypatch, capsys):
    def fails(*_, **__):
        raise MemoryError

    monkeypatch.setattr(report.phi1, "load", fails)
    show_completions(folder, ["def f():"], 1)
    assert capsys.readouterr().out.endswith(":\n\nnot made, for want of memory\n\n")


def test_our_own_mistake_is_not_reported_as_a_lack_of_memory(folder, monkeypatch):
    def fails(*_, **__):
        raise TypeError("a mistake")

    monkeypatch.setattr(report.phi1, "load", fails)
    monkeypatch.setattr("phi1.weights.huggingface.save_state_dict", fails)
    with pytest.raises(TypeError):
        show_completions(folder, ["def f():"], 1)
    with pytest.raises(TypeError):
        export({}, preset("nano"), None, folder, 60)
