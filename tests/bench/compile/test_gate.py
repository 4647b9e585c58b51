"""The compile gate: it passes the kernels, and refuses those that spill, lose vector loads or do not compile."""

import os
import sys
from dataclasses import replace

import pytest

if sys.platform != "linux" or os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("Triton compiles on Linux, and not in its interpreter", allow_module_level=True)

import triton
import triton.language as tl

from phi1.bench.compile import allowed, arch, pool, programs, read, table
from phi1.bench.compile.launches import Case, recorded
from phi1.bench.harness.counting import Launch
from phi1.cli.main import main

ARCHS = list(arch.ARCHS)


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


def case(kernel, types, constants, num_warps=4, aligned=("x_ptr", "y_ptr")):
    launch = Launch(kernel.fn.__name__, kernel, types, constants, tuple(aligned), {"num_warps": num_warps})
    return Case(f"{launch.name.removesuffix('_kernel')} of a test", launch)


# n is not known to be a multiple of 8, so that the mask may cut a vector: one element a time.
COPY = case(copy_kernel, POINTERS | {"n": "i32"}, {"BLOCK": 2048})
WHOLE_COPY = case(copy_kernel, POINTERS | {"n": "i32"}, {"BLOCK": 2048}, aligned=("x_ptr", "y_ptr", "n"))


def accepted(**faults):
    """Allowances of the copy on sm_90; a number for the kernel, or {case: number}."""
    return allowed.parsed({"copy": {fault: {"reason": "a test's", "sm_90": value} for fault, value in faults.items()}})


def refused(case, gpu, report, known=None):
    return allowed.complaints(case, gpu, report, known or allowed.Allowed())


def verdict(case, gpu="sm_90", known=None):
    return refused(case, gpu, read.measure(case.launch, gpu), known)


@pytest.fixture(scope="module")
def whole_copy():
    return read.measure(WHOLE_COPY.launch, "sm_90")


@pytest.mark.parametrize("gpu", ARCHS)
def test_a_good_kernel_passes(gpu):
    report = read.measure(WHOLE_COPY.launch, gpu)
    assert refused(WHOLE_COPY, gpu, report) == []
    assert set(report.loads) == set(report.stores) == {16}
    assert 4 < report.registers < 64
    assert report.warps == 4
    assert report.occupancy(gpu) == (8 if gpu == "gfx942" else 64)


@pytest.mark.parametrize("gpu", ARCHS)
def test_a_mask_that_may_cut_a_vector_is_refused(gpu):
    complaints = verdict(COPY, gpu)
    assert len(complaints) == 2
    assert "global loads under 16 bytes, 0 allowed" in complaints[0]
    assert "global stores under 16 bytes, 0 allowed" in complaints[1]


@pytest.mark.parametrize("gpu", ["sm_80", "sm_90", "sm_100"])  # AMD's 16-byte loads need no alignment
def test_an_unaligned_pointer_is_refused(gpu):
    launch = replace(WHOLE_COPY.launch, aligned=("y_ptr", "n"))
    complaints = verdict(replace(WHOLE_COPY, launch=launch), gpu)
    assert len(complaints) == 1
    assert "global loads under 16 bytes" in complaints[0]


@pytest.mark.parametrize("gpu", ARCHS)
def test_a_kernel_that_spills_is_refused(gpu):
    # 1024 threads may have 64 registers each on NVIDIA and 128 on AMD; these hold twice as many values.
    block, warps = (1 << 18, 16) if gpu == "gfx942" else (1 << 17, 32)
    complaints = verdict(case(normalise_kernel, POINTERS, {"BLOCK": block}, warps), gpu)
    assert len(complaints) == 1
    assert complaints[0].startswith("spills ")


def test_too_much_shared_memory_is_refused(whole_copy):
    over = replace(whole_copy, shared=166_913, registers=128)
    assert "shared memory, over 166912" in refused(WHOLE_COPY, "sm_80", over)[0]
    assert refused(WHOLE_COPY, "sm_90", over) == []
    assert [over.occupancy(gpu) for gpu in ("sm_80", "sm_90", "gfx942")] == [0, 4, 0]
    assert replace(over, shared=70_000).occupancy("sm_80") == 8  # two programs of 4 warps
    assert replace(over, shared=0).occupancy("sm_80") == 16  # 65,536 registers / (128 * 32)


def test_assembly_without_accesses_is_refused(whole_copy):
    assert len(refused(WHOLE_COPY, "sm_90", replace(whole_copy, loads={}, stores={}))) == 2


FAULTS = [
    ({"stack": 8}, "spills 8 bytes a thread, 0 allowed", {"stack": {"of a test": 8}}),
    ({"stack": 8, "loop_spills": 2}, "2 accesses to spilled registers in a main loop, 0 allowed",
     {"stack": {"of a test": 8}, "loop_spills": {"of a test": 2}}),
    ({"serialised": 1}, "ptxas has serialised its wgmma instructions, 0 times allowed",
     {"serialised": {"of a test": 1}}),
    ({"loads": {16: 2, 4: 2}}, "2 global loads under 16 bytes, 0 allowed", {"narrow_loads": 2}),
    ({"stores": {2: 1}}, "1 global stores under 16 bytes, 0 allowed", {"narrow_stores": 1}),
    ({"error": "no"}, "does not compile: no", {"error": {"of a test": 1}}),
]


@pytest.mark.parametrize(("values", "complaint", "known"), FAULTS, ids=[next(iter(f[0])) for f in FAULTS])
def test_a_fault_is_refused_unless_it_is_allowed_and_an_allowance_only_shrinks(whole_copy, values, complaint, known):
    report = replace(whole_copy, **values)
    assert complaint in refused(WHOLE_COPY, "sm_90", report)
    assert refused(WHOLE_COPY, "sm_90", report, accepted(**known)) == []
    assert complaint in refused(replace(WHOLE_COPY, candidate=True), "sm_90", report, accepted(**known))
    assert allowed.unneeded(iter([(WHOLE_COPY, "sm_90", report)]), accepted(**known)) == []
    (*_, line) = allowed.unneeded(iter([(WHOLE_COPY, "sm_90", whole_copy)]), accepted(**known))
    assert "is needed; --accept mends it" in line
    assert allowed.needed(iter([(WHOLE_COPY, "sm_90", report)]), allowed.Allowed(), "a test's") == accepted(**known)


def test_a_case_has_no_share_in_what_another_may_do(whole_copy):
    report = replace(whole_copy, stack=8)
    assert refused(WHOLE_COPY, "sm_90", report, accepted(stack={"another": 8}))
    assert refused(WHOLE_COPY, "sm_100", report, accepted(stack={"of a test": 8}))


def test_reasons_stay_when_allowances_are_written_again(tmp_path, whole_copy):
    report = replace(whole_copy, stack=8, loads={4: 1})
    before = accepted(stack={"of a test": 16})
    found = allowed.needed(iter([(WHOLE_COPY, "sm_90", report), (WHOLE_COPY, "sm_80", report)]), before, 'new: "x"')
    (tmp_path / "allowed.toml").write_text(allowed.dumps(found))
    assert allowed.allowed(tmp_path / "allowed.toml") == found == allowed.parsed({"copy": {
        "stack": {"reason": "a test's", "sm_90": {"of a test": 8}, "sm_80": {"of a test": 8}},
        "narrow_loads": {"reason": 'new: "x"', "sm_90": 1, "sm_80": 1}}})


def test_every_allowance_has_a_reason_and_the_file_is_as_it_is_written():
    assert allowed.FILE.read_text() == allowed.dumps(allowed.allowed())
    assert all(len(reason.split()) >= 3 for reason in allowed.allowed().reasons.values())


def test_wgmmas_that_ptxas_serialises_are_found_in_what_it_says(monkeypatch):
    train = dict(programs.units())["train fp16"]
    launches = {launch.name: launch for launch in recorded(("train fp16", train), "sm_90").launches}
    forward, compiled, logs = launches["attention_forward_kernel"], read._compiled, []

    def serialising(*args):
        result, log = compiled(*args)
        logs.append(log)
        return result, f"{log}info (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized\n"

    report = read.measure(forward, "sm_90")
    assert report.serialised == 0
    assert report.tensor_instructions > 0
    monkeypatch.setattr(read, "_compiled", serialising)
    assert read.measure(forward, "sm_90").serialised == 1
    assert "Compiling entry function 'attention_forward_kernel'" in logs[0], "what ptxas says is not read"


@triton.jit
def spill_in_loop_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for first in range(n):
        total += tl.load(x_ptr + first * BLOCK + tl.arange(0, BLOCK)).to(tl.float32)
    tl.store(y_ptr + tl.arange(0, BLOCK), total.to(y_ptr.dtype.element_ty))


@pytest.mark.parametrize("gpu", ["sm_80", "sm_90", "gfx942"])
def test_spills_in_a_loop_are_found_in_the_machine_code(gpu):
    # 1024 threads, at most 64 registers each (AMD 128), with 128 (256) sums alive around the loop.
    warps, block = (16, 1 << 18) if gpu == "gfx942" else (32, 1 << 17)
    report = read.measure(case(spill_in_loop_kernel, POINTERS | {"n": "i32"}, {"BLOCK": block}, warps).launch, gpu)
    assert report.stack > 0
    assert report.loop_spills > 0


def test_a_kernel_that_does_not_compile_is_refused():
    wrong = case(wrong_kernel, POINTERS, {"BLOCK": 4})
    assert refused(wrong, "sm_90", pool._measure(("sm_90", wrong)))[0].startswith("does not compile: ")


@triton.jit
def product_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = tl.load(x_ptr + offs)
    tl.store(y_ptr + offs, tl.dot(x, x).to(y_ptr.dtype.element_ty))


def test_a_product_without_tensor_instructions_is_refused(whole_copy):
    halves = case(product_kernel, POINTERS, {"BLOCK": 64})
    assert refused(halves, "sm_90", whole_copy) == ["has no tensor instruction"]
    assert verdict(halves) == []
    assert refused(case(product_kernel, {"x_ptr": "*fp32", "y_ptr": "*fp32"}, {"BLOCK": 64}), "sm_90", whole_copy) == []


@pytest.fixture
def of_one_step(monkeypatch):
    """The command's cases are the launches of one training step."""
    step = dict(programs.units())["train bf16"]
    made = [Case(f"{launch.name.removesuffix('_kernel')} train bf16", launch)
            for launch in {launch.name: launch for launch in recorded(("", step), "sm_90").launches}.values()]
    monkeypatch.setattr(table, "cases", lambda arch: made)


def test_the_command_passes_phi1s_kernels_on_one_gpu(of_one_step, capsys):
    assert main(["bench", "static", "--all", "--arch", "sm_90", "--only", "layer_norm_forward train bf16"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"static gate, Triton {triton.__version__}: all 1 pass"


@pytest.mark.parametrize(
    ("arguments", "interpret", "message"),
    [
        (["--arch", "sm_70"], "0", "invalid choice: 'sm_70'"),
        (["--only", "no such kernel"], "0", "no case has this in its name"),
        ([], "1", "TRITON_INTERPRET is set"),
        (["--check", "--update"], "0", "--check compiles nothing"),
        (["--accept", ""], "0", "--accept takes a reason, and goes alone"),
        (["--accept", "why", "--check"], "0", "--accept takes a reason, and goes alone"),
        (["--jobs", "0"], "0", "--jobs must be at least 1"),
        (["--triton", "/nowhere"], "0", "there is no triton in this folder"),
    ],
)
def test_bad_usage_exits_with_2_and_a_line(of_one_step, monkeypatch, capsys, arguments, interpret, message):
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    with pytest.raises(SystemExit) as stop:
        raise SystemExit(main(["bench", "static", *arguments]))
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("phi1 bench static: error: ")
    assert message in err
