"""Which cases the tuner times, what their kernels look up in the tables, and the tiles that there are for those."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from phi1.bench.cases.registry import select
from phi1.bench.harness import check
from phi1.bench.harness.case import DIRECTIONS, Case, Inputs
from phi1.bench.harness.runner import bind
from phi1.bench.harness.timing import Call
from phi1.bench.tune.store import Tile
from phi1.kernels.core import tiles as _tuned
from phi1.kernels.core.tiles import Lookup

UNITS = ("kernel", "block")
Lookups = tuple[list[Lookup], list[Lookup]]
"""(lookups of a case's forward, lookups of its backward)."""


def tunable() -> list[str]:
    """Names of the operations that can be tuned."""
    return list(dict.fromkeys(case.op for case in select("cuda", (), UNITS)))


def chosen_cases(kind: str, ops: Sequence[str], dtype: str) -> list[Case]:
    """The cases that are tuned, the short selection first; a backward that is not timed by itself with its forward.

    Those that take gradients come before those that do not, which have the less to write.
    """
    cases = [case for case in select(kind, ops, UNITS)
             if case.dtype == dtype and case.direction in DIRECTIONS[:3]]
    alone = {(case.op, str(case.shape)) for case in cases if case.direction == "backward"}
    tuned = [case for case in cases
             if case.direction != "forward+backward" or (case.op, str(case.shape)) not in alone]
    return sorted(tuned, key=lambda case: (not case.quick, case.direction == "forward"))


def candidates_of(lookup: Lookup) -> list[Tile]:
    """The tiles to try for a kernel; its file, which looks them up, has made them known."""
    return [*_tuned.TILES.get((lookup.op, lookup.kernel), [])]


@dataclass(frozen=True)
class Task:
    """One kernel at one shape, as one case looks it up."""

    case: Case
    lookup: Lookup
    row: dict[str, Any]
    tiles: tuple[Tile, ...]
    """The table's own tile first."""
    direction: str
    """The timed pass: the one that looks the tile up, and no more. The noise of the rest would hide the tile."""

    @property
    def timed(self) -> str:
        """Name of the timed pass."""
        name = self.case.name.replace(f" {self.case.direction}", f" {self.direction}")
        wants = self.direction == "forward" and self.case.direction in check.GRADIENTS
        return name + ", gradients wanted" * wants

    def call(self, device: torch.device, inputs: Inputs) -> Call:
        """The timed call. The forward of a case that takes gradients saves what the backward needs, as in training."""
        function = self.case.providers[0].prepare(self.case, device)
        if self.direction != "forward":
            return bind(replace(self.case, direction=self.direction), function, [inputs])
        leaves = check.leaves_of(self.case, inputs)
        return lambda number: function(leaves)


def tasks_of(cases: Sequence[Case], arch: str, look: Callable[[Case], Lookups]) -> list[Task]:
    """Every lookup that the cases make, once, with more than one tile to choose from.

    Args:
        cases: the most important first.
        arch: of the GPU.
        look: finds a case's lookups.
    """
    found: dict[Lookup, Task] = {}
    for case in cases:
        forward, backward = look(case)
        for lookup in [*forward, *backward]:
            row = _tuned.first_fit(lookup.op, lookup.kernel, "", arch, lookup.shape)
            own = row["tile"]
            tiles = [own, *(tile for tile in candidates_of(lookup) if tile != own)]
            if len(tiles) > 1 and lookup not in found:
                both = "forward+backward" if lookup in forward else case.direction
                found[lookup] = Task(case, lookup, row, tuple(tiles), both if lookup in backward else "forward")
    return list(found.values())
