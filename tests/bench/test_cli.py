"""`phi1 bench` as a user types it: tables, results, traces, and one line for every mistake."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from phi1.bench import cli as command
from phi1.bench.cases import norm
from phi1.bench.cases.registry import all_cases
from phi1.bench.report.plots import labels_of
from phi1.bench.report.results import CASE, FORMAT, read
from phi1.bench.report.table import block, rate
from phi1.bench.report.trace import Line, as_table, kind_of, our_kernels, summarise
from phi1.cli.main import main
from phi1.kernels.core.backend import reference_forced

ROOT = Path(__file__).parents[2]

FAST = ["--device", "cpu", "--seconds", "0.02", "--quick"]


def run(*argv):
    try:
        return main(["bench", *map(str, argv)])
    except SystemExit as stop:
        return stop.code


def test_one_operation_prints_its_table_and_writes_its_results(tmp_path, capsys):
    path = tmp_path / "out" / "r.json"
    assert run("--op", "rotary", *FAST, "--json", path) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0].endswith(f"commit {read(path)['environment']['commit']}")
    assert "OPERATIONS" in lines
    assert sum(line.startswith("  phi1 ") for line in lines) == 2 == sum(line.startswith("  torch ") for line in lines)
    assert str(path) in err
    content = read(path)
    assert content["format"] == FORMAT
    assert [case["direction"] for case in content["cases"]] == ["forward", "forward+backward"]
    assert path.stat().st_size < 4000, "small"


def test_a_wrong_operation_is_exit_code_1(monkeypatch, capsys):
    def wrong(**arguments):  # the operation, not its reference
        return rotary(**arguments) + (0 if reference_forced() else 1e-3)

    rotary = norm.rotary
    monkeypatch.setattr(norm, "rotary", wrong)
    all_cases.cache_clear()
    try:
        assert run("--op", "rotary", *FAST) == 1
    finally:
        all_cases.cache_clear()
    out, err = capsys.readouterr()
    assert "  phi1                   wrong: out0 is off by" in out
    assert "phi1 failed in 2 of 2 cases" in err


def test_sigterm_ends_it_as_ctrl_c_does(monkeypatch, sigterm):
    """By an exception, which removes what it has put into /tmp."""
    monkeypatch.setattr(command, "measure", lambda *arguments: sigterm())
    assert run("--op", "rotary", *FAST) == 130


def test_the_list_of_a_gpus_cases_needs_no_gpu(capsys):
    assert run("--list", "--op", "attention", "--device", "cuda") == 0
    out = capsys.readouterr().out
    assert "attention B=1 T=16384 H=32 K=64 causal=True float16 forward  [phi1, torch, sdpa-flash," in out


def test_cases_that_a_file_has_come_last(tmp_path, capsys):
    assert run("--list", "--op", "gelu", "--device", "cpu") == 0
    names = [line.split("  ")[1].strip() for line in capsys.readouterr().out.splitlines()]
    path = tmp_path / "r.json"
    facts = dict.fromkeys(("device", "cpu", "cores", "threads", "torch", "triton", "commit"), "")
    path.write_text(json.dumps({"format": FORMAT, "date": "", "environment": facts, "settings": {},
                                "cases": [{key: [] for key in CASE} | {"case": names[0]}]}))
    assert run("--list", "--op", "gelu", "--device", "cpu", "--last", str(path)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(names) > 1
    assert names[0] in lines[-1]
    assert names[1] in lines[0]


def test_a_time_limit_names_what_was_not_reached(capsys):
    assert run("--op", "gelu", *FAST, "--minutes", "0.00001") == 0
    err = capsys.readouterr().err
    assert "1 of 2 cases were not reached in 1e-05 minutes: gelu N=256 F=1024 float32 forward+backward cpu" in err


MISTAKES = {
    "operation": (["--op", "atention"], "--op: there is no case of 'atention'; there are layer_norm, "),
    "unit": (["--unit", "kernels"], "argument --unit: invalid choice: 'kernels'"),
    "peer": (["--op", "gelu", "--peers", "tourch", "--device", "cpu"], "--peers: no case has a peer 'tourch'; they "),
    "time": (["--seconds", "0"], "argument --seconds: must be finite and more than 0; got 0.0"),
    "time without a value": (["--seconds", "nan"], "argument --seconds: must be finite and more than 0; got nan"),
    "time without an end": (["--seconds", "inf"], "argument --seconds: must be finite and more than 0; got inf"),
    "limit": (["--minutes", "-1"], "argument --minutes: must be finite and more than 0; got -1.0"),
    "limit without a value": (["--minutes", "nan"], "argument --minutes: must be finite and more than 0; got nan"),
    "command": (["reprot"], "phi1 bench: error: there is no command 'reprot'; did you mean report?"),
    "no command": (["x"], "there is no command 'x'; there are report, compare, trace, static"),
    "two places": (["--save", "--json", "x"], "give the results' place in one way"),
    "option": (["--qick"], "unrecognized arguments: --qick; did you mean --quick?"),
    "compare one": (["compare", "a.json"], "the following arguments are required: B"),
    "compare none": (["compare", "/nowhere/a.json", "/nowhere/b.json"], "/nowhere/a.json: No such file or directory"),
    "report none": (["report", "/nowhere/a.json", "--no-plots"], "/nowhere/a.json: No such file or directory"),
    "trace unit": (["trace", "--unit", "train_step"], "argument --unit: there is no 'train_step'; there are"),
    "trace nothing": (["trace"], "the following arguments are required: --unit"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_gives_one_line_and_exit_code_2(name, capsys):
    argv, message = MISTAKES[name]
    assert run(*argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_gpu_that_is_not_there_is_one_line(capsys):
    assert run("--device", "cuda") == 2
    assert "--device cuda: there is no CUDA device on this machine" in capsys.readouterr().err


def test_help_names_the_commands(capsys):
    assert run("--help") == 0
    out = capsys.readouterr().out
    assert all(f"\n  {name}" in out for name in ("report", "compare", "trace", "static"))


def test_a_trace_names_our_operations_and_products(tmp_path, capsys):
    path = tmp_path / "t.json"
    assert run("trace", "--unit", "parallel_block", "--device", "cpu", "--out", path) == 0
    out = capsys.readouterr().out
    assert "phi1::parallel_block_backward" in out
    assert any(line.endswith("  product") for line in out.splitlines())
    events = json.loads(path.read_text())["traceEvents"]
    assert any(event.get("name") == "phi1::parallel_block" for event in events)


def test_kernels_of_ours_are_known_by_their_names():
    assert {"layer_norm_forward_kernel", "layer_norm_backward_kernel"} <= our_kernels()
    expected = {
        "layer_norm_forward_kernel": "phi1", "phi1::attention": "phi1",
        "nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_TNT": "product", "ampere_fp16_s16816gemm_fp16_128x128_tn": "product",
        "sm90_xmma_gemm_f16f16_f16f32_f32_tn": "product", "Cijk_Ailk_Bljk_HHS_BH_MT128x128": "product",
        "aten::addmm": "product", "ncclDevKernel_AllReduce_Sum_f32": "communication", "Memcpy DtoD": "copy",
        "void at::native::vectorized_elementwise_kernel<4, at::native::AddFunctor>": "other",
    }
    assert {name: kind_of(name) for name in expected} == expected


class Event:
    def __init__(self, name, device_type, us, annotation=False):
        self.name, self.device_type, self.is_user_annotation = name, device_type, annotation
        self.self_cpu_time_total, self.us = us, us
        self.time_range = self

    def elapsed_us(self):
        return self.us


def test_a_gpus_table_counts_its_own_events():
    from torch.autograd import DeviceType

    events = [Event("layer_norm_forward_kernel", DeviceType.CUDA, 100.0) for _ in range(4)]
    events += [Event("nvjet_x", DeviceType.CUDA, 1000.0), Event("aten::mm", DeviceType.CPU, 9e9),
               Event("ProfilerStep#1", DeviceType.CUDA, 9e9, annotation=True)]
    lines = summarise(events, "cuda", steps=2)
    assert lines == [Line("nvjet_x", "product", 0.5, 0), Line("layer_norm_forward_kernel", "phi1", 0.2, 2)]
    assert "71.4%" in as_table(lines)


def test_bars_that_would_have_the_same_label_say_in_what_they_differ():
    def bar(op, dtype, peer, **shape):
        return {"op": op, "direction": "forward", "dtype": dtype, "shape": shape | {"P": id(shape)}}, {"provider": peer}

    bars = [bar("decode", "float16", "a", B=1, T=64), bar("decode", "float16", "b", B=1, T=512),
            bar("decode", "bfloat16", "b", B=1, T=64), bar("load", "float16", "a", model="nano")]
    assert labels_of(bars) == ["decode T=64 float16 forward, a", "decode T=512 float16 forward, b",
                               "decode T=64 bfloat16 forward, b", "load forward, a"]


def test_lines_of_every_status():
    roof = {"gb_per_s": 1.0, "tflop_per_s": 1.0, "ms": 1.0, "bound": "compute"}
    providers = [{"provider": "phi1", "status": "ok", "ms": [2.0, 1.9, 2.2], "roof_share": 0.5, "ratio": [1, 1, 1]},
                 {"provider": "liger", "status": "not installed", "reason": "liger-kernel 0.8.5 is not installed"}]
    record = {"case": "c", "bytes": 1500, "flops": 2_000_000_000, "roof": roof, "note": "unchecked: no room",
              "providers": providers}
    text = block(record)
    assert "c: 1.5 kB, 2 GFLOP, roof 1 ms (compute)" in text
    assert "unchecked: no room" in text
    assert "liger                  not installed: liger-kernel 0.8.5 is not installed" in text
    assert "2 [1.9-2.2]" in text
    assert rate(record, 2.0) == "1 TFLOP/s"
    assert rate(record, 20.0) == "100 GFLOP/s"
    assert rate(record | {"roof": roof | {"bound": "memory"}}, 1e-3) == "1.5 GB/s"


def test_pytest_benchmark_writes_what_the_numbers_depend_on(tmp_path):
    path = tmp_path / "b.json"
    command = [sys.executable, "-m", "pytest", "--benchmark", "-q", "-p", "no:cacheprovider", "bench/bench_cases.py",
               "-k", "gelu and forward and not backward", f"--benchmark-json={path}"]
    # pytest-benchmark measures nothing for a worker of pytest-xdist, and this process may be one.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT,
                          timeout=300, env=environment)
    assert done.returncode == 0, done.stdout[-3000:]
    written = json.loads(path.read_text())
    facts = written["machine_info"]["phi1"]
    assert {"torch", "triton", "commit", "peers"} <= set(facts)
    assert written["commit_info"]["phi1"] == facts["commit"]
    assert {test["extra_info"]["bytes"] for test in written["benchmarks"]} == {256 * 1024 * 2 * 4}
    if torch.cuda.is_available():
        assert {"gpu", "driver"} <= set(facts)


@pytest.mark.slow
def test_training_on_a_cpu_is_compared_and_written(tmp_path):
    script = os.path.join(ROOT, "bench", "cpu_training.py")
    command = [sys.executable, script, "--vocab", "64", "--tokens", "4", "--rounds", "2", "--memory"]
    # Threads that spin while they wait take 30 times as long where other tests want the cores as well.
    done = subprocess.run([*command, "--json", tmp_path / "r.json"], capture_output=True, text=True, timeout=600,
                          env=os.environ | {"OMP_WAIT_POLICY": "passive"})
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert [row["vocab_size"] for row in rows] == [64]
    for row in rows:
        assert row["ratio_p20_p80"][0] <= row["ratio_median"] <= row["ratio_p20_p80"][1]
        assert row["memory_ratio"] == pytest.approx(row["phi1_peak_mib"] / row["transformers_peak_mib"], abs=1e-3)
        assert f"V = {row['vocab_size']}: phi1 {row['phi1_tokens_per_s']} tokens/s" in done.stdout
