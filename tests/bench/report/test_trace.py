"""Traces are written whole or not at all, and never in the place of something else."""

import gzip
import json
import os
import sys

import pytest
import torch

from phi1.bench.gpu import counters
from phi1.bench.report import trace
from phi1.bench.report.trace import kind_of, our_kernels
from phi1.cli.main import main
from phi1.train.metrics.profiling import Profiler, write_trace

TRACE = ["bench", "trace", "--unit", "gelu", "--device", "cpu", "--out"]


@pytest.fixture
def recorded():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for _ in range(40):
            torch.ones(3).sum()
    return profiler


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("name", ["t.json", "t.json.gz"])
def test_a_trace_takes_the_place_of_the_one_before(recorded, tmp_path, name):
    path = tmp_path / name
    path.write_text("before")
    write_trace(recorded, path)
    data = path.read_bytes()
    assert json.loads(gzip.decompress(data) if name.endswith(".gz") else data)["traceEvents"]
    assert names(tmp_path) == [name]


@pytest.mark.parametrize("name", ["t.json", "t.json.gz"])
def test_a_full_disk_leaves_what_was_there(recorded, tmp_path, full_disk, name):
    path = tmp_path / name
    path.write_text("before")
    with full_disk(), pytest.raises(OSError, match="has not written all of the trace; the disk may be full"):
        write_trace(recorded, path)
    assert path.read_text() == "before"
    assert names(tmp_path) == [name]


def test_a_trace_through_a_link_leaves_the_link(recorded, tmp_path):
    (tmp_path / "link.json").symlink_to(tmp_path / "t.json")
    write_trace(recorded, tmp_path / "link.json")
    assert (tmp_path / "link.json").is_symlink()
    assert (tmp_path / "t.json").stat().st_size


def other_than_files(folder):
    (folder / "whole").mkdir()
    (folder / "whole" / "x").touch()
    (folder / "empty").mkdir()
    os.mkfifo(folder / "pipe")
    return ["whole", "empty", "pipe"]


@pytest.mark.parametrize("number", range(3))
def test_what_is_no_file_is_refused_before_anything_runs(tmp_path, capsys, monkeypatch, number):
    monkeypatch.setattr(trace, "record", lambda *arguments: pytest.fail("it ran"))
    path = tmp_path / other_than_files(tmp_path)[number]
    before = path.lstat().st_mode, path.lstat().st_ino
    assert main([*TRACE, str(path)]) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"phi1 bench trace: error: {path}: a trace cannot take the place of what is no regular "
                              "file\n")
    assert (path.lstat().st_mode, path.lstat().st_ino) == before
    assert names(tmp_path) == ["empty", "pipe", "whole"]


def test_a_trace_that_is_not_written_is_one_line(tmp_path, capsys, full_disk):
    with full_disk():
        assert main([*TRACE, str(tmp_path / "t.json")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith(f"{tmp_path}/t.json: the profiler has not written all of the trace; the disk may be full\n")
    assert names(tmp_path) == []


def test_a_trainer_says_that_its_trace_was_not_written_and_goes_on(tmp_path, full_disk):
    said = []
    profiler = Profiler(range(1, 2), tmp_path, said.append)
    with full_disk(), profiler.step(1):
        for _ in range(40):
            torch.ones(3).sum()
    assert said[-1] == ("warning: the trace of steps 1 to 1 could not be written: the profiler has not written all of "
                        "the trace; the disk may be full; the run goes on")
    assert names(tmp_path) == []


def test_the_gpu_scripts_trace_is_refused_in_one_line(tmp_path, capsys, monkeypatch):
    (tmp_path / "trace.json").mkdir()
    monkeypatch.setattr(trace, "record", lambda *arguments: pytest.fail("it ran"))
    monkeypatch.setattr(sys, "argv", ["counters.py", "--rehearse", "--out", str(tmp_path)])
    assert counters.main() == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert f"counters: error: {tmp_path}/trace.json: a trace cannot take the place of what is no regular" in err


def test_backward_nodes_of_our_operations_are_ours():
    for name in ("GeneratedBackwardFor_phi1_gelu_defaultBackward",
                 "autograd::engine::evaluate_function: GeneratedBackwardFor_phi1_gelu_defaultBackward"):
        assert kind_of(name) == "phi1"
    assert kind_of("GeneratedBackwardFor_other_gelu_defaultBackward") == "other"


def test_counters_are_those_of_the_kernels_of_our_sources_alone(tmp_path, monkeypatch, capsys):
    """Others' Triton kernels have names of the same form."""
    ours = sorted(our_kernels())
    names = [ours[0], "_theirs_kernel", "phi1::gelu", *ours[1:4], "ampere_fp16_s16816gemm"]
    lines = [trace.Line(name, kind_of(name), 10.0 - i, 1) for i, name in enumerate(names)]
    monkeypatch.setattr(trace, "record", lambda *arguments: lines)
    assert counters.slowest(tmp_path, "cpu") == ours[:3]
    assert "_theirs_kernel" in capsys.readouterr().out
