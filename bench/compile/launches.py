"""The cases of the compile gate: every launch that the programs make, recorded.

On each GPU of the tables: the programs as the tables' tiles launch them; on sm_80 and gfx942 also as GPUs that have no
rows of their own launch them; each tile that was measured on a GPU; and each tile that `phi1 tune` may try. A tile is
forced in a program that looks it up, and what the program then launches is recorded as well.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import phi1.kernels
from phi1.bench.compile import programs
from phi1.bench.compile.programs import Program
from phi1.bench.harness.counting import Launch, counting
from phi1.kernels.core import tiles
from phi1.kernels.core.tiles import Lookup

FOLDER = Path(phi1.kernels.__path__[0]) / "tuned" / "gpus"
TRIED_ON = ("sm_90",)
"""GPUs for which candidates of the tuner are compiled that no table picks: in float16, in the last launch of each of
these programs that takes them."""
TRIED_IN = ("train fp16", "attention fp16 K=64 rotary inside", "linear fp16 N=16384", "elementwise fp16", "rotary fp16")


@dataclass(frozen=True)
class Case:
    """One kernel, specialised as a launch specialises it.

    Args:
        name: what the table and `--only` call it: the kernel, and the first program that launches it so.
        launch: what the compiler is told.
        candidate: a tile that no table picks, and that `phi1 tune` may try.
    """

    name: str
    launch: Launch
    candidate: bool = False


@dataclass(frozen=True)
class Recorded:
    """A program on a GPU: the Triton kernels that it launches, and its lookups in the tables of tiles."""

    launches: tuple[Launch, ...]
    lookups: tuple[Lookup, ...]


def recorded(program: Program, arch: str) -> Recorded:
    """Run a program without computing, as a GPU of an architecture (or "any" other) would."""
    with counting(arch) as counter, tiles.recorded() as lookups:
        program[1]()
    return Recorded(tuple(launch for launch in counter.launches if launch.kernel), tuple(dict.fromkeys(lookups)))


@dataclass
class Cases:
    """Cases without repetitions: what is launched twice is compiled once."""

    found: dict[str, Case] = field(default_factory=dict)

    def add(self, program: str, launches: tuple[Launch, ...], candidate: bool = False) -> None:
        numbers: dict[str, dict[str, int]] = {}
        for launch in launches:
            what, short = content(launch), launch.name.removesuffix("_kernel")
            number = numbers.setdefault(short, {}).setdefault(what, len(numbers[short]) + 1)
            name = f"{short} {program}" + (f" #{number}" if number > 1 else "")
            self.found.setdefault(what, Case(name, launch, candidate))


def content(launch: Launch) -> str:
    """All that the compiler is told of a launch, besides the sources."""
    return json.dumps([launch.name, sorted(launch.types.items()), sorted(launch.constants.items()),
                       sorted(launch.aligned), sorted(launch.options.items())])


@cache
def cases(arch: str) -> tuple[Case, ...]:
    """Every case on an architecture: "sm_80", "sm_90", "sm_100" or "gfx942"."""
    found, ran = Cases(), _ran(arch, arch)
    for (name, _), result in ran:
        found.add(name, result.launches)
    for (name, _), result in _ran(arch, "any"):
        found.add(f"{name} any", result.launches)
    for row in measured():
        if row.arch == arch and not row.fault:
            found.add(row.name, row.launches)
    if arch in TRIED_ON:
        for _, _, name, launches in tried(arch):
            found.add(name, launches, candidate=True)
    return tuple(found.found.values())


@cache
def _ran(arch: str, table: str) -> tuple[tuple[Program, Recorded], ...]:
    """The programs and what they launch on an architecture with its own rows of the tables, or with those for "any"."""
    if table == arch:
        chosen = [*programs.units(), *programs.benchmarks(), *programs.variants()]
    else:
        chosen = [*programs.others(arch)] if arch in ("sm_80", "gfx942") else []
    return tuple((program, recorded(program, table)) for program in chosen)


def reached(arch: str, table: str) -> list[Mapping[str, Any]]:
    """The rows of the tables that programs take on an architecture; table: "any" for GPUs without rows of their own."""
    return [tiles.first_fit(lookup.op, lookup.kernel, "", table, lookup.shape)
            for _, result in _ran(arch, table) for lookup in result.lookups]


@cache
def tried(arch: str) -> tuple[tuple[str, str, str, tuple[Launch, ...]], ...]:
    """(operation, kernel, name, launches) of each candidate of the tuner, in each of a few programs that look it up.
    Only what differs from the launches with the tables' tiles, and of each kernel the last."""
    found = []
    for program, result in _ran(arch, arch):
        if program[0] not in TRIED_IN:
            continue
        as_tables = {content(launch) for launch in result.launches}
        for op, kernel in dict.fromkeys((lookup.op, lookup.kernel) for lookup in result.lookups):
            for tile in tiles.TILES[op, kernel]:
                with tiles.forced(op, kernel, tile):
                    launches = recorded(program, arch).launches
                changed = {launch.name: launch for launch in launches if content(launch) not in as_tables}
                what = " ".join(f"{name}={value}" for name, value in tile.items() if value)
                found.append((op, kernel, f"{program[0]} {what}", tuple(changed.values())))
    return tuple(found)


@dataclass(frozen=True)
class Measured:
    """A row of `kernels/tuned/gpus/*.json`, and what is launched with its tile.

    Args:
        name: of its cases: the file and the shapes that take the tile.
        arch: whose instructions the GPU's are.
        launches: none where the tile leaves its product to cuBLAS.
        fault: why no case can be made of it; "" where one can.
    """

    name: str
    arch: str = ""
    launches: tuple[Launch, ...] = ()
    fault: str = ""


def measured() -> list[Measured]:
    """Every row that was measured on a GPU.

    Raises:
        ValueError: a file is no JSON.
    """
    found = []
    for path in sorted(FOLDER.glob("*.json")):
        try:
            table = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is no JSON: {error}") from None
        for op, kernels in table.items():
            found += [_measured(path.stem, op, kernel, row) for kernel, rows in kernels.items() for row in rows]
    return found


def _measured(stem: str, op: str, kernel: str, row: Mapping[str, Any]) -> Measured:
    try:
        rows = row["gpu"]
        arch = rows if rows != "any" else "sm_80" if stem.startswith("nvidia") else "gfx942"
        when = " ".join(f"{name}={json.dumps(rule)}" for name, rule in row["when"].items())
        program = _asking(op, kernel, row["when"], arch, rows)
        with tiles.forced(op, kernel, row["tile"]):
            launches = recorded(program, rows).launches
        return Measured(f"{program[0]} on {stem} {when}".rstrip(), arch, launches)
    except (KeyError, TypeError) as error:
        fault = f"has no case: {type(error).__name__}: {error}"
        return Measured(f"tuned/gpus/{stem}.json: {op} {kernel} {json.dumps(row)}", fault=fault)


def _asking(op: str, kernel: str, when: Mapping[str, Any], arch: str, table: str) -> Program:
    """The first program that looks up a shape that a row is for; a benchmark's, which the tuner runs, if there is one.

    Raises:
        KeyError: no program does, or the row names a size that the kernel does not look up.
    """
    if arch not in tiles.ARCHITECTURES:
        raise KeyError(arch)
    benchmarks = {name for name, _ in programs.benchmarks()}
    for program, result in sorted(_ran(arch, table), key=lambda item: item[0][0] not in benchmarks):
        for lookup in result.lookups:
            if (lookup.op, lookup.kernel) == (op, kernel) and tiles.fits(lookup.shape, when):
                return program
    raise KeyError(f"no program looks up {op} {kernel} there")
