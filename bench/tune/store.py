"""The tuner's files: every trial in a log, so that it can go on where it was stopped, and the winners in a table.

`<gpu>.trials.jsonl` has a line when a trial starts and one when it ends: a trial without an end took the process with
it and is not tried again. `<gpu>.json` is what `phi1.kernels.core.tiles` reads.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import phi1.kernels
from phi1.bench.harness.files import append, lines, lock, replace
from phi1.kernels.core.tiles import Lookup, gpu_file

Tile = Mapping[str, int]
CRASHED = "it took the process with it"


@lru_cache
def sources_hash() -> str:
    """Hash of all kernels' files: a trial says nothing about other code."""
    digest = hashlib.sha256()
    for path in sorted(Path(phi1.kernels.__path__[0]).rglob("*_triton.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def trial_key(lookup: Lookup, tile: Tile, case: str, versions: str) -> str:
    """Names a trial: what was looked up, the tile, the case that was timed, the kernels and the versions."""
    parts = [lookup.op, lookup.kernel, lookup.shape, sorted(tile.items()), case, sources_hash(), versions]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


class InUseError(OSError):
    """Another process has the files."""


class Store:
    """The files of one GPU in a folder, for this process alone until it is closed, or the process ends.

    Args:
        folder: made if it is not there.
        gpu: the GPU's name.

    Raises:
        InUseError: another process has them: what it is trying must not be taken for a trial without an end.
    """

    def __init__(self, folder: Path, gpu: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.table = folder / gpu_file(gpu)
        self.log = self.table.with_suffix(".trials.jsonl")
        self._lock = os.open(self.log, os.O_RDWR | os.O_CREAT, 0o666)
        if not lock(self._lock):
            os.close(self._lock)
            raise InUseError(f"another search is writing {self.log}: wait until it ends, or give another --out")
        self._trials = {entry["key"]: entry for entry in lines(self.log)}

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._lock)

    def trial(self, key: str) -> dict[str, Any] | None:
        """A trial's outcome: its "ms", or its "error". None if it has not been tried."""
        entry = self._trials.get(key)
        if entry is None or "forgotten" in entry:
            return None
        return entry if {"ms", "error"} & set(entry) else {**entry, "error": CRASHED}

    def note(self, key: str, **facts: Any) -> dict[str, Any]:
        """Write a line about a trial; without "ms" or "error" it says that the trial starts."""
        self._trials[key] = {"key": key, **facts}
        append(self.log, self._trials[key])
        return self._trials[key]

    def forget(self, key: str) -> None:
        """Take a trial's start back: what ended it was not the tile."""
        self.note(key, forgotten=True)

    def write_winner(self, lookup: Lookup, when: Mapping[str, Any], tile: Tile, arch: str) -> None:
        """Put a row into the table, in place of one with the same "when". `arch`: whose tiles the GPU takes else."""
        table = json.loads(self.table.read_text()) if self.table.is_file() else {}
        rows = table.setdefault(lookup.op, {}).setdefault(lookup.kernel, [])
        rows[:] = [{"gpu": arch, "when": dict(when), "tile": dict(tile)}] + [row for row in rows if row["when"] != when]
        replace(self.table, _dumps(table))


def _dumps(table: Mapping[str, Mapping[str, list[dict[str, Any]]]]) -> str:
    ops = []
    for op, kernels in sorted(table.items()):
        blocks = [f'  "{kernel}": [\n   ' + ",\n   ".join(json.dumps(row) for row in rows) + "\n  ]"
                  for kernel, rows in sorted(kernels.items())]
        ops.append(f' "{op}": {{\n' + ",\n".join(blocks) + "\n }")
    return "{\n" + ",\n".join(ops) + "\n}\n"


def when_of(lookup: Lookup, row: Mapping[str, Any]) -> dict[str, Any]:
    """Shapes that take a tile that was measured at one of them: the range of the table's row where that has one (its
    author has drawn the borders), and else the value itself."""
    rules = row["when"]
    return {name: rules[name] if isinstance(rules.get(name), list) else value for name, value in lookup.shape}
