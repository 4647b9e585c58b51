"""Which cases the tuner times, what their kernels look up in the tables, and the tiles that there are for those."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import phi1.kernels
from phi1.bench import check
from phi1.bench.case import Case, Inputs
from phi1.bench.cases import select
from phi1.bench.op_count import counting
from phi1.bench.runner import bind
from phi1.bench.tune_store import Tile
from phi1.kernels import _tuned
from phi1.kernels._tuned import Lookup

DIRECTIONS = ("forward", "backward")


def chosen_cases(kind: str, ops: Sequence[str], dtype: str) -> list[Case]:
    """The cases that are tuned, the short selection first; a backward that is not timed by itself with its forward."""
    cases = [case for case in select(kind, ops, ("kernel", "block")) if case.dtype == dtype]
    alone = {(case.op, str(case.shape)) for case in cases if case.direction == "backward"}
    tuned = [case for case in cases if case.direction in DIRECTIONS
             or (case.direction == "forward+backward" and (case.op, str(case.shape)) not in alone)]
    return sorted(tuned, key=lambda case: not case.quick)


def lookups_on_paper(case: Case, arch: str) -> list[Lookup]:
    """What a case would look up on a GPU, found on tensors without values: nothing is compiled for it."""
    device = torch.device("meta")
    with counting(arch), _tuned.recorded() as lookups:
        inputs = check.leaves_of(case, case.inputs(device, torch.Generator()))
        outputs = check.as_tuple(case.providers[0].prepare(case, device)(inputs))
        if case.direction in check.GRADIENTS:
            leaves = [inputs[name] for name in case.leaves if inputs[name] is not None]
            torch.autograd.grad(outputs, leaves, [torch.empty_like(out) for out in outputs])
        return list(dict.fromkeys(lookups))


def all_candidates() -> dict[str, dict[str, list[Tile]]]:
    """Module -> kernel -> tiles: the CANDIDATES of every file of kernels."""
    names = [module.name for module in pkgutil.iter_modules(phi1.kernels.__path__) if module.name.endswith("_triton")]
    modules = {name: importlib.import_module(f"phi1.kernels.{name}") for name in names}
    return {name: module.CANDIDATES for name, module in modules.items() if hasattr(module, "CANDIDATES")}


def candidates_of(lookup: Lookup) -> list[Tile]:
    """The tiles to try for a kernel: those of the file that has a kernel of this name, and where several have, of the
    file whose name has most in common with the operation's and the kernel's."""
    words = set(f"{lookup.op}_{lookup.kernel}".split("_"))
    found = [(len(words & set(name.split("_"))), tiles[lookup.kernel])
             for name, tiles in all_candidates().items() if lookup.kernel in tiles]
    shared, tiles = max(found, key=lambda item: item[0], default=(0, []))
    return tiles if shared or len(found) == 1 else []


@dataclass(frozen=True)
class Task:
    """One kernel at one shape, as one case looks it up."""

    case: Case
    lookup: Lookup
    row: dict[str, Any]
    tiles: tuple[Tile, ...]
    """The table's own tile first."""


def tasks_of(cases: Sequence[Case], device: torch.device,
             look: Callable[[Case], list[Lookup]] | None = None) -> list[Task]:
    """Every lookup that the cases make, once, with more than one tile to choose from.

    Args:
        cases: the most important first.
        device: where.
        look: finds a case's lookups; by default the case runs.
    """
    found: dict[Lookup, Task] = {}
    for case in cases:
        for lookup in look(case) if look else _lookups(case, device):
            row = _tuned.first_fit(lookup.op, lookup.kernel, "", _tuned.architecture(device), lookup.shape)
            own = row["tile"]
            tiles = [own, *(tile for tile in candidates_of(lookup) if tile != own)]
            if len(tiles) > 1 and lookup not in found:
                found[lookup] = Task(case, lookup, row, tuple(tiles))
    return list(found.values())


def _lookups(case: Case, device: torch.device) -> list[Lookup]:
    call = bind(case, case.providers[0].prepare(case, device), [inputs_of(case, device)])
    with _tuned.recorded() as lookups:
        call(0)
    return lookups


def inputs_of(case: Case, device: torch.device) -> Inputs:
    """The same each time."""
    return case.inputs(device, torch.Generator(device).manual_seed(1))
