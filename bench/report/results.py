"""Results files: small JSON, one a run, under bench/results/<machine>/<date>-<commit>.json."""

from __future__ import annotations

import datetime
import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

from phi1.bench.harness.environment import ROOT, machine_name
from phi1.bench.harness.files import locked, replace
from phi1.user_files import read_json

FORMAT = "phi1 bench 1"
FOLDER = ROOT / "bench" / "results"
CASE = ("case", "op", "unit", "direction", "shape", "dtype", "bytes", "flops", "readme", "roof", "providers")
"""Keys of every record of a case, also of one that failed."""


class ResultsFile:
    """A run's results, written after every case, so that a run that is cut short has lost nothing.

    Args:
        path: the file; None keeps the results in memory.
        facts: of `environment`.
        settings: how the run was asked for.
        beside: keep an existing file of that name; the first case takes the next free name, such as NAME.2.json.

    A run that a lost GPU has ended continues in its file if machine, commit and settings are the same. Finished cases
    are kept, and a provider that lost the GPU is not run again, in this run or in a later one.
    """

    def __init__(self, path: Path | None, facts: dict[str, Any], settings: dict[str, Any], *,
                 beside: bool = False) -> None:
        self.path, self._to_be_named = path, beside
        self.content: dict[str, Any] = {"format": FORMAT, "date": today(), "environment": facts, "settings": settings}
        before = {} if beside else _earlier(path, facts, settings)
        if "lost" in before:
            self.content["lost"] = before["lost"]
        cut = any("cut" in record for record in before.get("cases", []))
        self.content["cases"] = before["cases"] if cut else []
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            if beside:
                tempfile.TemporaryFile(dir=path.parent).close()  # a folder that is not writable is said now, not then
            else:
                self._write()

    @property
    def finished(self) -> set[str]:
        """Names of the cases that need not be run."""
        return {record["case"] for record in self.content["cases"] if "cut" not in record}

    @property
    def lost(self) -> dict[tuple[str, str], str]:
        """(case, provider) that took a GPU's context with them -> how."""
        return lost_in(self.content)

    def add(self, record: dict[str, Any]) -> None:
        """Append a case's record, in the place of one that was cut short, and write the file."""
        cases = self.content["cases"]
        cases[:] = [other for other in cases if other["case"] != record["case"]] + [record]
        self._write()

    def add_cut(self, record: dict[str, Any], provider: str, reason: str) -> None:
        """Append the record of a case in which a provider took the GPU's context with it."""
        cases = self.content.pop("cases")
        self.content.setdefault("lost", []).append([record["case"], provider, reason])
        self.content["cases"] = cases
        self.add(record)

    def _write(self) -> None:
        if self.path is None:
            return
        if not self._to_be_named:
            replace(self.path, as_text(self.content))
            return
        with locked(self.path.parent):
            self.path = _free(self.path)
            replace(self.path, as_text(self.content))
        self._to_be_named = False


def lost_in(content: dict[str, Any]) -> dict[tuple[str, str], str]:
    """(case, provider) that took a GPU's context with them -> how."""
    return {(case, provider): reason for case, provider, reason in content.get("lost", [])}


def _earlier(path: Path | None, facts: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """The content that an earlier run of the same kind left after losing a GPU; empty if there is none."""
    if path is None or not path.is_file():
        return {}
    try:
        content = read(path)
    except ValueError:
        return {}
    same = content["environment"] == facts and content["settings"] == settings
    return content if same and "lost" in content else {}


def _free(path: Path) -> Path:
    names = (path.with_name(f"{path.stem}.{number}{path.suffix}") for number in itertools.count(2))
    return next(name for name in itertools.chain([path], names) if not name.exists())


def as_text(content: dict[str, Any]) -> str:
    """JSON with a line for each provider of each case, so that a changed number is one line of a diff."""
    def inner(value: Any) -> str:
        return json.dumps(value, ensure_ascii=False)

    head = [f" {inner(key)}: {inner(value)}" for key, value in content.items() if key != "cases"]
    cases = []
    for record in content["cases"]:
        facts = ", ".join(f"{inner(key)}: {inner(value)}" for key, value in record.items() if key != "providers")
        rows = ",\n   ".join(inner(entry) for entry in record["providers"])
        cases.append(f"  {{{facts},\n   \"providers\": [\n   {rows}]}}")
    return "{\n" + ",\n".join([*head, ' "cases": [\n' + ",\n".join(cases) + "\n ]"]) + "\n}\n"


def standard_path(facts: dict[str, Any], date: str = "") -> Path:
    """The place in the repository for results of that date (today)."""
    return FOLDER / machine_name(facts) / f"{date or today()}-{facts['commit']}.json"


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
        content = read_json(path)
    except ValueError as error:
        raise ValueError(f"{path} is not a results file: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path} is not a results file of `phi1 bench`: it has no format {FORMAT!r}")
    if lacking := _lacking(content):
        raise ValueError(f"{path} is not a whole results file of `phi1 bench`: it lacks {lacking}")
    return content


def _lacking(content: dict[str, Any]) -> str:
    """The first key that a results file must have and this one lacks, or has with another kind of value."""
    for key, kind in (("date", str), ("environment", dict), ("settings", dict), ("cases", list)):
        if not isinstance(content.get(key), kind):
            return key
    facts = content["environment"]
    machine = ("gpu",) if facts.get("device") == "cuda" else ("cpu", "cores", "threads")
    for key in ("device", *machine, "torch", "triton", "commit"):
        if key not in facts:
            return f"environment.{key}"
    for number, record in enumerate(content["cases"]):
        for key in CASE:
            if not isinstance(record, dict) or key not in record:
                return f"cases[{number}].{key}"
        for place, entry in enumerate(record["providers"]):
            if not isinstance(entry, dict) or not {"provider", "status"} <= entry.keys():
                return f"cases[{number}].providers[{place}]: provider or status"
    return ""


def right(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The entries whose times count, by provider."""
    return {entry["provider"]: entry for entry in record["providers"] if entry["status"] == "ok"}


def gather(folder: Path) -> Path:
    """Merge the results in a folder, from one machine and one commit, into one file in its standard place.

    Cases that an existing file has and the folder lacks stay. A case that was run several times is the record in which
    most providers succeeded; providers that succeeded only in another record are added, with the times and ratios of
    that run. Returns the file.

    Raises:
        ValueError: there are no results, or they are of several machines or commits.
    """
    files = sorted(path for path in folder.rglob("*.json") if f'"format": "{FORMAT}"' in path.read_text("utf-8"))
    contents = [content for content in map(read, files) if content["cases"]]
    if not contents:
        raise ValueError(f"there are no results of `phi1 bench` in {folder}")
    origins = sorted({(machine_name(content["environment"]), content["environment"]["commit"])
                      for content in contents})
    if len(origins) > 1:
        raise ValueError(f"{folder} has results of several machines or commits: "
                         + ", ".join(f"{machine} at {commit}" for machine, commit in origins))
    runs: dict[str, list[dict[str, Any]]] = {}
    for content in contents:
        for record in content["cases"]:
            runs.setdefault(record["case"], []).append(record)
    first = min(contents, key=lambda content: content["date"])
    path = standard_path(first["environment"], first["date"])
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.parent):
        kept = [record for record in read(path)["cases"] if record["case"] not in runs] if path.exists() else []
        replace(path, as_text(first | {"cases": [_merged(found) for found in runs.values()] + kept}))
        for sweep in folder.rglob("train.json"):  # by gpu/train_sweep.py; `phi1 plan` reads it
            replace(path.with_name(f"{path.stem}-train.json"), sweep.read_text("utf-8"))
    return path


def _merged(records: list[dict[str, Any]]) -> dict[str, Any]:
    """One record of several runs of a case."""
    first, *others = sorted(records, key=lambda record: -len(right(record)))
    entries = {entry["provider"]: entry for entry in first["providers"]}
    for other in others:
        entries |= {name: entry for name, entry in right(other).items() if name not in right(first)
                    and name != "phi1"}
    return first | {"providers": list(entries.values())}
