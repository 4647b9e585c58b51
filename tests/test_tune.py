"""What the tuner keeps and writes, and what its command line refuses; test_tune_kernels.py runs a search."""

import json
import sys

import pytest
import torch

from phi1 import cli
from phi1.bench import tune
from phi1.bench.runner import DeviceLostError
from phi1.bench.tune_compile import compile_ahead
from phi1.bench.tune_store import CRASHED, Store, trial_key, when_of
from phi1.kernels import _tuned
from phi1.kernels._tuned import Lookup

LOOKUP = Lookup("layer_norm", "forward", (("dtype", "float16"), ("rows", 16384), ("width", 2048)))
GPU = "NVIDIA H100 80GB HBM3"


def test_a_row_keeps_the_borders_of_the_table_and_is_exact_elsewhere():
    row = {"when": {"width": [1025, 2048]}, "tile": {"rows": 4}}
    assert when_of(LOOKUP, row) == {"width": [1025, 2048], "dtype": "float16", "rows": 16384}


def test_what_was_tried_is_known_to_the_next_process(tmp_path):
    store = Store(tmp_path, GPU)
    assert store.trial("a") is None
    store.note("a", op="x", ms=0.5)
    store.note("b", op="x", error="out of shared memory")
    store.note("c", op="x")
    store.note("e", op="x")
    store.forget("e")
    with store.log.open("a") as file:
        file.write('{"key": "d", "m')  # cut off by a lost machine
    again = Store(tmp_path, GPU)
    assert again.trial("a")["ms"] == 0.5
    assert again.trial("b")["error"] == "out of shared memory"
    assert again.trial("c")["error"] == CRASHED
    assert again.trial("d") is None
    assert again.trial("e") is None


def test_a_trial_belongs_to_its_tile_case_and_versions():
    keys = {trial_key(LOOKUP, {"rows": rows}, case, versions)
            for rows in (1, 2) for case in ("one", "other") for versions in ("triton 3.6", "triton 3.9")}
    assert len(keys) == 8
    assert trial_key(LOOKUP, {"a": 1, "b": 2}, "", "") == trial_key(LOOKUP, {"b": 2, "a": 1}, "", "")


def test_winners_are_what_the_operations_read(tmp_path, monkeypatch):
    store = Store(tmp_path, GPU)
    when = {"width": [1025, 2048], "dtype": "float16"}
    store.write_winner(LOOKUP, when, {"rows": 2, "num_warps": 4})
    store.write_winner(LOOKUP, when | {"dtype": "float32"}, {"rows": 3, "num_warps": 4})
    store.write_winner(LOOKUP, when, {"rows": 8, "num_warps": 8})
    assert store.table.name == _tuned.gpu_file(GPU)
    assert len(json.loads(store.table.read_text())["layer_norm"]["forward"]) == 2
    table = json.loads(store.table.read_text())
    monkeypatch.setattr(_tuned, "measured", lambda gpu: table)
    monkeypatch.setattr(_tuned, "gpu_name", lambda device: GPU)
    monkeypatch.setattr(_tuned, "architecture", lambda device: "sm_90")
    _tuned.first_fit.cache_clear()
    device = torch.device("cuda")
    assert _tuned.tile("layer_norm", "forward", device, width=2048, dtype="float16") == {"rows": 8, "num_warps": 8}
    assert _tuned.tile("layer_norm", "forward", device, width=2048, dtype="float32")["rows"] == 3
    assert _tuned.tile("layer_norm", "forward", device, width=1024, dtype="float16")["rows"] == 4  # the shipped table's
    _tuned.first_fit.cache_clear()


def test_a_forced_tile_holds_inside_the_block_for_that_kernel_alone():
    device = torch.device("cpu")
    before = _tuned.tile("layer_norm", "forward", device, width=2048)
    with _tuned.forced("layer_norm", "forward", {"rows": 77}):
        assert _tuned.tile("layer_norm", "forward", device, width=5) == {"rows": 77}
        assert _tuned.tile("layer_norm", "backward", device, width=2048) != {"rows": 77}
        with _tuned.forced("layer_norm", "forward", {"rows": 78}):
            assert _tuned.tile("layer_norm", "forward", device, width=5) == {"rows": 78}
        assert _tuned.tile("layer_norm", "forward", device, width=5) == {"rows": 77}
    assert _tuned.tile("layer_norm", "forward", device, width=2048) == before


def test_lookups_are_recorded_inside_the_block_alone():
    device = torch.device("cpu")
    with _tuned.recorded() as lookups:
        _tuned.tile("layer_norm", "forward", device, width=2048)
    _tuned.tile("layer_norm", "forward", device, width=1024)
    assert lookups == [Lookup("layer_norm", "forward", (("width", 2048),))]


def test_each_kernel_with_candidates_finds_its_own(monkeypatch):
    tiles = {"_attention_triton": {"forward": ["a"], "dq": ["b"]}, "_layer_norm_triton": {"forward": ["c"]},
             "_cross_entropy_triton": {"rows": ["d"]}, "_projections_triton": {"in_proj": ["e"]}}
    monkeypatch.setattr(tune, "all_candidates", lambda: tiles)
    wanted = {("attention", "forward"): ["a"], ("attention", "dq"): ["b"], ("layer_norm", "forward"): ["c"],
              ("linear_cross_entropy", "rows"): ["d"], ("block", "in_proj"): ["e"],
              ("gelu", "forward"): [], ("gelu", "other"): []}
    assert {key: tune.candidates_of(Lookup(*key, ())) for key in wanted} == wanted


def test_every_shipped_table_has_candidates_of_its_own_form():
    names = [path.stem for path in (tune.TABLES.parent).glob("*.json")]
    assert "layer_norm" in names
    for op in names:
        for kernel, rows in _tuned.table(op).items():
            forms = {frozenset(row["tile"]) for row in rows}
            for tile in tune.candidates_of(Lookup(op, kernel, ())):
                form = frozenset(tile) - {"persistent"}  # a way of running a tile that no table takes yet
                assert form in forms, f"a candidate of {op} {kernel} has other keys than the table's tiles"


def on_a_gpu(monkeypatch, tmp_path, run):
    """`phi1 tune` with a search that is made up; its exit code."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: GPU)
    monkeypatch.setattr(_tuned, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(tune.Tuner, "run", run)
    return cli.main(["tune", "--op", "layer_norm", "--compilers", "2", "--minutes", "0.1", "--out", str(tmp_path)])


def test_a_lost_gpu_is_one_line_and_an_exit_code(monkeypatch, tmp_path, capsys):
    def run(tuner, tasks):
        raise DeviceLostError("the GPU does not answer any more: AcceleratorError: CUDA error")

    monkeypatch.setattr(tune, "compile_ahead", lambda *arguments: "")
    assert on_a_gpu(monkeypatch, tmp_path, run) == tune.LOST == 3
    assert capsys.readouterr().err.splitlines() == [
        "phi1 tune: the GPU does not answer any more: AcceleratorError: CUDA error; "
        "the same command goes on behind this tile"]


def test_the_processes_that_compile_have_the_searchs_folder_and_their_failures_are_named(monkeypatch, tmp_path, capsys):
    def compile_ahead(command, count, seconds):
        assert command[command.index("--out") + 1] == str(tmp_path)
        return "1 of 2 failed"

    monkeypatch.setattr(tune, "compile_ahead", compile_ahead)
    assert on_a_gpu(monkeypatch, tmp_path, lambda tuner, tasks: True) == 0
    assert capsys.readouterr().err == "phi1 tune: 1 of 2 failed\n"


def test_of_processes_that_fail_the_number_and_a_last_line_are_told():
    code = "import sys; second = sys.argv[-1] == '1/2'; sys.exit('\\n  no room  \\n' if second else 0)"
    assert compile_ahead([sys.executable, "-c", code], 2, 60.0) == \
        "1 of 2 processes that compile ahead failed: no room"
    assert compile_ahead([sys.executable, "-c", ""], 2, 60.0) == ""
    assert compile_ahead([sys.executable, "-c", "import time; time.sleep(60)"], 1, 0.0).endswith("its time was up")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_ends_in_one_line(capsys):
    assert cli.main(["tune", "--op", "layer_norm"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "phi1 tune: error: tiles are timed on a GPU, and there is none; --dry-run lists what would be tried"]


def test_a_dry_run_lists_cases_and_tiles(capsys):
    assert cli.main(["tune", "--op", "layer_norm", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "layer_norm forward width=2048: 8 tiles, timed as layer_norm N=16384 D=2048 float16 forward"
    assert lines[1].startswith("layer_norm backward width=2048: 12 tiles, timed as layer_norm N=16384")
    assert lines[-1].endswith("nothing was run")


def test_a_backward_without_a_case_of_its_own_is_tuned_with_its_forward():
    directions = {op: {case.direction for case in tune.chosen_cases("cuda", [op], "float16")}
                  for op in ("layer_norm", "parallel_block")}
    assert directions["layer_norm"] == {"forward", "backward"}
    assert directions["parallel_block"] == {"forward", "forward+backward"}


@pytest.mark.parametrize(("arguments", "message"), [(["--op", "norm"], "invalid choice: 'norm'"),
                                                    (["--minutes", "0"], "--minutes must be over 0"),
                                                    (["--minutes", "inf"], "--minutes must be over 0 and finite")])
def test_bad_usage_is_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["tune", *arguments])
    assert end.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
