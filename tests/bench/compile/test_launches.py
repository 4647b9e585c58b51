"""The gate compiles all that phi-1, the benchmarks, the tables of tiles and the tuner may launch."""

import importlib
import json
import os
import pickle
import pkgutil
import sys
from functools import cache, partial

import pytest
import torch

if sys.platform != "linux" or os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("Triton compiles on Linux, and not in its interpreter", allow_module_level=True)

import triton

import phi1.kernels
from phi1 import preset
from phi1.bench.compile import launches, programs, report
from phi1.bench.compile.arch import ARCHS
from phi1.bench.compile.key import key_of
from phi1.bench.compile.launches import cases, content, recorded
from phi1.bench.compile.table import VERSIONS, load
from phi1.bench.harness.counting import lookups_on_paper
from phi1.bench.tune.cases import candidates_of, chosen_cases
from phi1.bench.tune.store import Store, when_of
from phi1.cli.main import main
from phi1.kernels.core import tiles

PHI1 = preset("phi1")
WHOLE = {
    "a training step": partial(programs._train, PHI1, "fp16", "none", 0.0),
    "a training step with dropout": partial(programs._train, PHI1, "fp16", "none", 0.1),
    "an evaluation": partial(programs._evaluate, PHI1, "fp16"),
    "a prefill and a decode step": partial(programs._generate, PHI1, "fp16", 1, False),
}


@cache
def compiled(arch):
    """Keys of the rows that the committed table has of every version."""
    return set.intersection(*({row["key"] for row in load(version)[arch].values()} for version in VERSIONS))


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("what", WHOLE)
def test_every_launch_of_the_whole_phi1_is_in_the_table(what, arch):
    made = recorded((what, WHOLE[what]), arch).launches
    assert len(made) >= PHI1.num_hidden_layers
    distinct = {content(launch): launch for launch in made}.values()  # layers launch alike
    assert [launch.name for launch in distinct if key_of(launch, arch) not in compiled(arch)] == []


def test_the_forward_of_a_layer_has_the_rotary_tables_of_its_backward():
    (forward,) = {content(launch): launch for launch in recorded(("", WHOLE["a training step"]), "sm_90").launches
                  if launch.name == "attention_forward_kernel"}.values()
    assert (forward.constants["HALF"], forward.types["cos_ptr"], forward.constants["ROTATE_Q"]) == (16, "*fp32", False)


@pytest.mark.parametrize(("arch", "table"), [
    *((arch, arch) for arch in ARCHS), ("sm_80", "any"), ("gfx942", "any")])
def test_programs_take_every_row_of_the_tables(arch, table):
    reached = launches.reached(arch, table)
    missed = [(op, kernel, row) for op in sorted({op for op, _ in tiles.TILES})
              for kernel, rows in tiles.table(op).items() for row in rows
              if row["gpu"] == table and not any(row is taken for taken in reached)]
    assert missed == []


@pytest.mark.parametrize("arch", ARCHS)
def test_attention_takes_its_rows_with_and_without_dropout(arch):
    taken = {(lookup.kernel, dict(lookup.shape)["bits"], dict(lookup.shape)["head_size"] > 64,
              dict(lookup.shape)["dropout"])
             for _, result in launches._ran(arch, arch) for lookup in result.lookups if lookup.op == "attention"}
    assert taken == {(kernel, bits, large, dropout) for kernel in tiles.table("attention") for bits in (16, 32)
                     for large in (False, True) for dropout in (False, True)}


def test_every_tile_that_the_tuner_may_try_has_a_case():
    compiled_there = {content(case.launch) for case in cases("sm_90")}
    tried = launches.tried("sm_90")
    assert len(tiles.TILES) == 15
    for (op, kernel), candidates in tiles.TILES.items():
        made = [entry[3] for entry in tried if entry[:2] == (op, kernel)]
        assert len(made) >= len(candidates), (op, kernel)
        assert {content(launch) for changed in made for launch in changed} <= compiled_there
        assert len({content(launch) for changed in made for launch in changed}) >= len(candidates) // 2, (op, kernel)


def test_every_kernel_of_the_package_has_a_case_on_every_gpu():
    for arch in ARCHS:
        with_cases = {case.launch.name for case in cases(arch)}
        for module in pkgutil.walk_packages(phi1.kernels.__path__, "phi1.kernels."):
            if module.name.endswith("_triton"):
                for name, value in vars(importlib.import_module(module.name)).items():
                    if isinstance(value, triton.JITFunction) and name.endswith("_kernel"):
                        unused = arch == "sm_80" and name == "out_proj_kernel"
                        assert name in with_cases or unused, f"{module.name}.{name} has no case on {arch}"


@pytest.mark.parametrize("arch", ARCHS)
def test_names_and_contents_are_unique_and_a_case_goes_to_another_process(arch):
    made = cases(arch)
    assert len({case.name for case in made}) == len({content(case.launch) for case in made}) == len(made)
    case = made[0]
    again = pickle.loads(pickle.dumps(case))
    assert (again, again.launch.kernel) == (case, case.launch.kernel)


GPU, STEM = "NVIDIA H100 80GB HBM3", "nvidia-h100-80gb-hbm3"
BIG = {"block_m": 256, "block_n": 256, "block_k": 128, "group_m": 8, "parts": 1, "tma": 0, "num_warps": 8,
       "num_stages": 6}
WHEN = {"dtype": "float16", "rows": [1025, 65536], "width": 2048, "inner": 8192}


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """Writes a GPU's file with one row."""
    monkeypatch.setattr(launches, "FOLDER", tmp_path)
    launches.cases.cache_clear()

    def write(op, kernel, row, stem=STEM):
        (tmp_path / f"{stem}.json").write_text(json.dumps({op: {kernel: [row]}}))

    yield write
    launches.cases.cache_clear()


def test_a_measured_tile_that_was_not_compiled_is_refused(measured, capsys):
    measured("block", "in_proj", {"gpu": "sm_90", "when": WHEN, "tile": BIG})
    assert report.main(["--check", "--only", f"on {STEM}"]) == 1
    out = capsys.readouterr().out
    assert out.count("1 of 1 are stale: in_proj parallel_block ") == 2
    (case,) = (case for case in cases("sm_90") if STEM in case.name)
    assert (case.launch.options["num_stages"], case.launch.constants["BLOCK_K"]) == (6, 128)
    assert not any(STEM in case.name for case in cases("sm_80"))


@pytest.mark.parametrize(("op", "kernel", "row", "why"), [
    ("block", "in_proj", {"when": WHEN, "tile": BIG}, "KeyError: 'gpu'"),
    ("block", "in_proj", {"gpu": "sm_70", "when": WHEN, "tile": BIG}, "KeyError: 'sm_70'"),
    ("block", "in_proj", {"gpu": "sm_90", "when": {"heads": 3}, "tile": BIG}, "KeyError: 'heads'"),
    ("block", "in_proj", {"gpu": "sm_90", "when": {"width": 7}, "tile": BIG},
     "KeyError: 'no program looks up block in_proj there'"),
    ("block", "in_proj", {"gpu": "sm_90", "when": WHEN, "tile": {"rows": 4}}, "KeyError: 'block_n'"),
    ("block", "sideways", {"gpu": "sm_90", "when": WHEN, "tile": BIG},
     "KeyError: 'no program looks up block sideways there'"),
], ids=["no architecture", "architecture", "shape", "size", "tile", "kernel"])
def test_a_row_of_which_no_case_can_be_made_is_named(measured, monkeypatch, capsys, op, kernel, row, why):
    measured(op, kernel, row)
    assert report.main(["--check"]) == 1
    line = next(line for line in capsys.readouterr().out.splitlines() if STEM in line)
    assert line.startswith(f"Triton 3.9.0: tuned/gpus/{STEM}.json: {op} {kernel} {{")
    assert line.endswith(f"has no case: {why}")


def test_a_file_that_was_cut_short_is_named_in_one_line(measured, tmp_path, capsys):
    (tmp_path / f"{STEM}.json").write_text('{"block": {"in_proj": [')
    assert main(["bench", "static", "--check", "--only", "rotary"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("phi1 bench static: error: ")
    assert f"{STEM}.json is no JSON: " in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(("stem", "arch"), [("nvidia-rtx-4090", "sm_80"), ("amd-radeon-pro-w7900", "gfx942")])
def test_a_gpu_of_no_architecture_is_compiled_for_as_its_makers_first(measured, stem, arch):
    measured("rotary", "rotate", {"gpu": "any", "when": {"half": [1, 16]},
                                  "tile": {"rows": 2, "heads": 8, "num_warps": 2}}, stem)
    assert {name for name in ARCHS if any(stem in case.name for case in cases(name))} == {arch}


def test_a_product_that_is_left_to_cublas_is_no_fault(measured):
    measured("block", "in_proj", {"gpu": "sm_90", "when": WHEN, "tile": {"cublas": 1}})
    (row,) = launches.measured()
    assert not row.fault
    assert "in_proj_kernel" not in {launch.name for launch in row.launches}


def test_whatever_the_tuner_writes_has_a_case_with_its_tile(measured, tmp_path):
    lookups = {lookup for case in chosen_cases("cuda", [], "float16") if case.quick
               for found in lookups_on_paper(case, "sm_90") for lookup in found}
    with Store(tmp_path, GPU) as store:
        for lookup in lookups:
            row = tiles.first_fit(lookup.op, lookup.kernel, "", "sm_90", lookup.shape)
            tile = (candidates_of(lookup) or [row["tile"]])[-1]
            store.write_winner(lookup, when_of(lookup, row), tile, "sm_90")
    rows = launches.measured()
    assert len(rows) == len(lookups) > 20
    assert [row.fault for row in rows if row.fault] == []
    tile = {row.name: row.launches for row in rows}
    assert all(tile.values())


@triton.jit(do_not_specialize=["free"])
def sizes_kernel(x_ptr, n, free, BLOCK: triton.language.constexpr):
    triton.language.store(x_ptr + n + free, 0.0)


@pytest.mark.parametrize(("n", "free", "types", "constants", "aligned"), [
    (1, 1, {"free": "i32"}, {"n": 1}, ()),
    (32, 32, {"n": "i32", "free": "i32"}, {}, ("n",)),
    (20, 20, {"n": "i32", "free": "i32"}, {}, ()),
    (1 << 31, 2, {"n": "i64", "free": "i32"}, {}, ("n",)),
    (None, 2, {"free": "i32"}, {"n": None}, ()),
    (0.5, 2, {"n": "fp32", "free": "i32"}, {}, ()),
])
def test_the_compiler_knows_of_sizes_what_a_launch_tells_it(n, free, types, constants, aligned):
    def launch():
        sizes_kernel[(1,)](torch.empty(64, device="meta"), n, free=free, BLOCK=16, num_warps=8)

    (made,) = recorded(("", launch), "sm_90").launches
    assert made.types == types | {"x_ptr": "*fp32"}
    assert made.constants == constants | {"BLOCK": 16}
    assert set(made.aligned) == {"x_ptr", *aligned}
    assert made.options == {"num_warps": 8}


@pytest.mark.parametrize(("first", "aligned"), [(0, True), (8, True), (3, False)])
def test_a_view_is_aligned_where_its_first_element_is(first, aligned):
    def launch():
        sizes_kernel[(1,)](torch.empty(64, dtype=torch.float16, device="meta")[first:], 2, 2, BLOCK=16)

    (made,) = recorded(("", launch), "sm_90").launches
    assert (made.types["x_ptr"], "x_ptr" in made.aligned) == ("*fp16", aligned)
