"""The compile gate: it passes the kernels, and refuses those that spill, lose vector loads or do not compile."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from phi1 import testing

if sys.platform != "linux" or os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("Triton compiles on Linux, and not in its interpreter", allow_module_level=True)

import triton
import triton.language as tl

from phi1.bench import static_gate
from phi1.bench.static_case import Case
from phi1.bench.static_cases import cases

GATE = Path(__file__).parent.parent / "bench" / "static_gate.py"
ARCHS = list(static_gate.ARCHS)


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
    return static_gate.complaints(case, arch, static_gate.measure(case, arch))


@pytest.mark.parametrize("arch", ARCHS)
def test_a_good_kernel_passes(arch):
    report = static_gate.measure(WHOLE_COPY, arch)
    assert static_gate.complaints(WHOLE_COPY, arch, report) == []
    assert set(report.loads) == set(report.stores) == {16}
    assert 4 < report.registers < 64


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
    report = static_gate.measure(WHOLE_COPY, "sm_80")
    over = replace(report, shared=166_913)
    assert "shared memory, over 166912" in static_gate.complaints(WHOLE_COPY, "sm_80", over)[0]
    assert static_gate.complaints(WHOLE_COPY, "sm_90", over) == []


def test_assembly_without_accesses_is_refused():
    report = replace(static_gate.measure(WHOLE_COPY, "sm_90"), loads=(), stores=())
    assert len(static_gate.complaints(WHOLE_COPY, "sm_90", report)) == 2


def test_a_kernel_that_does_not_compile_fails_the_gate(monkeypatch, capsys):
    wrong = Case("wrong", wrong_kernel, POINTERS, {"BLOCK": 4})
    monkeypatch.setattr(static_gate, "cases_of", lambda arch: [wrong, WHOLE_COPY])
    assert static_gate.main(["--arch", "sm_90"]) == 1
    out = capsys.readouterr().out
    assert "REFUSED: does not compile" in out
    assert out.splitlines()[-1] == f"static gate, Triton {triton.__version__}: 1 of 2 refused"


def test_a_product_without_tensor_instructions_is_refused():
    assert verdict(replace(COPY, tensor_core=True), "sm_90")[0] == "has no tensor instruction"


def test_every_kernel_of_the_package_has_a_case():
    import importlib
    import pkgutil

    import phi1.kernels

    with_cases = {case.kernel.fn.__qualname__ for case in cases("sm_90")}
    for module in pkgutil.iter_modules(phi1.kernels.__path__):
        if not module.name.endswith("_triton"):
            continue
        for name, value in vars(importlib.import_module(f"phi1.kernels.{module.name}")).items():
            if isinstance(value, triton.JITFunction) and name.endswith("_kernel"):
                assert name in with_cases, f"{module.name}.{name} has no case in bench/static_*.py"


def test_the_command_passes_phi1s_kernels_on_one_gpu():
    done = subprocess.run(
        [sys.executable, GATE, "--arch", "sm_90", "--only", "fp16 D=2048"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == f"static gate, Triton {triton.__version__}: all 5 pass"


@pytest.mark.parametrize(
    ("arguments", "interpret", "message"),
    [
        (["--arch", "sm_70"], "0", "invalid choice: 'sm_70'"),
        (["--only", "no such kernel"], "0", "no case has this in its name"),
        ([], "1", "TRITON_INTERPRET is set"),
    ],
)
def test_bad_usage_exits_with_2_and_a_line(arguments, interpret, message):
    environment = os.environ | {"TRITON_INTERPRET": interpret}
    done = subprocess.run([sys.executable, GATE, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_kernel_device_is_not_the_interpreter_here():
    assert testing.kernel_device() in (None, "cuda")
