"""Compile one launch for a GPU that this machine need not have, and read what the assembler has made of it: registers,
spills, accesses, tensor instructions, and its complaint of serialised ones.

The table's keys depend on this file, because a row is what this file reads: see `key.py`.
"""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from phi1.bench.compile.arch import ARCHS, Report
from phi1.bench.harness.counting import Launch


def measure(launch: Launch, arch: str) -> Report:
    """Compile one launch for one GPU. Raises what the compiler raises."""
    names = launch.kernel.arg_names
    source = ASTSource(
        launch.kernel,
        signature={name: launch.types.get(name, "constexpr") for name in names},
        constexprs=dict(launch.constants),
        # Without the alignment that a launch finds out, vector loads vanish.
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in launch.aligned},
    )
    gpu = ARCHS[arch]
    target = GPUTarget(gpu.backend, gpu.version, gpu.warp)
    compiled, log = _compiled(source, target, launch.options)
    warps = compiled.metadata.num_warps
    if "cubin" in compiled.asm:
        assembly = compiled.asm["ptx"]
        registers, stack, loop_spills = _nvidia_usage(compiled.asm["cubin"])
        accesses = list(_ptx_accesses(assembly))
        threads = re.search(r"\.reqntid (\d+)", assembly)
        warps = int(threads[1]) // 32 if threads else warps
    else:
        assembly = compiled.asm["amdgcn"]
        registers, stack, loop_spills = _amd_usage(assembly)
        accesses = list(_amd_accesses(assembly))
    return Report(
        registers, stack, loop_spills, compiled.metadata.shared, warps,
        tensor_instructions=len(re.findall(gpu.tensor_instruction, assembly)),
        serialised=len(re.findall(r"wgmma\.mma_async instructions are serialized", log)),
        loads=_widths(accesses, "load"), stores=_widths(accesses, "store"),
    )


def _compiled(source: ASTSource, target: GPUTarget, options: Mapping[str, Any]) -> tuple[Any, str]:
    """(what Triton has compiled, what ptxas has said). Triton prints the log where it is asked to, and only of what it
    compiles: nothing is taken from its cache."""
    out = io.StringIO()
    knobs = triton.knobs
    with knobs.nvidia.scope(), knobs.compilation.scope(), contextlib.redirect_stdout(out):
        knobs.nvidia.dump_ptxas_log = True
        knobs.compilation.always_compile = True
        return triton.compile(source, target=target, options=dict(options)), out.getvalue()


def _nvidia_usage(cubin: bytes) -> tuple[int, int, int]:
    """(registers, bytes of stack, accesses to the stack in innermost loops)."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        usage = re.search(r"REG:(\d+) STACK:(\d+)", text)
        assert usage, f"cuobjdump says nothing of registers: {text}"
        if not int(usage[2]):
            return int(usage[1]), 0, 0
        sass = subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout
    code = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(\S.*?);", sass)]
    branches = [(at, re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)) for at, text in code]
    loops = [(int(to[1], 16), at) for at, to in branches if to and int(to[1], 16) < at]
    return int(usage[1]), int(usage[2]), _in_innermost(loops, [at for at, t in code if re.search(r"\b(LDL|STL)\b", t)])


def _amd_usage(assembly: str) -> tuple[int, int, int]:
    # The metadata at the end of the assembly. Scratch is in bytes, spilled registers are counted. Spilled scalar
    # registers do not count: they go to lanes of vector registers, and to scratch, which does, where those run out.
    values = {
        name: int(value)
        for name, value in re.findall(
            r"\.(vgpr_count|vgpr_spill_count|private_segment_fixed_size): +(\d+)", assembly
        )
    }
    lines = assembly.splitlines()
    labels = {line.partition(":")[0]: at for at, line in enumerate(lines) if line.startswith(".LBB")}
    branches = [(at, re.search(r"s_c?branch\w* (\.LBB\w+)", line)) for at, line in enumerate(lines)]
    loops = [(labels[to[1]], at) for at, to in branches if to and labels.get(to[1], at) < at]
    in_loops = _in_innermost(loops, [at for at, line in enumerate(lines) if "scratch_" in line and "\ts" in line])
    return values["vgpr_count"], max(4 * values["vgpr_spill_count"], values["private_segment_fixed_size"]), in_loops


def _in_innermost(loops: Sequence[tuple[int, int]], places: Sequence[int]) -> int:
    """How many places lie in a loop (first, last) that has no other loop inside."""
    inner = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    return sum(any(first <= at <= last for first, last in inner) for at in places)


def _widths(accesses: Sequence[tuple[str, int]], kind: str) -> dict[int, int]:
    return dict(sorted(Counter(width for which, width in accesses if which == kind).items()))


def _ptx_accesses(ptx: str) -> Iterator[tuple[str, int]]:
    for kind, modifiers in re.findall(r"\b(ld|st)\.global([.\w:]*)", ptx):
        element = re.search(r"\.[bfus](\d+)$", modifiers)
        vector = re.search(r"\.v(\d)\b", modifiers)
        assert element, f"unknown access {kind}.global{modifiers}"
        yield {"ld": "load", "st": "store"}[kind], int(element[1]) // 8 * int(vector[1] if vector else 1)
    # Copies to shared memory behind the program's back: of 16 bytes a thread, or of whole tiles. Statistics of rows are
    # copied so in 4 bytes, which is as it should be.
    yield from [("load", 16)] * len(re.findall(r"\bcp\.async\.cg\.shared\.global", ptx))
    for to in re.findall(r"\bcp(?:\.reduce)?\.async\.bulk\.tensor\.\dd\.(shared|global)", ptx):
        yield "load" if to == "shared" else "store", 128


def _amd_accesses(assembly: str) -> Iterator[tuple[str, int]]:
    for kind, size in re.findall(r"\b(?:global|buffer)_(load|store)_(\w+)", assembly):
        dwords = re.match(r"dwordx?(\d?)", size)
        yield kind, 4 * int(dwords[1] or 1) if dwords else 2
