"""The registry: all that is benchmarked, compiled by the gate, tuned or run by the GPU script.

Each module of FAMILIES returns its cases from `cases()`; `harness/case.py` says what a case is. A family is listed here
and nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from phi1.bench.cases import attention, block, host, linear, loss, model, norm
from phi1.bench.harness.case import UNITS, Case

FAMILIES = (norm, attention, linear, loss, block, model, host)


@cache
def all_cases() -> tuple[Case, ...]:
    """Every case, on every device, in the order of UNITS."""
    found = [case for family in FAMILIES for case in family.cases()]
    names = [case.name for case in found]
    repeated = sorted({name for name in names if names.count(name) > 1})
    assert not repeated, f"cases share a name: {repeated}"
    return tuple(sorted(found, key=lambda case: UNITS.index(case.unit)))


def operations() -> list[str]:
    """Names of operations and units that have cases."""
    return list(dict.fromkeys(case.op for case in all_cases()))


def select(device: str, ops: Sequence[str] = (), units: Sequence[str] = (), text: str = "",
           quick: bool = False) -> list[Case]:
    """The cases for a kind of device.

    Args:
        device: "cpu" or "cuda".
        ops: names of operations or units; empty for all.
        units: of UNITS; empty for all.
        text: a part of the case's name.
        quick: only the short selection.

    Raises:
        ValueError: an operation that has no case, or no case is left.
    """
    unknown = sorted(set(ops) - set(operations()))
    if unknown:
        raise ValueError(f"--op: there is no case of {unknown[0]!r}; there are {', '.join(operations())}")
    chosen = [case for case in all_cases()
              if device in case.devices and (not ops or case.op in ops) and (not units or case.unit in units)
              and text in case.name and (case.quick or not quick)]
    if not chosen:
        raise ValueError(f"no case for the {device} has this operation, unit and name; `phi1 bench --list` lists them")
    return chosen
