"""The tuner's files, and what its command line refuses; test_tune_kernels.py runs a search."""

import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from training_runs import alive, wait_until

from phi1.bench.harness.case import Case
from phi1.bench.harness.runner import DeviceLostError
from phi1.bench.tune import cases, tune
from phi1.bench.tune.compile_ahead import compile_ahead
from phi1.bench.tune.store import CRASHED, Store, trial_key, when_of
from phi1.cli.main import main
from phi1.kernels.core import tiles
from phi1.kernels.core.tiles import Lookup

LOOKUP = Lookup("layer_norm", "forward", (("dtype", "float16"), ("rows", 16384), ("width", 2048)))
GPU = "NVIDIA H100 80GB HBM3"


def test_a_row_keeps_the_borders_of_the_table_and_is_exact_elsewhere():
    row = {"when": {"width": [1025, 2048]}, "tile": {"rows": 4}}
    assert when_of(LOOKUP, row) == {"width": [1025, 2048], "dtype": "float16", "rows": 16384}


def test_what_was_tried_is_known_to_the_next_process(tmp_path):
    with Store(tmp_path, GPU) as store:
        assert store.trial("a") is None
        store.note("a", op="x", ms=0.5)
        store.note("b", op="x", error="out of shared memory")
        store.note("c", op="x")
        store.note("e", op="x")
        store.forget("e")
        with store.log.open("a") as file:
            file.write('{"key": "d", "m')  # cut off by a lost machine
    with Store(tmp_path, GPU) as again:
        again.note("f", op="x")
        assert again.trial("d") is None
    with Store(tmp_path, GPU) as third:
        assert third.trial("a")["ms"] == 0.5
        assert third.trial("b")["error"] == "out of shared memory"
        assert third.trial("c")["error"] == third.trial("f")["error"] == CRASHED
        assert third.trial("e") is None


def test_a_second_search_of_a_gpu_is_refused_and_of_another_is_not(tmp_path, monkeypatch, capsys):
    with Store(tmp_path, GPU) as store:
        store.note("a", op="x")  # under way, not a crash
        assert on_a_gpu(monkeypatch, tmp_path, None) == 2
        assert capsys.readouterr().err == (f"phi1 tune: error: another search is writing {store.log}: wait until it "
                                           "ends, or give another --out\n")
        Store(tmp_path, "Another GPU").__exit__()
    monkeypatch.setattr(tune, "compile_ahead", lambda *arguments: "")
    assert on_a_gpu(monkeypatch, tmp_path, lambda tuner, tasks: tuner.store.trial("a")["error"] == CRASHED) == 0
    assert ", all tried" in capsys.readouterr().out


def test_a_process_that_compiles_needs_no_files(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(tune, "end_with_parent", lambda: None)
    monkeypatch.setattr(Case, "draw", lambda case, device, draw=Case.draw: draw(case, torch.device("meta")))
    monkeypatch.setattr(tune.Task, "call", lambda task, device, inputs: calls.append)
    with Store(tmp_path, GPU) as store:  # of the search that has started it
        for share in ("0/2", "1/2"):
            assert on_a_gpu(monkeypatch, tmp_path, None, "--compile-share", share) == 0
        assert store.log.read_text() == ""
    assert len(calls) == 2 * (8 + 12), "every tile of layer_norm's two kernels, at two widths, once"


@pytest.mark.parametrize("moment", ["its start is noted", "it is judged", "it is timed", "its end is noted"])
def test_a_tile_under_which_the_search_was_stopped_is_tried_again(tmp_path, monkeypatch, moment):
    synced, moments = os.fsync, iter(["its start is noted", "its end is noted"])

    def at(this):
        if this == moment:
            raise KeyboardInterrupt

    def fsync(descriptor):
        synced(descriptor)
        at(next(moments, None))

    case = SimpleNamespace(name="case forward", direction="forward")
    with Store(tmp_path, GPU) as store, monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        patch.setattr(tune.Task, "call", lambda *arguments: None)
        tuner = tune.Tuner(torch.device("cpu"), store, lambda call: at("it is timed") or 1.0, 0.0)
        task = tune.Task(case, LOOKUP, {}, (), "forward")
        with pytest.raises(KeyboardInterrupt):
            tuner._try(task, "key", {"rows": 1}, {}, lambda: at("it is judged") or "")
    with Store(tmp_path, GPU) as again:
        assert again.trial("key") is None


def test_a_trial_belongs_to_its_tile_case_and_versions():
    keys = {trial_key(LOOKUP, {"rows": rows}, case, versions)
            for rows in (1, 2) for case in ("one", "other") for versions in ("triton 3.6", "triton 3.9")}
    assert len(keys) == 8
    assert trial_key(LOOKUP, {"a": 1, "b": 2}, "", "") == trial_key(LOOKUP, {"b": 2, "a": 1}, "", "")


def test_winners_are_what_the_operations_read(tmp_path, monkeypatch):
    when = {"width": [1025, 2048], "dtype": "float16"}
    with Store(tmp_path, GPU) as store:
        store.write_winner(LOOKUP, when, {"rows": 2, "num_warps": 4}, "sm_90")
        store.write_winner(LOOKUP, when | {"dtype": "float32"}, {"rows": 3, "num_warps": 4}, "sm_90")
        store.write_winner(LOOKUP, when, {"rows": 8, "num_warps": 8}, "sm_90")
    assert store.table.name == tiles.gpu_file(GPU)
    assert len(json.loads(store.table.read_text())["layer_norm"]["forward"]) == 2
    table = json.loads(store.table.read_text())
    monkeypatch.setattr(tiles, "measured", lambda gpu: table)
    monkeypatch.setattr(tiles, "gpu_name", lambda device: GPU)
    monkeypatch.setattr(tiles, "architecture", lambda device: "sm_90")
    tiles.first_fit.cache_clear()
    device = torch.device("cuda")
    assert tiles.tile("layer_norm", "forward", device, width=2048, dtype="float16") == {"rows": 8, "num_warps": 8}
    assert tiles.tile("layer_norm", "forward", device, width=2048, dtype="float32")["rows"] == 3
    assert tiles.tile("layer_norm", "forward", device, width=1024, dtype="float16")["rows"] == 4  # the shipped table's
    tiles.first_fit.cache_clear()


def test_a_forced_tile_holds_inside_the_block_for_that_kernel_alone():
    device = torch.device("cpu")
    before = tiles.tile("layer_norm", "forward", device, width=2048)
    with tiles.forced("layer_norm", "forward", {"rows": 77}):
        assert tiles.tile("layer_norm", "forward", device, width=5) == {"rows": 77}
        assert tiles.tile("layer_norm", "backward", device, width=2048) != {"rows": 77}
        with tiles.forced("layer_norm", "forward", {"rows": 78}):
            assert tiles.tile("layer_norm", "forward", device, width=5) == {"rows": 78}
        assert tiles.tile("layer_norm", "forward", device, width=5) == {"rows": 77}
    assert tiles.tile("layer_norm", "forward", device, width=2048) == before


def test_lookups_are_recorded_inside_the_block_alone():
    device = torch.device("cpu")
    with tiles.recorded() as lookups:
        tiles.tile("layer_norm", "forward", device, width=2048)
    tiles.tile("layer_norm", "forward", device, width=1024)
    assert lookups == [Lookup("layer_norm", "forward", (("width", 2048),))]


def on_a_gpu(monkeypatch, tmp_path, run, *more):
    """`phi1 tune` with a search that is made up; its exit code."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: GPU)
    monkeypatch.setattr(tiles, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(tune.Tuner, "run", run)
    return tune.main(["--op", "layer_norm", "--compilers", "2", "--minutes", "0.1", "--out", str(tmp_path), *more])


def test_a_lost_gpu_is_one_line_and_an_exit_code(monkeypatch, tmp_path, capsys):
    def run(tuner, tasks):
        raise DeviceLostError("the GPU does not answer any more: AcceleratorError: CUDA error")

    monkeypatch.setattr(tune, "compile_ahead", lambda *arguments: "")
    assert on_a_gpu(monkeypatch, tmp_path, run) == tune.LOST == 3
    assert capsys.readouterr().err.splitlines() == [
        "phi1 tune: the GPU does not answer any more: AcceleratorError: CUDA error; "
        "the same command goes on behind this tile"]


def test_the_processes_that_compile_have_the_searchs_choice_and_their_failures_are_named(monkeypatch, tmp_path, capsys):
    def compile_ahead(command, count, seconds):
        assert command[-2:] == ["--op", "layer_norm"]
        return f"1 of {count} failed"

    monkeypatch.setattr(tune, "compile_ahead", compile_ahead)
    assert on_a_gpu(monkeypatch, tmp_path, lambda tuner, tasks: True) == 0
    assert capsys.readouterr().err == "phi1 tune: 1 of 2 failed\n"


def test_of_processes_that_fail_the_number_and_a_last_line_are_told():
    code = "import sys; second = sys.argv[-1] == '1/2'; sys.exit('\\n  no room  \\n' if second else 0)"
    assert compile_ahead([sys.executable, "-c", code], 2, 60.0) == \
        "1 of 2 processes that compile ahead failed: no room"
    assert compile_ahead([sys.executable, "-c", ""], 2, 60.0) == ""
    assert compile_ahead([sys.executable, "-c", "import time; time.sleep(60)"], 1, 0.0).endswith("its time was up")


def test_sigterm_stops_a_search_as_ctrl_c_does(monkeypatch, tmp_path, capsys, sigterm):
    monkeypatch.setattr(tune, "compile_ahead", lambda *arguments: "")
    assert on_a_gpu(monkeypatch, tmp_path, lambda tuner, tasks: sigterm()) == 130
    assert capsys.readouterr().err == "phi1 tune: stopped; the same command goes on\n"


CHILD = """import os, sys, time
SETUP
time.sleep(0.05)  # it goes on as long as its parent does
open(f'pid{sys.argv[-1][0]}', 'w').write(str(os.getpid()))
time.sleep(600)"""
PARENT = """import signal, sys
from phi1.bench.tune.compile_ahead import compile_ahead
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell lets its background processes ignore
compile_ahead([sys.executable, '-c', CHILD], 2, 600)"""


@pytest.mark.parametrize(("number", "setup"), [
    (signal.SIGINT, "pass"),
    (signal.SIGKILL, "from phi1.bench.harness.processes import end_with_parent; end_with_parent()"),
], ids=["SIGINT", "SIGKILL"])
def test_the_processes_that_compile_end_with_the_search(tmp_path, number, setup):
    code = PARENT.replace("CHILD", repr(CHILD.replace("SETUP", setup)))
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stderr=subprocess.DEVNULL)
    files = [tmp_path / "pid0", tmp_path / "pid1"]
    wait_until(lambda: all(file.is_file() and file.read_text() for file in files))
    parent.send_signal(number)  # to it alone: Ctrl-C in a terminal is for all of them
    assert parent.wait(300)
    wait_until(lambda: not any(alive(int(file.read_text())) for file in files))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_ends_in_one_line(capsys):
    assert main(["tune", "--op", "layer_norm"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "phi1 tune: error: tiles are timed on a GPU, and there is none; --dry-run lists what would be tried"]


def test_a_dry_run_lists_cases_and_tiles(capsys):
    assert main(["tune", "--op", "layer_norm", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == ("layer_norm forward width=2048: 8 tiles, timed as layer_norm N=16384 D=2048 float16 forward, "
                        "gradients wanted")
    assert lines[1].startswith("layer_norm backward width=2048: 12 tiles, timed as layer_norm N=16384")
    assert lines[-1].endswith("nothing was run")


def test_only_what_can_be_tuned_is_offered(capsys):
    with pytest.raises(SystemExit) as end:
        main(["tune", "--op", "train-step"])
    assert end.value.code == 2
    assert "invalid choice: 'train-step' (choose from 'layer_norm'" in capsys.readouterr().err.splitlines()[-1]
    for op in cases.tunable():
        assert tune.chosen_cases("cuda", [op], "float16"), f"{op} is offered, and nothing of it is tuned"


@pytest.mark.parametrize(("arguments", "message"), [(["--op", "norm"], "invalid choice: 'norm'"),
                                                    (["--op", "gelu", "--op", "mlp", "--dtype", "bfloat16"],
                                                     "--dtype bfloat16: there is no case of gelu, mlp in it"),
                                                    (["--minutes", "0"], "--minutes must be over 0"),
                                                    (["--minutes", "inf"], "--minutes must be over 0 and finite")])
def test_bad_usage_is_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        main(["tune", *arguments])
    assert end.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
