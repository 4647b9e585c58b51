"""The gate's verdict on a compiled kernel: what it refuses, and what `allowed.toml` lets through.

Refused are: a kernel that does not compile; spilled registers, and accesses to them in a main loop; more shared memory
than the GPU has, which Triton itself does not refuse; global loads or stores under 16 bytes; a product without tensor
instructions; wgmma instructions that ptxas has serialised. How fast a kernel is, the gate cannot say.

`allowed.toml` holds what is known and accepted, with a reason. [kernel.fault] has a number for each architecture: the
most in any case of the kernel or, by case, in one. A kernel's tiles that no table picks, and its cases of odd sizes,
stand apart from the others. The file only shrinks: what is allowed and not needed is refused as well, and
`--accept REASON` writes exactly what the table needs.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from phi1.bench.compile.arch import ARCHS, WIDE, Report, narrow
from phi1.bench.compile.key import multiplies
from phi1.bench.compile.launches import Case

FILE = Path(__file__).with_name("allowed.toml")
MESSAGES = {
    "error": "does not compile: {error}",
    "no_tensor": "has no tensor instruction",
    "serialised": "ptxas has serialised its wgmma instructions, {allowed} times allowed",
    "stack": "spills {value} bytes a thread, {allowed} allowed",
    "loop_spills": "{value} accesses to spilled registers in a main loop, {allowed} allowed",
    "shared": "needs {value} bytes of shared memory, over {limit}",
    "narrow_loads": f"{{value}} global loads under {WIDE} bytes, {{allowed}} allowed",
    "narrow_stores": f"{{value}} global stores under {WIDE} bytes, {{allowed}} allowed",
}
OF_A_KERNEL = ("narrow_loads", "narrow_stores")
"""Allowed for a whole kernel: statistics of rows and columns, which each case has a few of."""
ODD = "odd sizes"
"""In the names of programs whose rows are not aligned, and are read element by element."""
Key = tuple[str, str, str, str]
"""(kernel, fault, architecture, case): the case is "" for the faults of OF_A_KERNEL."""


@dataclass(frozen=True)
class Allowed:
    """How much of a fault is allowed, and by kernel and fault the reason."""

    most: Mapping[Key, int] = field(default_factory=dict)
    reasons: Mapping[tuple[str, str], str] = field(default_factory=dict)


@cache
def allowed(path: Path = FILE) -> Allowed:
    return parsed(tomllib.loads(path.read_text())) if path.is_file() else Allowed()


def parsed(content: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Allowed:
    """The file's content: kernel -> fault -> {"reason": words, architecture: number, or case -> number}."""
    most: dict[Key, int] = {}
    entries = {(kernel, fault): entry for kernel, faults in content.items() for fault, entry in faults.items()}
    for (kernel, fault), entry in entries.items():
        for arch in entry.keys() & ARCHS.keys():
            cases = {"": entry[arch]} if fault in OF_A_KERNEL else entry[arch]
            most |= {(kernel, fault, arch, case): value for case, value in cases.items()}
    return Allowed(most, {key: entry["reason"] for key, entry in entries.items()})


def complaints(case: Case, arch: str, report: Report, accepted: Allowed | None = None) -> list[str]:
    """Why this kernel is refused on this GPU; empty if it is not."""
    accepted = allowed() if accepted is None else accepted
    found = []
    for fault, value in _faults(case, arch, report).items():
        most = accepted.most.get(_key(case, fault, arch), 0)
        if value > most:
            found.append(MESSAGES[fault].format(value=value, allowed=most, error=report.error,
                                                limit=ARCHS[arch].shared_limit))
    if not report.error:
        found += [f"no global {kind} were found in the assembly"
                  for kind, accesses in (("loads", report.loads), ("stores", report.stores)) if not accesses]
    return found


def _faults(case: Case, arch: str, report: Report) -> dict[str, int]:
    """Fault -> how much of it; what is 0 is none."""
    if report.error:
        return {"error": 1}
    launch = case.launch
    halves = any(kind in ("*fp16", "*bf16") for kind in launch.types.values())
    return {
        "no_tensor": int(not report.tensor_instructions and halves and multiplies(launch.kernel)),
        "serialised": report.serialised,
        "stack": report.stack,
        "loop_spills": report.loop_spills,
        "shared": report.shared if report.shared > ARCHS[arch].shared_limit else 0,
        "narrow_loads": narrow(report.loads),
        "narrow_stores": narrow(report.stores),
    }


def _key(case: Case, fault: str, arch: str) -> Key:
    kernel, _, program = case.name.partition(" ")
    kind = " candidate" if case.candidate else f" {ODD}" if ODD in case.name else ""
    return kernel + kind, fault, arch, "" if fault in OF_A_KERNEL else program


def needed(compiled: Iterable[tuple[Case, str, Report]], before: Allowed, reason: str = "") -> Allowed:
    """Exactly what lets these reports through; reasons are those of `before`, and `reason` where it has none."""
    most: dict[Key, int] = {}
    for case, arch, report in compiled:
        for fault, value in _faults(case, arch, report).items():
            if value:
                key = _key(case, fault, arch)
                most[key] = max(value, most.get(key, 0))
    return Allowed(most, {key[:2]: before.reasons.get(key[:2], reason) for key in most})


def unneeded(compiled: Iterable[tuple[Case, str, Report]], accepted: Allowed) -> list[str]:
    """A line for each allowance that no report needs, or not as much of."""
    wanted = needed(compiled, accepted).most
    return [f"{FILE.name} allows {fault} {value} of {' '.join(filter(None, (kernel, case)))} on {arch}, and "
            f"{wanted.get((kernel, fault, arch, case), 0)} is needed; --accept mends it"
            for (kernel, fault, arch, case), value in accepted.most.items()
            if value > wanted.get((kernel, fault, arch, case), 0)]


def dumps(accepted: Allowed) -> str:
    """The file's text: a case or an architecture is a line, so that a change reads well in a diff."""
    blocks = []
    for (kernel, fault), reason in sorted(accepted.reasons.items()):
        name = f"{json.dumps(kernel)}.{fault}"
        lines = [f"[{name}]", f"reason = {json.dumps(reason, ensure_ascii=False)}"]
        for arch in ARCHS:
            cases = sorted((key[3], value) for key, value in accepted.most.items() if key[:3] == (kernel, fault, arch))
            if fault in OF_A_KERNEL:
                lines += [f"{arch} = {value}" for _, value in cases]
            elif cases:
                lines += [f"[{name}.{arch}]", *(f"{json.dumps(case)} = {value}" for case, value in cases)]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"
