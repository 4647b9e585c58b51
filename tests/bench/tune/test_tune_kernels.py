"""A whole search for tiles, on a GPU or in Triton's interpreter, with times that are made up."""

import time
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from kernel_checks import kernel_device

from phi1.bench.cases import norm
from phi1.bench.cases.registry import all_cases
from phi1.bench.harness import check
from phi1.bench.harness.runner import DeviceLostError
from phi1.bench.tune import cases as tune_cases
from phi1.bench.tune import tune
from phi1.bench.tune.store import Store
from phi1.kernels import backend, layer_norm
from phi1.kernels.core import tiles
from phi1.kernels.core.backend import reference_forced

pytestmark = pytest.mark.triton
DEVICE = kernel_device()

OWN = {"rows": 8, "num_warps": 1}  # the table's, at width 256
FAST, WRONG, SLOW = {"rows": 2, "num_warps": 4}, {"rows": 4, "num_warps": 8}, {"rows": 16, "num_warps": 2}
BROKEN = {"rows": 3, "num_warps": 4}  # Triton has no blocks of three
MILLISECONDS = {8: 1.0, 2: 0.5, 4: 0.1, 16: 2.0}


def timer(call):
    call(0)
    return MILLISECONDS[tiles._forced["layer_norm", "forward"]["rows"]]


def layer_norm_that_one_tile_makes_wrong(**arguments):
    wrong = not reference_forced() and tiles._forced.get(("layer_norm", "forward")) == WRONG
    return layer_norm(**arguments) + (1e-2 if wrong else 0.0)


def few_rows(inputs):
    return inputs | {"x": inputs["x"][:32]}


def looked_up(case):
    with tiles.recorded() as lookups:
        case.providers[0].prepare(case, torch.device(DEVICE))(case.draw(torch.device(DEVICE)))
    return lookups, []


@pytest.fixture
def searched(tmp_path, monkeypatch):
    monkeypatch.setattr(tune_cases, "candidates_of", lambda lookup: [FAST, OWN, WRONG, BROKEN, SLOW])
    monkeypatch.setattr(norm, "layer_norm", layer_norm_that_one_tile_makes_wrong)
    all_cases.cache_clear()
    cases = [replace(case, inputs=lambda draw, inputs=case.inputs: few_rows(inputs(draw)))
             for case in tune.chosen_cases("cpu", ["layer_norm"], "float32") if case.direction == "forward"]

    @contextmanager
    def search(seconds=1000.0, timer=timer):
        lines = []
        with Store(tmp_path, "A GPU") as store, backend("triton"):
            tuner = tune.Tuner(torch.device(DEVICE), store, timer, time.monotonic() + seconds, lines.append)
            yield tuner, tune.tasks_of(cases, tiles.architecture(tuner.device), looked_up), lines, store

    yield search
    all_cases.cache_clear()


def test_the_fastest_tile_that_is_right_is_written(searched):
    with searched() as (tuner, tasks, lines, store):
        assert [(t.lookup.kernel, dict(t.lookup.shape)) for t in tasks] == [("forward", {"width": 256})]
        assert tasks[0].tiles[0] == OWN
        assert tuner.run(tasks)
    assert '{"gpu": "any", "when": {"width": [1, 256]}, "tile": {"rows": 2, "num_warps": 4}}' in store.table.read_text()
    assert "0.5 ms, the table's 1 ms (2.00x); 5 tiles, 2 of them failed" in lines[0]
    errors = {entry["tile"]["rows"]: entry["error"] for entry in store._trials.values() if "error" in entry}
    assert errors.keys() == {3, 4}
    assert errors[3].split(":")[0] in ("CompilationError", "InterpreterError")
    assert errors[4].startswith("wrong: out0 is off by ")


def test_a_second_search_times_nothing_again(searched):
    with searched() as (tuner, tasks, _, _):
        tuner.run(tasks)
    with searched(timer=None) as (tuner, tasks, lines, _):
        assert tuner.run(tasks)
    assert "0.5 ms" in lines[0]


def test_a_case_without_memory_for_its_inputs_is_named_and_left_for_the_next_search(searched):
    def out_of_memory(draw):
        raise torch.OutOfMemoryError("Tried to allocate 20.00 GiB")

    with searched() as (tuner, (task,), lines, _):
        assert not tuner.run([replace(task, case=replace(task.case, inputs=out_of_memory)), task])
    assert lines[0] == ("layer_norm forward width=256: nothing to hold its tiles against, none was tried: "
                        "OutOfMemoryError: Tried to allocate 20.00 GiB")
    assert "5 tiles, 2 of them failed" in lines[1]


def test_without_time_nothing_is_tried_and_it_says_so(searched):
    def inputs(draw):
        raise AssertionError("inputs take time, and the reference in float64 more")

    with searched(seconds=-1.0) as (tuner, tasks, lines, store):
        assert not tuner.run([replace(task, case=replace(task.case, inputs=inputs)) for task in tasks])
    assert "nothing is written" in lines[0]
    assert not store.table.exists()


def test_less_than_noise_changes_nothing(searched):
    with searched(timer=lambda call: 0.999 if tiles._forced["layer_norm", "forward"] == FAST else 1.0) as parts:
        tuner, tasks, _, store = parts
        tuner.run(tasks)
    assert '"tile": {"rows": 8, "num_warps": 1}' in store.table.read_text()


def test_an_index_error_of_the_compiler_is_the_tiles_fault(searched):
    def compiling(call):
        if tiles._forced["layer_norm", "forward"] == SLOW:
            raise IndexError("map::at")
        return timer(call)

    with searched(timer=compiling) as (tuner, tasks, lines, _):
        assert tuner.run(tasks)
    assert "5 tiles, 3 of them failed" in lines[0]


def test_a_mistake_of_ours_is_no_tiles_fault(searched, monkeypatch):
    with searched() as (tuner, tasks, _, _), monkeypatch.context() as patch:
        patch.setattr(check.Exact, "judge", lambda self, function: "")  # it takes a provider's name as well
        with pytest.raises(TypeError, match="positional arguments"):
            tuner.run(tasks)
    with searched() as (tuner, tasks, lines, _):
        assert tuner.run(tasks)
    assert "5 tiles, 2 of them failed" in lines[0]


def test_after_a_lost_gpu_the_next_process_goes_on_behind_the_tile(searched, monkeypatch):
    def gone(device):
        raise DeviceLostError("the GPU does not answer any more")

    with searched() as (tuner, tasks, _, store), monkeypatch.context() as patch:
        patch.setattr(tune, "still_there", gone)
        with pytest.raises(DeviceLostError):
            tuner.run(tasks)
    assert [entry["tile"] for entry in store._trials.values() if "error" in entry] == [WRONG, BROKEN]
    with searched() as (tuner, tasks, lines, store):
        assert tuner.run(tasks)
    assert "5 tiles, 2 of them failed" in lines[0]
    assert len(store.log.read_text().splitlines()) == 2 * 5, "each tile was tried once"
