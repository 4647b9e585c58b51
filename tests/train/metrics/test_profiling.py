"""Traces of steps, and the report of a run that is out of memory."""

import gzip
import json
import mmap
import re
import subprocess
from types import SimpleNamespace

import pytest
import torch
from training_runs import SCRIPT, command, error_line, run, steps, train

from phi1.train.metrics.profiling import Profiler, profiled_steps
from phi1.train.plan.out_of_memory import explained
from phi1.train.recipe.file import read_recipe
from phi1.train.runtime.engine import Engine
from phi1.train.runtime.launch import Rank, RunError


def test_steps_to_profile_are_read():
    assert profiled_steps("", 9) == range(0)
    assert profiled_steps("7", 9) == range(7, 8)
    assert profiled_steps("7-9", 9) == range(7, 10)
    for text in ("0", "9-10", "3-2", "3-", "x", "1,2", "1--2"):
        with pytest.raises(RunError, match=r"run\.profile must be a step such as 7, or steps such as 7-9, from 1 to 9"):
            profiled_steps(text, 9)


def test_a_trace_of_some_steps_is_written_and_summarised(place, uninterrupted):
    words = [*command("traced", 2, train__steps=4, train__schedule_steps=60, checkpoint__every=0), "--profile", "2-3"]
    done = subprocess.run(words, cwd=place, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("training nano") == done.stdout.count("ms a step") == 1  # by rank 0
    assert [path.name for path in (place / "traced").glob("trace*")] == ["trace-2-3.json.gz"]
    trace = json.loads(gzip.decompress((place / "traced" / "trace-2-3.json.gz").read_bytes()))
    names = [event.get("name") for event in trace["traceEvents"]]
    assert names.count("step 2") == names.count("step 3") == 1
    assert "step 1" not in names
    assert "step 4" not in names
    assert "the trace of steps 2 to 3 is in traced/trace-2-3.json.gz" in done.stdout
    table = done.stdout[done.stdout.index("ms a step"):]
    assert re.search(r"^ +\d+\.\d\d +\d+\.\d% +[\d.]+  phi1::parallel_block", table, re.MULTILINE), table
    for one, two in zip(steps(place, "traced"), steps(place, "whole"), strict=False):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)
    again = train(place, "traced", train__steps=5, train__schedule_steps=60, checkpoint__every=0, run__profile="2-3")
    assert "note: nothing is traced, since step 3 is finished (run.profile)" in again


def test_a_trace_that_cannot_be_written_ends_nothing(tmp_path):
    said = []
    profiler = Profiler(range(2, 5), tmp_path / "gone", said.append)
    for number in (1, 2):
        with profiler.step(number):
            torch.ones(3).sum()
    profiler.finish()  # as where a run is stopped before step 4
    profiler.finish()
    assert said[-1] == ("warning: the trace of steps 2 to 2 could not be written: No such file or directory; the run "
                        "goes on")
    assert sum("aten::sum" in line for line in said) == 1


def test_steps_beyond_the_end_are_refused(place):
    line = error_line(run(place, "late", train__steps=3, run__profile="2-4", train__warmup_steps=1))
    assert "run.profile must be a step such as 7, or steps such as 7-9, from 1 to 3; got '2-4'" in line


OUT_OF_MEMORY = """
import runpy, sys, torch
from phi1.train.step.trainer import Trainer

whole = Trainer.run_step

def run_step(self):
    if self.finished == 2 and self.batch_plan.rank in RANKS:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    return whole(self)

Trainer.run_step = run_step
sys.argv[0] = SCRIPT
runpy.run_path(SCRIPT, run_name="__main__")
"""


def out_of_memory(place, name, ranks, processes=0, **changes):
    script = place / "out_of_memory.py"
    script.write_text(OUT_OF_MEMORY.replace("RANKS", repr(ranks)).replace("SCRIPT", repr(str(SCRIPT))))
    return run(place, name, processes, script=script, checkpoint__every=0, **changes)


def test_out_of_memory_is_a_line_with_the_setting_to_change_and_a_table(place):
    line = error_line(out_of_memory(place, "small", [0]))
    assert re.search(r"out of memory: set train\.micro_batch_size to 2, the largest that fits.*; the plan's table is "
                     r"in small/out-of-memory-0\.txt$", line), line
    table = (place / "small" / "out-of-memory-0.txt").read_text()
    for part in ("parameters, fp32, sharded", "activations of 4 sequences", "held at most: ",
                 "Tried to allocate 2.00 GiB"):
        assert part in table


@pytest.mark.parametrize("error", [
    lambda: torch.empty(1 << 55),  # 2^57 bytes, more than an address can be
    lambda: bytearray(1 << 62),
    lambda: mmap.mmap(-1, 1 << 55),
])
@pytest.mark.parametrize(("processes", "setting"), [(1, ""), (2, "set run.reshard to true, or ")])
def test_too_little_memory_on_a_cpu_is_a_line_as_well(tmp_path, error, processes, setting):
    recipe = read_recipe(None, {"train.batch_size": f"{processes}", "train.activations": "block"})
    engine = Engine(torch.device("cpu"), "fp32", 1, processes)
    with pytest.raises(RunError) as raised, explained(recipe, engine, tmp_path, Rank(0, processes, 0, processes)):
        error()
    assert str(raised.value) == (f"out of memory: no micro-batch fits: {setting}give each process more memory; the "
                                 f"plan's table is in {tmp_path}/out-of-memory-0.txt")
    table = (tmp_path / "out-of-memory-0.txt").read_text()
    for part in ("memory of a process, GiB", "parameters, gathered, 32 bits", "Python and PyTorch", "held at most: "):
        assert part in table
    assert "CUDA" not in table


@pytest.mark.parametrize("error", [RuntimeError("a mistake"), FileNotFoundError(2, "No such file")])
def test_what_is_no_lack_of_memory_stays_what_it_is(tmp_path, error):
    recipe, engine = read_recipe(None, {}), Engine(torch.device("cpu"), "fp32", 1, 1)
    with pytest.raises(type(error)) as raised, explained(recipe, engine, tmp_path, Rank()):
        raise error
    assert raised.value is error


def test_on_a_gpu_the_record_of_allocations_is_left_as_well(tmp_path, monkeypatch):
    recipe = read_recipe(SCRIPT.parent / "configs" / "phi1-base.toml", {})  # micro-batches of 16
    record, dumped = [], []
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **options: record.append(options))
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", dumped.append)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=40 << 30))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 39 << 30)
    engine = Engine(torch.device("cuda", 0), "fp16", 1, 4, 2, True)
    with pytest.raises(RunError) as raised, explained(recipe, engine, tmp_path, Rank(2, 4, 0, 2)):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    assert record
    assert dumped == [str(tmp_path / "out-of-memory-2.pickle")]
    line = str(raised.value)
    assert re.match(r"out of memory: set train\.micro_batch_size to [48], the largest that fits, or set "
                    r"train\.activations to \S+: then 16 fits", line), line
    assert line.endswith(f"the plan's table is in {tmp_path}/out-of-memory-2.txt, the record of allocations, for "
                         f"https://pytorch.org/memory_viz, in {tmp_path}/out-of-memory-2.pickle")
    assert "held at most by tensors: 39.00 GiB" in (tmp_path / "out-of-memory-2.txt").read_text()


@pytest.mark.slow
def test_a_rank_that_alone_runs_out_of_memory_says_so(place):
    done = out_of_memory(place, "uneven", [1], 2, train__batch_size=8, train__micro_batch_size=2)
    assert done.returncode == 1
    assert "pretrain: error: rank 1: out of memory: set train.micro_batch_size to 1" in done.stderr
    assert (place / "uneven" / "out-of-memory-1.txt").exists()
