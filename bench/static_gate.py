"""Compile every Triton kernel for GPUs that this machine need not have, and refuse what would run badly there.

    python bench/static_gate.py [--arch sm_90 ...] [--only layer_norm]

Refused are: a kernel that does not compile; one that spills registers to memory; more shared memory than the GPU has,
which Triton itself does not refuse; global loads or stores under 16 bytes, beyond those the case allows; a product
without tensor instructions. Ends in one line and exit code 0, or 1 if anything is refused. What it cannot say is how
fast a kernel is.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from phi1.bench.static_case import Case
from phi1.bench.static_cases import cases as cases_of


@dataclass(frozen=True)
class Arch:
    """A GPU to compile for, its shared memory in bytes for one program, and what its tensor instructions look like."""

    target: GPUTarget
    shared_limit: int
    tensor_instruction: str


ARCHS = {
    "sm_80": Arch(GPUTarget("cuda", 80, 32), 166_912, r"\bmma\.sync"),
    "sm_90": Arch(GPUTarget("cuda", 90, 32), 232_448, r"\bwgmma\.mma_async"),
    "sm_100": Arch(GPUTarget("cuda", 100, 32), 232_448, r"\btcgen05\.mma"),
    "gfx942": Arch(GPUTarget("hip", "gfx942", 64), 65_536, r"\bv_mfma"),
}
WIDE = 16


@dataclass(frozen=True)
class Report:
    """What the compiler made of a kernel. `stack` is bytes of spilled registers a thread."""

    registers: int
    stack: int
    shared: int
    tensor_instructions: int
    loads: tuple[int, ...]
    stores: tuple[int, ...]

    def narrow(self, accesses: Sequence[int]) -> int:
        return sum(width < WIDE for width in accesses)


def measure(case: Case, arch: str) -> Report:
    """Compile one case for one GPU."""
    names = case.kernel.arg_names
    unknown = (set(case.types) | set(case.constexprs)) - set(names)
    assert not unknown, f"{case.name}: the kernel has no argument {sorted(unknown)}"
    # Without the alignment that a launch finds out, vector loads vanish.
    aligned = [i for i, n in enumerate(names) if case.types.get(n, "").startswith("*") and n not in case.unaligned]
    source = ASTSource(
        case.kernel,
        signature={name: case.types.get(name, "constexpr") for name in names},
        constexprs=dict(case.constexprs),
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=ARCHS[arch].target, options=options)
    if "cubin" in compiled.asm:
        registers, stack = _nvidia_usage(compiled.asm["cubin"])
        assembly = compiled.asm["ptx"]
        loads, stores = _accesses(assembly, _ptx_accesses)
    else:
        registers, stack = _amd_usage(compiled.asm["amdgcn"])
        assembly = compiled.asm["amdgcn"]
        loads, stores = _accesses(assembly, _amd_accesses)
    tensor = len(re.findall(ARCHS[arch].tensor_instruction, assembly))
    return Report(registers, stack, compiled.metadata.shared, tensor, loads, stores)


def complaints(case: Case, arch: str, report: Report) -> list[str]:
    """Why this kernel is refused on this GPU; empty if it is not."""
    limit = ARCHS[arch].shared_limit
    found = []
    if case.tensor_core and not report.tensor_instructions:
        found.append("has no tensor instruction")
    if report.stack > case.spill_bytes:
        found.append(f"spills {report.stack} bytes a thread, {case.spill_bytes} allowed")
    if report.shared > limit:
        found.append(f"needs {report.shared} bytes of shared memory, over {limit}")
    for kind, accesses, allowed in (
        ("loads", report.loads, case.narrow_loads), ("stores", report.stores, case.narrow_stores)
    ):
        narrow = report.narrow(accesses)
        if narrow > allowed:
            found.append(f"{narrow} global {kind} under {WIDE} bytes, {allowed} allowed")
        if not accesses:
            found.append(f"no global {kind} were found in the assembly")
    return found


def _nvidia_usage(cubin: bytes) -> tuple[int, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert usage, f"cuobjdump says nothing of registers: {text}"
    return int(usage[1]), int(usage[2])


def _amd_usage(assembly: str) -> tuple[int, int]:
    # The metadata at the end of the assembly. Scratch is in bytes, spilled registers are counted.
    values = {
        name: int(value)
        for name, value in re.findall(
            r"\.(vgpr_count|vgpr_spill_count|sgpr_spill_count|private_segment_fixed_size): +(\d+)", assembly
        )
    }
    spilled = 4 * (values["vgpr_spill_count"] + values["sgpr_spill_count"])
    return values["vgpr_count"], max(spilled, values["private_segment_fixed_size"])


def _accesses(assembly, find) -> tuple[tuple[int, ...], tuple[int, ...]]:
    found = list(find(assembly))
    return tuple(w for kind, w in found if kind == "load"), tuple(w for kind, w in found if kind == "store")


def _ptx_accesses(ptx: str) -> Iterator[tuple[str, int]]:
    for kind, modifiers in re.findall(r"\b(ld|st)\.global([.\w:]*)", ptx):
        element = re.search(r"\.[bfus](\d+)$", modifiers)
        vector = re.search(r"\.v(\d)\b", modifiers)
        assert element, f"unknown access {kind}.global{modifiers}"
        yield {"ld": "load", "st": "store"}[kind], int(element[1]) // 8 * int(vector[1] if vector else 1)


def _amd_accesses(assembly: str) -> Iterator[tuple[str, int]]:
    for kind, size in re.findall(r"\b(?:global|buffer)_(load|store)_(\w+)", assembly):
        dwords = re.match(r"dwordx?(\d?)", size)
        yield kind, 4 * int(dwords[1] or 1) if dwords else 2


def _check(case: Case, arch: str) -> list[str]:
    label = f"{case.name:44} {arch:7}"
    try:
        report = measure(case, arch)
    except Exception as error:  # whatever the compiler raises is a refusal, and the other kernels are still checked
        if isinstance(error, AssertionError):
            raise
        print(f"{label} REFUSED: does not compile: {error}")
        return [str(error)]
    found = complaints(case, arch, report)
    loads, stores = (f"{len(a) - report.narrow(a)}+{report.narrow(a)}" for a in (report.loads, report.stores))
    verdict = "REFUSED: " + "; ".join(found) if found else "ok"
    print(f"{label} {report.registers:9} {report.stack:6} {report.shared:7} {loads:>7} {stores:>7}  {verdict}")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="static_gate", description=__doc__.partition("\n")[0])
    parser.add_argument("--arch", action="append", choices=list(ARCHS), help="compile for this one; may be repeated")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        parser.error("TRITON_INTERPRET is set: an interpreted kernel cannot be compiled; unset it")
    chosen = [(case, arch) for arch in options.arch or ARCHS for case in cases_of(arch) if options.only in case.name]
    if not chosen:
        parser.error(f"--only {options.only!r}: no case has this in its name")
    print(f"{'kernel':44} {'arch':7} registers  stack  shared   loads  stores  (accesses of {WIDE} bytes + narrower)")
    refused = sum(bool(_check(case, arch)) for case, arch in chosen)
    outcome = f"{refused} of {len(chosen)} refused" if refused else f"all {len(chosen)} pass"
    print(f"static gate, Triton {triton.__version__}: {outcome}")
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
