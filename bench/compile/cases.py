"""What the compile gate compiles: every Triton kernel, at phi-1's shapes and at each tile that its table can pick, also
the table of a GPU on which tiles were measured.

A kernel without a case here is not checked; a new kernel brings a `static_<family>.py` with its cases.
"""

from __future__ import annotations

from phi1.bench.compile import measured
from phi1.bench.compile.case import Case

FAMILIES = tuple(dict.fromkeys(measured.FAMILIES.values()))


def cases(arch: str) -> list[Case]:
    """Every case on an architecture: "sm_80", "sm_90", "sm_100" or "gfx942"."""
    return [*(case for family in FAMILIES for case in family.cases(arch)), *measured.cases(arch)]
