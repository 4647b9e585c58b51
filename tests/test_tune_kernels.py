"""A whole search for tiles, on a GPU or in Triton's interpreter, with times that are made up."""

import time
from contextlib import contextmanager

import pytest
import torch

from phi1 import testing
from phi1.bench import check, tune
from phi1.bench.tune_store import Store
from phi1.kernels import _tuned, backend

DEVICE = testing.kernel_device()
if DEVICE is None:
    pytest.skip("no GPU: test_interpreter.py runs these", allow_module_level=True)

OWN = {"rows": 8, "num_warps": 1}  # the table's, at width 256
FAST, WRONG, BROKEN, SLOW = ({"rows": 2, "num_warps": 4}, {"rows": 4, "num_warps": 8}, {"no such key": 1},
                             {"rows": 16, "num_warps": 2})
MILLISECONDS = {8: 1.0, 2: 0.5, 4: 0.1, 16: 2.0}


def timer(call):
    call(0)
    return MILLISECONDS[_tuned._forced["layer_norm", "forward"]["rows"]]


@pytest.fixture
def searched(tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "candidates_of", lambda lookup: [FAST, OWN, WRONG, BROKEN, SLOW])
    judge = check.Exact.judge

    def judge_as_if_wrong(self, function, ours):
        verdict = judge(self, function, ours)
        wrong = _tuned._forced["layer_norm", "forward"] == WRONG
        return check.Verdict(1.0, "out0", "out0 is off") if wrong else verdict

    monkeypatch.setattr(check.Exact, "judge", judge_as_if_wrong)
    cases = [case for case in tune.chosen_cases("cpu", ["layer_norm"], "float32") if case.direction == "forward"]

    @contextmanager
    def search(seconds=1000.0, timer=timer):
        lines = []
        store = Store(tmp_path, "A GPU")
        tuner = tune.Tuner(torch.device(DEVICE), store, timer, time.monotonic() + seconds, lines.append)
        with backend("triton"):
            tasks = tuner.tasks(cases)
            yield tuner, tasks, lines, store

    return search


def test_the_fastest_tile_that_is_right_is_written(searched):
    with searched() as (tuner, tasks, lines, store):
        assert [(t.lookup.kernel, dict(t.lookup.shape)) for t in tasks] == [("forward", {"width": 256})]
        assert tasks[0].tiles[0] == OWN
        assert tuner.run(tasks)
    assert '{"when": {"width": [1, 256]}, "tile": {"rows": 2, "num_warps": 4}}' in store.table.read_text()
    assert "0.5 ms, the table's 1 ms (2.00x); 5 tiles, 2 of them failed" in lines[0]
    errors = [entry["error"] for entry in store._trials.values() if "error" in entry]
    assert sorted(error.split(":")[0] for error in errors) == ["KeyError", "wrong"]


def test_a_second_search_times_nothing_again(searched):
    with searched() as (tuner, tasks, _, _):
        tuner.run(tasks)
    with searched(timer=None) as (tuner, tasks, lines, _):
        assert tuner.run(tasks)
    assert "0.5 ms" in lines[0]


def test_without_time_nothing_is_tried_and_it_says_so(searched):
    with searched(seconds=-1.0) as (tuner, tasks, lines, store):
        assert not tuner.run(tasks)
    assert "nothing is written" in lines[0]
    assert not store.table.exists()


def test_less_than_noise_changes_nothing(searched):
    with searched(timer=lambda call: 0.999 if _tuned._forced["layer_norm", "forward"] == FAST else 1.0) as parts:
        tuner, tasks, _, store = parts
        tuner.run(tasks)
    assert '"tile": {"rows": 8, "num_warps": 1}' in store.table.read_text()
