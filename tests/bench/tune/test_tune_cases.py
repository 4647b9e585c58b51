"""The cases that the tuner times, the pass that is timed, and the tiles that it tries."""

from types import SimpleNamespace

import pytest
import torch

from phi1.bench.harness.counting import counting, lookups_on_paper
from phi1.bench.tune import cases as tune_cases
from phi1.bench.tune import tune
from phi1.kernels.core import tiles as _tuned
from phi1.kernels.core.backend import load_kernels
from phi1.kernels.core.tiles import Lookup

LOOKUP = Lookup("layer_norm", "forward", (("dtype", "float16"), ("rows", 16384), ("width", 2048)))


def test_each_kernel_with_candidates_finds_its_own(monkeypatch):
    monkeypatch.setattr(_tuned, "TILES", {("attention", "forward"): ["a"], ("layer_norm", "forward"): ["c"]})
    wanted = {("attention", "forward"): ["a"], ("layer_norm", "forward"): ["c"], ("gelu", "forward"): []}
    assert {key: tune_cases.candidates_of(Lookup(*key, ())) for key in wanted} == wanted


def test_every_shipped_table_has_candidates_of_its_own_form():
    load_kernels()
    names = [path.stem for path in (tune.TABLES.parent).glob("*.json")]
    assert "layer_norm" in names
    for op in names:
        for kernel, rows in _tuned.table(op).items():
            assert tune_cases.candidates_of(Lookup(op, kernel, ())), f"{op} {kernel}"
            forms = {frozenset(row["tile"]) for row in rows}
            for tile in tune_cases.candidates_of(Lookup(op, kernel, ())):
                form = frozenset(tile) - {"persistent"}  # a way of running a tile that no table takes yet
                assert form in forms, f"a candidate of {op} {kernel} has other keys than the table's tiles"


def test_a_backward_without_a_case_of_its_own_is_tuned_with_its_forward():
    directions = {op: {case.direction for case in tune.chosen_cases("cuda", [op], "float16")}
                  for op in ("layer_norm", "parallel_block")}
    assert directions["layer_norm"] == {"forward", "backward"}
    assert directions["parallel_block"] == {"forward", "forward+backward"}


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_what_a_tile_is_chosen_by_is_the_pass_that_looks_it_up_as_training_runs_it(arch):
    meta = torch.device("meta")
    cases = tune.chosen_cases("cuda", ["parallel_block"], "float16")
    tasks = tune.tasks_of(cases, arch, lambda case: lookups_on_paper(case, arch))
    by_kernel = {task.lookup.kernel: task for task in reversed(tasks)}

    def launches(kernel, tile):
        task = by_kernel[kernel]
        with counting(arch) as counter, _tuned.forced(task.lookup.op, kernel, tile):
            task.call(meta, task.case.draw(meta))(0)
        return {launch.name: launch for launch in counter.launches}

    ours = next(tile for tile in by_kernel["in_proj"].tiles if "cublas" not in tile)
    forward = launches("in_proj", ours)
    assert {"qkv_ptr", "pre_ptr", "act_ptr"} <= set(forward["in_proj_kernel"].types), "what the backward needs as well"
    assert not any("backward" in name for name in forward)
    assert "epilogue_forward_kernel" in launches("in_proj", {"cublas": 1})
    assert by_kernel["in_proj"].timed.endswith(" forward, gradients wanted")
    assert by_kernel["dgelu"].timed.endswith(" forward+backward")


@pytest.mark.parametrize(("direction", "forward", "backward", "timed"), [
    ("forward", True, False, "op N=8 forward cpu"), ("backward", True, False, "op N=8 forward cpu, gradients wanted"),
    ("backward", False, True, "op N=8 backward cpu"), ("backward", True, True, "op N=8 forward+backward cpu"),
    ("forward+backward", False, True, "op N=8 forward+backward cpu"),
])
def test_a_tile_that_both_passes_look_up_is_timed_in_both(monkeypatch, direction, forward, backward, timed):
    monkeypatch.setattr(tune_cases, "candidates_of", lambda lookup: [{"rows": 1}])
    case = SimpleNamespace(name=f"op N=8 {direction} cpu", direction=direction)
    (task,) = tune.tasks_of([case], "any", lambda case: ([LOOKUP] * forward, [LOOKUP] * backward))
    assert task.timed == timed
