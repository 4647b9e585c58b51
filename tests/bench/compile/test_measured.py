"""Tiles that were measured on a GPU are compiled as well: each row of kernels/tuned/gpus/ has a case, or is refused."""

import json
import os
import sys

import pytest

if sys.platform != "linux" or os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("Triton compiles on Linux, and not in its interpreter", allow_module_level=True)

from phi1.bench.compile import measured as static_measured
from phi1.bench.compile import report
from phi1.bench.compile.cases import cases
from phi1.bench.tune import cases as tune_cases
from phi1.bench.tune.store import Store, when_of
from phi1.cli.main import main
from phi1.kernels.core import tiles

GPU = "NVIDIA H100 80GB HBM3"
STEM = "nvidia-h100-80gb-hbm3"
BIG = {"block_m": 256, "block_n": 256, "block_k": 128, "group_m": 8, "parts": 1, "tma": 0, "num_warps": 8,
       "num_stages": 6}
WHEN = {"dtype": "float16", "rows": [1025, 65536], "width": 2048, "inner": 8192}


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """Writes a GPU's file with one row."""
    monkeypatch.setattr(static_measured, "FOLDER", tmp_path)

    def write(op, kernel, row, stem=STEM):
        (tmp_path / f"{stem}.json").write_text(json.dumps({op: {kernel: [row]}}))

    return write


def test_a_measured_tile_that_was_not_compiled_is_refused(measured, capsys):
    measured("block", "in_proj", {"gpu": "sm_90", "when": WHEN, "tile": BIG})
    assert report.main(["--check", "--only", f"on {STEM}"]) == 1
    out = capsys.readouterr().out
    assert out.count(f"1 of 1 are stale: in_proj fp16 D=2048 256x256x128 on {STEM} ") == 2
    case = next(case for case in cases("sm_90") if STEM in case.name)
    assert (case.num_stages, case.constexprs["BLOCK_K"], case.tensor_core) == (6, 128, True)
    assert not any(STEM in case.name for case in cases("sm_80"))


@pytest.mark.parametrize(("row", "why"), [
    ({"when": WHEN, "tile": BIG}, "KeyError: 'gpu'"),
    ({"gpu": "sm_70", "when": WHEN, "tile": BIG}, "KeyError: 'sm_70'"),
    ({"gpu": "sm_90", "when": {"dtype": "float16"}, "tile": BIG}, "KeyError: 'rows'"),
    ({"gpu": "sm_90", "when": WHEN, "tile": {"rows": 4}}, "KeyError: 'tma'"),
], ids=["no architecture", "architecture", "shape", "tile"])
def test_a_row_of_which_no_case_can_be_made_is_named(measured, monkeypatch, capsys, row, why):
    measured("block", "in_proj", row)
    monkeypatch.setattr(report, "left_over", lambda rows, chosen: [])
    assert report._check_table([], whole=True) == len(report.VERSIONS)
    line = capsys.readouterr().out.splitlines()[0]
    assert line.startswith(f"Triton 3.9.0: tuned/gpus/{STEM}.json: block in_proj {{")
    assert line.endswith(f"has no case: {why}")
    assert static_measured.cases("sm_90") == []


def test_a_row_of_a_kernel_that_there_is_not_is_named(measured):
    measured("block", "sideways", {"gpu": "sm_90", "when": WHEN, "tile": BIG})
    assert static_measured.not_compiled()[0].endswith("KeyError: 'sideways'")
    measured("no such", "in_proj", {"gpu": "sm_90", "when": WHEN, "tile": BIG})
    assert static_measured.not_compiled()[0].endswith("KeyError: 'no such'")


def test_a_file_that_was_cut_short_is_named_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(static_measured, "FOLDER", tmp_path)
    (tmp_path / f"{STEM}.json").write_text('{"block": {"in_proj": [')
    assert main(["bench", "static", "--check", "--only", "rotary"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("phi1 bench: error: ")
    assert f"{STEM}.json is no JSON: " in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(("stem", "arch"), [("nvidia-rtx-4090", "sm_80"), ("amd-radeon-pro-w7900", "gfx942")])
def test_a_gpu_of_no_architecture_is_compiled_for_as_its_makers_first(measured, stem, arch):
    measured("rotary", "rotate", {"gpu": "any", "when": {"half": [1, 16]}, "tile": {"rows": 2, "heads": 8,
                                                                                    "num_warps": 2}}, stem)
    found = {name for name in tiles.ARCHITECTURES for case in static_measured.cases(name)}
    assert found == {arch}


def test_a_product_that_is_left_to_cublas_needs_no_case(measured):
    measured("block", "in_proj", {"gpu": "sm_90", "when": WHEN, "tile": {"cublas": 1}})
    assert static_measured.not_compiled() == static_measured.cases("sm_90") == []


def test_whatever_the_tuner_writes_has_a_case_with_its_tile(tmp_path, monkeypatch):
    monkeypatch.setattr(static_measured, "FOLDER", tmp_path)
    lookups = {lookup for case in tune_cases.chosen_cases("cuda", [], "float16") if case.quick
               for found in tune_cases.lookups_on_paper(case, "sm_90") for lookup in found}
    warps = set()
    with Store(tmp_path, GPU) as store:
        for lookup in lookups:
            row = tiles.first_fit(lookup.op, lookup.kernel, "", "sm_90", lookup.shape)
            tile = (tune_cases.candidates_of(lookup) or [row["tile"]])[-1]
            store.write_winner(lookup, when_of(lookup, row), tile, "sm_90")
            warps.add(tile["num_warps"])
    assert static_measured.not_compiled() == []
    made = static_measured.cases("sm_90")
    assert len(made) > 30
    assert {case.num_warps for case in made} == warps
