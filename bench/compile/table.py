"""The committed results of the compiler in `table.json`: Triton version -> architecture -> case -> key and report."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict
from pathlib import Path
from typing import Any

from phi1.bench.compile.arch import ARCHS, Report
from phi1.bench.compile.key import key_of
from phi1.bench.compile.launches import Case, cases
from phi1.bench.harness.files import locked, replace

TABLE = Path(__file__).parent / "table.json"
VERSIONS = ("3.9.0", "3.6.0")
"""The Triton versions whose results are kept: the newest, and the oldest that the package takes."""
Chosen = list[tuple[str, Case]]
"""(architecture, case)."""

Rows = dict[str, dict[str, dict[str, Any]]]
"""Architecture -> case -> {"key", and what differs from an empty Report}."""


def chosen_cases(version: str, archs: Sequence[str] = (), text: str = "") -> Chosen:
    """The cases of a version whose names contain a text. The tuner's candidates are compiled by all but the oldest."""
    return [(arch, case) for arch in archs or ARCHS for case in cases(arch)
            if text in case.name and not (case.candidate and version == VERSIONS[-1])]


def load(version: str, path: Path = TABLE) -> Rows:
    """The rows of one Triton version; empty where there are none."""
    return json.loads(path.read_text()).get(version, {}) if path.is_file() else {}


def load_at(ref: str, version: str, folder: Path = TABLE.parent) -> Rows:
    """The rows of one Triton version as a commit has them.

    Raises:
        LookupError: there is no git, no such commit here, as in a shallow clone, or no table in it that can be read.
    """
    command = ["git", "show", "--end-of-options", f"{ref}:./{TABLE.name}"]
    try:
        shown = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    except FileNotFoundError:
        raise LookupError("there is no git on this machine") from None
    if shown.returncode:
        raise LookupError(f"git: {shown.stderr.strip().partition(chr(10))[0]}")
    try:
        return json.loads(shown.stdout).get(version, {})
    except json.JSONDecodeError as error:
        raise LookupError(f"its {TABLE.name} is no JSON: {error}") from None


def save(version: str, rows: Rows, path: Path = TABLE, *, known: Set[tuple[str, str]] | None = None) -> None:
    """Put rows of one version into the table; others that it holds, perhaps for a minute only, stay.

    Args:
        known: the (architecture, case) that there are: rows of other cases are taken out.
    """
    with locked(path.parent):
        table = json.loads(path.read_text()) if path.is_file() else {}
        held = table.setdefault(version, {})
        for arch, named in rows.items():
            held[arch] = held.get(arch, {}) | named
        if known is not None:
            table[version] = {arch: {name: row for name, row in named.items() if (arch, name) in known}
                              for arch, named in held.items()}
        replace(path, _dumps(table))


def _dumps(table: Mapping[str, Rows]) -> str:
    """A row is a line, so that a change reads well in a diff."""
    blocks = []
    for name in sorted(table, reverse=True):
        archs = [
            f'  "{arch}": {{\n' + ",\n".join(
                f"   {json.dumps(case)}: {json.dumps(row)}" for case, row in sorted(table[name][arch].items())
            ) + "\n  }"
            for arch in ARCHS if arch in table[name]
        ]
        blocks.append(f' "{name}": {{\n' + ",\n".join(archs) + "\n }")
    return "{\n" + ",\n".join(blocks) + "\n}\n"


def row_of(case: Case, arch: str, report: Report) -> dict[str, Any]:
    """A report with its key, without what is empty."""
    return {"key": key_of(case.launch, arch)} | {name: value for name, value in asdict(report).items() if value}


def report_of(row: Mapping[str, Any]) -> Report:
    """The report that `row_of` has written."""
    widths = {name: {int(width): count for width, count in row.get(name, {}).items()} for name in ("loads", "stores")}
    return Report(**{name: value for name, value in row.items() if name != "key"} | widths)


def stale(rows: Rows, chosen: Chosen) -> Chosen:
    """The (architecture, case) that the rows do not hold, or hold with another key."""
    return [(arch, case) for arch, case in chosen
            if rows.get(arch, {}).get(case.name, {}).get("key") != key_of(case.launch, arch)]


def left_over(rows: Rows, chosen: Chosen) -> list[str]:
    """Rows of cases that there are no more."""
    known = {(arch, case.name) for arch, case in chosen}
    return [f"{name} on {arch}" for arch, named in rows.items() for name in named if (arch, name) not in known]
