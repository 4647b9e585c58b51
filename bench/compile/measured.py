"""Compile cases of the tiles that were measured on a GPU: each row of `kernels/tuned/gpus/*.json` at its own shape."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import phi1.kernels
from phi1.bench.compile import attention, block, cross_entropy, elementwise, layer_norm, linear, rotary
from phi1.bench.compile.case import Case
from phi1.kernels.core import tiles

FOLDER = Path(phi1.kernels.__path__[0]) / "tuned" / "gpus"
FAMILIES = {
    "attention": attention,
    "block": block,
    "linear_cross_entropy": cross_entropy,
    "epilogue": elementwise,
    "layer_norm": layer_norm,
    "linear": linear,
    "mlp": linear,
    "rotary": rotary,
}
# Where a row is for a range of sizes, phi-1's if it is one of them, and else the largest.
PHI1 = {"head_size": 64, "inner": 8192, "rows": 16_384, "half": 16, "vocab": 51_200, "width": 2048}
Row = tuple[str, str, str, Mapping[str, Any]]
"""(name of the GPU's file, operation, kernel, row)."""


def cases(arch: str) -> list[Case]:
    """Those of the rows of an architecture, also of its rows for GPUs that are of none."""
    found: list[Case] = []
    for row in _rows():
        try:
            found += _cases_of(row, arch) if _compiled_as(row) == arch else []
        except (KeyError, TypeError):  # `not_compiled` names it
            continue
    return found


def not_compiled() -> list[str]:
    """A line for each row that an operation would read, and that has no case."""
    lines = []
    for row in _rows():
        name, op, kernel, facts = row
        try:
            _cases_of(row, _compiled_as(row))
        except (KeyError, TypeError) as error:
            what = json.dumps(facts)
            lines.append(f"tuned/gpus/{name}.json: {op} {kernel} {what} has no case: {type(error).__name__}: {error}")
    return lines


def _rows() -> Iterator[Row]:
    for path in sorted(FOLDER.glob("*.json")):
        try:
            table = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is no JSON: {error}") from None
        for op, kernels in table.items():
            for kernel, rows in kernels.items():
                yield from ((path.stem, op, kernel, row) for row in rows)


def _compiled_as(row: Row) -> str:
    """The architecture whose instructions the GPU's are."""
    name, _, _, facts = row
    if facts["gpu"] == "any":
        return "sm_80" if name.startswith("nvidia") else "gfx942"
    return {arch: arch for arch in tiles.ARCHITECTURES}[facts["gpu"]]


def _cases_of(row: Row, arch: str) -> list[Case]:
    name, op, kernel, facts = row
    family = FAMILIES[op]
    if kernel not in tiles.table(op):
        raise KeyError(kernel)
    if "cublas" in facts["tile"]:
        return []
    with tiles.forced(op, kernel, facts["tile"]):
        made = family.at(arch, kernel, {size: _value(size, rule) for size, rule in facts["when"].items()})
    when = " ".join(f"{size}={json.dumps(rule)}" for size, rule in facts["when"].items())
    return [replace(case, name=f"{case.name} on {name} {when}".rstrip()) for case in made]


def _value(name: str, rule: Any) -> Any:
    if not isinstance(rule, list):
        return rule
    return PHI1[name] if rule[0] <= PHI1[name] <= rule[1] else rule[1]
