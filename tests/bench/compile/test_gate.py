"""The compile gate: it passes the kernels, and refuses those that spill, lose vector loads or do not compile."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from kernel_checks import kernel_device

if sys.platform != "linux" or os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("Triton compiles on Linux, and not in its interpreter", allow_module_level=True)

import triton
import triton.language as tl
from training_runs import injected, wait_until

from phi1.bench.compile import gate, pool, read
from phi1.bench.compile.case import Case
from phi1.bench.compile.cases import cases

GATE = Path(__file__).parents[3] / "bench" / "compile" / "gate.py"
ARCHS = list(gate.ARCHS)


@triton.jit
def copy_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs, mask=offs < n), mask=offs < n)


@triton.jit
def normalise_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, BLOCK)).to(tl.float32)
    tl.store(y_ptr + tl.arange(0, BLOCK), (x / tl.sum(x)).to(y_ptr.dtype.element_ty))


@triton.jit
def wrong_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    tl.store(y_ptr + tl.arange(0, BLOCK), tl.load(x_ptr + tl.arange(0, 3)))


POINTERS = {"x_ptr": "*fp16", "y_ptr": "*fp16"}
# n is not known to be a multiple of 8, so that the mask may cut a vector: one element a time.
COPY = Case("copy", copy_kernel, POINTERS | {"n": "i32"}, {"BLOCK": 2048})
WHOLE_COPY = replace(COPY, types=POINTERS, constexprs={"BLOCK": 2048, "n": 1 << 20})


def verdict(case, arch="sm_90"):
    return gate.complaints(case, arch, read.measure(case, arch))


@pytest.mark.parametrize("arch", ARCHS)
def test_a_good_kernel_passes(arch):
    report = read.measure(WHOLE_COPY, arch)
    assert gate.complaints(WHOLE_COPY, arch, report) == []
    assert set(report.loads) == set(report.stores) == {16}
    assert 4 < report.registers < 64
    assert report.warps == 4
    assert report.occupancy(arch) == (8 if arch == "gfx942" else 64)


@pytest.mark.parametrize("arch", ARCHS)
def test_a_mask_that_may_cut_a_vector_is_refused(arch):
    complaints = verdict(COPY, arch)
    assert len(complaints) == 2
    assert "global loads under 16 bytes, 0 allowed" in complaints[0]
    assert "global stores under 16 bytes, 0 allowed" in complaints[1]
    assert verdict(replace(COPY, narrow_loads=64, narrow_stores=64), arch) == []


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])  # AMD's 16-byte loads need no alignment
def test_an_unaligned_pointer_is_refused(arch):
    complaints = verdict(replace(WHOLE_COPY, unaligned=("x_ptr",)), arch)
    assert len(complaints) == 1
    assert "global loads under 16 bytes" in complaints[0]


@pytest.mark.parametrize("arch", ARCHS)
def test_a_kernel_that_spills_is_refused(arch):
    # 1024 threads may have 64 registers each on NVIDIA and 128 on AMD; these hold twice as many values.
    block, warps = (1 << 18, 16) if arch == "gfx942" else (1 << 17, 32)
    complaints = verdict(Case("spills", normalise_kernel, POINTERS, {"BLOCK": block}, num_warps=warps), arch)
    assert len(complaints) == 1
    assert complaints[0].startswith("spills ")


def test_too_much_shared_memory_is_refused():
    report = read.measure(WHOLE_COPY, "sm_80")
    over = replace(report, shared=166_913, registers=128)
    assert "shared memory, over 166912" in gate.complaints(WHOLE_COPY, "sm_80", over)[0]
    assert gate.complaints(WHOLE_COPY, "sm_90", over) == []
    assert [over.occupancy(arch) for arch in ("sm_80", "sm_90", "gfx942")] == [0, 4, 0]
    assert replace(over, shared=70_000).occupancy("sm_80") == 8  # two programs of 4 warps
    assert replace(over, shared=0).occupancy("sm_80") == 16  # 65,536 registers / (128 * 32)


@triton.jit(do_not_specialize=["free"])
def sizes_kernel(x_ptr, n, free, BLOCK: tl.constexpr):
    tl.store(x_ptr + n + free + tl.arange(0, BLOCK), 0.0)


@pytest.mark.parametrize(("n", "free", "expected"), [
    (1, 1, ({"free": "i32"}, {"n": 1}, [])),
    (32, 32, ({"n": "i32", "free": "i32"}, {}, ["n"])),
    (20, 20, ({"n": "i32", "free": "i32"}, {}, [])),
    (1 << 31, 2, ({"n": "i64", "free": "i32"}, {}, ["n"])),
])
def test_the_compiler_knows_of_sizes_what_a_launch_tells_it(n, free, expected):
    types, constants, multiples = Case("sizes", sizes_kernel, {"x_ptr": "*fp32"},
                                       {"n": n, "free": free, "BLOCK": 16}).arguments()
    assert (types, constants, multiples) == (expected[0] | {"x_ptr": "*fp32"}, expected[1] | {"BLOCK": 16}, expected[2])


def test_assembly_without_accesses_is_refused():
    report = replace(read.measure(WHOLE_COPY, "sm_90"), loads={}, stores={})
    assert len(gate.complaints(WHOLE_COPY, "sm_90", report)) == 2


def test_a_spill_in_a_main_loop_is_refused_and_one_outside_may_be_allowed():
    report = replace(read.measure(WHOLE_COPY, "sm_90"), stack=8, loop_spills=2)
    allowed = replace(WHOLE_COPY, spill_bytes=8)
    assert "spills 8 bytes a thread, 0 allowed" in gate.complaints(WHOLE_COPY, "sm_90", report)[0]
    assert "2 accesses to spilled registers in a main loop" in gate.complaints(allowed, "sm_90", report)[0]
    assert gate.complaints(allowed, "sm_90", replace(report, loop_spills=0)) == []
    assert gate.complaints(replace(allowed, loop_spills=2), "sm_90", report) == []


@triton.jit
def spill_in_loop_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for first in range(n):
        total += tl.load(x_ptr + first * BLOCK + tl.arange(0, BLOCK)).to(tl.float32)
    tl.store(y_ptr + tl.arange(0, BLOCK), total.to(y_ptr.dtype.element_ty))


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"])
def test_spills_in_a_loop_are_found_in_the_machine_code(arch):
    # 1024 threads, at most 64 registers each (AMD 128), with 128 (256) sums alive around the loop.
    warps, block = (16, 1 << 18) if arch == "gfx942" else (32, 1 << 17)
    case = Case("spills", spill_in_loop_kernel, POINTERS | {"n": "i32"}, {"BLOCK": block}, num_warps=warps)
    report = read.measure(case, arch)
    assert report.stack > 0
    assert report.loop_spills > 0


def test_a_kernel_that_does_not_compile_is_refused(monkeypatch):
    monkeypatch.setattr("phi1.bench.compile.cases.cases", lambda arch: [Case("wrong", wrong_kernel, POINTERS,
                                                                            {"BLOCK": 4})])
    report = pool._measure_named(("sm_90", "wrong"))
    assert gate.complaints(COPY, "sm_90", report)[0].startswith("does not compile: ")


def test_a_compiler_that_kills_its_process_is_reported_and_the_rest_goes_on(monkeypatch):
    monkeypatch.setattr(pool, "_measure_named", os._exit)  # called with the job: an exit code
    found = list(pool.compile_all([3, 4, 5], processes=2))
    assert sorted(job for job, _ in found) == [3, 4, 5]
    assert {report.error for _, report in found} == {"the compiler crashed"}


def test_a_mistake_of_ours_in_a_process_is_raised(monkeypatch):
    monkeypatch.setattr(pool, "_measure_named", int)
    with pytest.raises(ValueError, match="invalid literal for int"):
        list(pool.compile_all(["no number"], processes=2))


def test_what_nobody_waits_for_any_more_is_not_compiled(monkeypatch, tmp_path):
    monkeypatch.setattr(pool, "_measure_named", exec)
    jobs = [f"open({str(tmp_path / str(i))!r}, 'w'); import time; time.sleep(0.02)" for i in range(20)]
    before = set(threading.enumerate())
    found = pool.compile_all(jobs, processes=1)
    next(found)
    found.close()
    wait_until(lambda: set(threading.enumerate()) <= before)
    assert len(list(tmp_path.iterdir())) <= 3


COMPILES = """import signal, sys, time
from phi1.bench.compile import pool

def stop(number, frame):  # a shell lets its background processes ignore it
    time.sleep(float(sys.argv[1]))
    signal.default_int_handler(number, frame)

signal.signal(signal.SIGINT, stop)
pool._measure_named = exec
try:
    list(pool.compile_all([f"open('begun{i}', 'w'); import time; time.sleep(600)" for i in range(3)]))
except KeyboardInterrupt:
    sys.exit(130)"""
STARTS_SLOWLY = """import os, sys, time
if "--multiprocessing-fork" in sys.orig_argv:
    open(f"begun{os.getpid()}", "w")
    while not os.path.exists("released"):
        time.sleep(0.02)
"""


@pytest.mark.parametrize(("stop", "late", "hook", "code"), [
    (lambda process: os.killpg(process.pid, signal.SIGINT), 0, "", 130),  # as a terminal does
    (lambda process: os.killpg(process.pid, signal.SIGINT), 0.3, "", 130),
    (lambda process: os.killpg(process.pid, signal.SIGINT), 0, STARTS_SLOWLY, 130),
    (lambda process: process.kill(), 0, "", -9),
], ids=["Ctrl-C", "Ctrl-C, of which they hear first", "Ctrl-C as they start", "kill"])
def test_the_processes_that_compile_end_quietly_with_the_one_that_asks(tmp_path, stop, late, hook, code):
    place = tmp_path / "place"
    place.mkdir()
    process = subprocess.Popen([sys.executable, "-c", COMPILES, f"{late}"], cwd=place, stderr=subprocess.PIPE,
                               text=True, start_new_session=True, env=os.environ | injected(tmp_path / "hook", hook))
    try:
        wait_until(lambda: len(list(place.iterdir())) == 2)
        stop(process)
        (place / "released").touch()
        said = process.communicate(timeout=300)[1]  # until all have closed it, those that it started as well
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert "Traceback" not in said
    assert process.returncode == code
    assert not (place / "begun2").exists(), "another has begun"


def test_a_case_that_names_no_argument_of_its_kernel_is_our_mistake():
    with pytest.raises(AssertionError, match="the kernel has no argument"):
        read.measure(replace(COPY, constexprs={"BLOCKS": 4}), "sm_90")


def test_a_product_without_tensor_instructions_is_refused():
    assert verdict(replace(COPY, tensor_core=True), "sm_90")[0] == "has no tensor instruction"


def test_every_kernel_of_the_package_has_a_case():
    import importlib
    import pkgutil

    import phi1.kernels

    with_cases = {case.kernel.fn.__qualname__ for case in cases("sm_90")}
    for module in pkgutil.walk_packages(phi1.kernels.__path__, "phi1.kernels."):
        if not module.name.endswith("_triton"):
            continue
        for name, value in vars(importlib.import_module(module.name)).items():
            if isinstance(value, triton.JITFunction) and name.endswith("_kernel"):
                assert name in with_cases, f"{module.name}.{name} has no case in bench/static_*.py"


def test_the_command_passes_phi1s_kernels_on_one_gpu():
    command = [sys.executable, GATE, "--all", "--arch", "sm_90", "--only", "layer_norm_forward fp16 D=2048"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == f"static gate, Triton {triton.__version__}: all 2 pass"


@pytest.mark.parametrize(
    ("arguments", "interpret", "message"),
    [
        (["--arch", "sm_70"], "0", "invalid choice: 'sm_70'"),
        (["--only", "no such kernel"], "0", "no case has this in its name"),
        ([], "1", "TRITON_INTERPRET is set"),
        (["--check", "--update"], "0", "--check compiles nothing"),
        (["--jobs", "0"], "0", "--jobs must be at least 1"),
        (["--triton", "/nowhere"], "0", "there is no triton in this folder"),
    ],
)
def test_bad_usage_exits_with_2_and_a_line(arguments, interpret, message):
    environment = os.environ | {"TRITON_INTERPRET": interpret}
    done = subprocess.run([sys.executable, GATE, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_kernel_device_is_not_the_interpreter_here():
    assert kernel_device() in (None, "cuda")
