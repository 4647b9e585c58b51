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
from collections.abc import Iterator, Mapping
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
Allowed = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""Kernel -> fault -> {"reason": words, architecture: number, or case -> number}."""


@cache
def allowed(path: Path = FILE) -> Allowed:
    return tomllib.loads(path.read_text()) if path.is_file() else {}


def complaints(case: Case, arch: str, report: Report, accepted: Allowed | None = None) -> list[str]:
    """Why this kernel is refused on this GPU; empty if it is not."""
    accepted = allowed() if accepted is None else accepted
    found = []
    for fault, value in _faults(case, arch, report).items():
        known = accepted.get(_group(case), {}).get(fault, {}).get(arch, 0)
        most = known.get(_short(case), 0) if isinstance(known, Mapping) else known
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


def _group(case: Case) -> str:
    kernel = case.launch.name.removesuffix("_kernel")
    kind = " candidate" if case.candidate else f" {ODD}" if ODD in case.name else ""
    return kernel + kind


def _short(case: Case) -> str:
    return case.name.partition(" ")[2]


def needed(compiled: Iterator[tuple[Case, str, Report]], before: Allowed, reason: str = "") -> dict[str, Any]:
    """Exactly what lets these reports through; reasons are those of `before`, and `reason` where it has none."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for case, arch, report in compiled:
        group = _group(case)
        for fault, value in _faults(case, arch, report).items():
            if not value:
                continue
            known = before.get(group, {}).get(fault, {}).get("reason", reason)
            entry = found.setdefault(group, {}).setdefault(fault, {"reason": known})
            if fault in OF_A_KERNEL:
                entry[arch] = max(value, entry.get(arch, 0))
            else:
                cases = entry.setdefault(arch, {})
                cases[_short(case)] = max(value, cases.get(_short(case), 0))
    return found


def unneeded(compiled: Iterator[tuple[Case, str, Report]], accepted: Allowed) -> list[str]:
    """A line for each allowance that no report needs, or not as much of."""
    wanted, lines = needed(compiled, accepted), []
    for group, fault, arch, case, value in _entries(accepted):
        known = wanted.get(group, {}).get(fault, {}).get(arch, 0)
        most = known.get(case, 0) if isinstance(known, Mapping) else known
        if value > most:
            where = " ".join(filter(None, (group, case, "on", arch)))
            lines.append(f"{FILE.name} allows {fault} {value} of {where}, and {most} is needed; --accept mends it")
    return lines


def _entries(accepted: Allowed) -> Iterator[tuple[str, str, str, str, int]]:
    for group, faults in accepted.items():
        for fault, entry in faults.items():
            for arch, value in entry.items():
                if arch != "reason":
                    by_case = value if isinstance(value, Mapping) else {"": value}
                    yield from ((group, fault, arch, case, most) for case, most in by_case.items())


def dumps(accepted: Allowed) -> str:
    """The file's text: a case or an architecture is a line, so that a change reads well in a diff."""
    blocks = []
    for group, faults in sorted(accepted.items()):
        for fault, entry in sorted(faults.items()):
            name = f"{json.dumps(group)}.{fault}"
            lines = [f"[{name}]", f"reason = {json.dumps(entry['reason'], ensure_ascii=False)}"]
            archs = [(arch, entry[arch]) for arch in ARCHS if arch in entry]
            lines += [f"{arch} = {value}" for arch, value in archs if not isinstance(value, Mapping)]
            for arch, cases in archs:
                if isinstance(cases, Mapping):
                    lines += [f"[{name}.{arch}]", *(f"{json.dumps(case)} = {n}" for case, n in sorted(cases.items()))]
            blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"
