"""Results files: small JSON, one a run, under bench/results/<machine>/<date>-<commit>.json."""

from __future__ import annotations

import datetime
import json
import os
from pathlib import Path
from typing import Any

from phi1.bench.environment import ROOT, machine_name

FORMAT = "phi1 bench 1"
FOLDER = ROOT / "bench" / "results"


class ResultsFile:
    """A run's results, written after every case, so that a run that is cut short has lost nothing.

    Args:
        path: the file; None keeps the results in memory.
        facts: of `environment`.
        settings: how the run was asked for.
    """

    def __init__(self, path: Path | None, facts: dict[str, Any], settings: dict[str, Any]) -> None:
        self.path = path
        self.content: dict[str, Any] = {"format": FORMAT, "date": today(), "environment": facts, "settings": settings,
                                        "cases": []}
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._write()

    def add(self, record: dict[str, Any]) -> None:
        """Append a case's record and write the file."""
        self.content["cases"].append(record)
        self._write()

    def _write(self) -> None:
        if self.path is None:
            return
        if self.path.exists() and not self.path.is_file():  # a pipe or a device, which a rename would replace
            self.path.write_text(as_text(self.content), encoding="utf-8")
            return
        temporary = self.path.with_name(self.path.name + ".tmp")
        temporary.write_text(as_text(self.content), encoding="utf-8")
        os.replace(temporary, self.path)


def as_text(content: dict[str, Any]) -> str:
    """JSON with a line for each provider of each case: small, and a change of one number is one line of a diff."""
    def inner(value: Any) -> str:
        return json.dumps(value, ensure_ascii=False)

    head = [f" {inner(key)}: {inner(value)}" for key, value in content.items() if key != "cases"]
    cases = []
    for record in content["cases"]:
        facts = ", ".join(f"{inner(key)}: {inner(value)}" for key, value in record.items() if key != "providers")
        rows = ",\n   ".join(inner(entry) for entry in record["providers"])
        cases.append(f"  {{{facts},\n   \"providers\": [\n   {rows}]}}")
    return "{\n" + ",\n".join([*head, ' "cases": [\n' + ",\n".join(cases) + "\n ]"]) + "\n}\n"


def standard_path(facts: dict[str, Any]) -> Path:
    """Where a run's results belong in the repository."""
    return FOLDER / machine_name(facts) / f"{today()}-{facts['commit']}.json"


def today() -> str:
    """The date in UTC."""
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def read(path: Path) -> dict[str, Any]:
    """A results file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no results file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a results file: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path} is not a results file of `phi1 bench`: it has no format {FORMAT!r}")
    return content
