"""ledger.jsonl: one line per step, so that a run can be checked and compared long after it ended.

A step's line holds the values that a replay reproduces bit for bit (step, loss, lr, norm, scale, skipped, hash of the
sample ids) and, apart from them under "measured", the others (tokens/s, memory, and MFU if the GPU is known).
{"start": ...} is written each time the run starts or resumes, with versions, commit, the recipe and its changes;
{"eval": ...} and {"humaneval": ...} after each evaluation; {"saved": step} after each checkpoint. The last three are
written once a step, even if a stop or a kill makes the run repeat them.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phi1.atomic import sweep, write_file
from phi1.train.runtime.launch import RunError, say
from phi1.train.runtime.provenance import changed, commit, versions
from phi1.user_files import open_regular, parse_json

if TYPE_CHECKING:
    from phi1.train.metrics.loggers import Logger
    from phi1.train.step.trainer import Outcome

LOG_EVERY = 10  # steps between points of the loggers' curves; the ledger holds every step
KINDS = ("start", "step", "eval", "humaneval", "saved")


class Ledger:
    """Appends to a run's ledger, line by line, so that a killed process loses none.

    Args:
        path: the file; made if it is not there.
        finished: finished steps of the checkpoint that the run resumes from; later lines are cut off.
        loggers: they draw the curves.

    Raises:
        RunError: the file cannot be written.
    """

    def __init__(self, path: Path, finished: int, loggers: Sequence[Logger] = ()) -> None:
        self.path = path
        self._loggers = list(loggers)
        self._waiting = bytearray()
        try:
            self._noted = cut_back(path, finished)
            kept = max((step for _, step in self._noted), default=0)
            if kept < finished:
                say(f"warning: {path}: nothing readable after step {kept:,}; what it said of the steps up to "
                    f"{finished:,} is lost")
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (open as long as the run)
        except OSError as error:
            raise RunError(f"{path}: cannot be written: {error.strerror}; once that is mended, the same command goes "
                           "on, or give another --run.folder") from None

    def start(self, facts: dict[str, Any], config: dict[str, Any]) -> None:
        """Note a start of the run: facts, versions, commit, the recipe and its changes."""
        before = last_config(self.path)
        self._write({"start": facts | {"versions": versions(), "commit": commit(), "config": config,
                                       "changed": changed(before, config) if before else {}}})

    def step(self, outcome: Outcome, measured: dict[str, float]) -> None:
        """Note a step."""
        self._write(as_line(outcome) | {"measured": measured})
        if outcome.step % LOG_EVERY == 0:
            self._draw(outcome.step, {"train/loss": outcome.loss, "train/lr": outcome.lr, "train/norm": outcome.norm,
                                      "train/scale": outcome.scale} | measured)

    def evaluation(self, step: int, figures: dict[str, float]) -> None:
        """Note an evaluation after `step` finished steps."""
        self._write_once("eval", step, {"eval": {"step": step} | figures})
        self._draw(step, {f"validation/{name}": value for name, value in figures.items()})

    def humaneval(self, step: int, solved: float, problems: int) -> None:
        """Note pass@1 on HumanEval after `step` finished steps."""
        self._write_once("humaneval", step, {"humaneval": {"step": step, "pass@1": solved, "problems": problems}})
        self._draw(step, {"validation/humaneval": solved})

    def saved(self, step: int, measured: dict[str, float]) -> None:
        """Note a checkpoint of `step` finished steps, and force all lines to the disk."""
        self._write_once("saved", step, {"saved": step, "measured": measured})
        with contextlib.suppress(OSError):  # a full disk, which _write reports
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file and the loggers. Raises RunError if lines were never written."""
        self._file.close()
        if self._waiting:
            raise RunError(f"{self.path}: its last {self._waiting.count(10)} lines could not be written")
        for logger in self._loggers:
            try:
                logger.close()
            except Exception as error:  # as in _draw
                say(f"warning: {logger.name}: {error}")

    def _draw(self, step: int, figures: dict[str, float]) -> None:
        for logger in tuple(self._loggers):
            try:
                logger.draw(step, figures)
            except Exception as error:  # third-party code, on a disk that may be full: no reason to end a run
                self._loggers.remove(logger)
                say(f"warning: {logger.name} at step {step}: {error}; from here on it is left out")

    def _write_once(self, kind: str, step: int, line: dict[str, Any]) -> None:
        if (kind, step) not in self._noted:
            self._noted.add((kind, step))
            self._write(line)

    def _write(self, line: dict[str, Any]) -> None:
        """Write the waiting lines and this one. While the disk is full they wait; the first failure alone raises."""
        were_waiting = bool(self._waiting)
        self._waiting += (json.dumps(_without_nan(line)) + "\n").encode()
        try:
            while self._waiting:
                del self._waiting[:self._file.write(self._waiting)]
        except OSError as error:
            if not were_waiting:
                raise RunError(f"{self.path}: cannot be written: {error.strerror}; its lines wait in memory") from None


def as_line(outcome: Outcome) -> dict[str, Any]:
    """Return the part of a step's line that a replay reproduces, as it reads back."""
    return _without_nan(asdict(outcome))


def cut_back(path: Path, finished: int) -> set[tuple[str, int]]:
    """Remove the lines of steps after `finished`, and all from a damaged line on, by one rename.

    Returns:
        The subjects of the other lines: ("eval", 20) for the evaluation after step 20.
    """
    left: set[tuple[str, int]] = set()
    sweep(path)
    if not path.exists():
        return left
    kept = []
    with open_regular(path) as file:
        for raw in file:
            what = _subject(raw)
            if what is None:
                break
            if what[1] <= finished:  # also after later steps' lines: a checkpoint is noted while training continues
                left.add(what)
                kept.append(raw)
    content = b"".join(kept)
    if len(content) < path.stat().st_size:
        write_file(path, content.decode())
    return left


def has_saved(path: Path) -> bool:
    """Return True if a checkpoint was ever saved. Only a run killed before its first checkpoint may begin anew."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return any(raw.startswith(b'{"saved"') for raw in file)


def last_config(path: Path) -> dict[str, Any] | None:
    """Return the recipe of the newest start; None in a ledger without one."""
    found = None
    with open(path, "rb") as file:
        for raw in file:
            if raw.startswith(b'{"start"'):
                found = json.loads(raw)["start"].get("config")
    return found


def read_ledger(path: Path) -> list[dict[str, Any]]:
    """Read all lines, except an incomplete one at the end; lines of steps have the key "step"."""
    with open_regular(path) as file:
        return [parse_json(line) for line in file if line.endswith(b"\n")]


def _subject(raw: bytes) -> tuple[str, int] | None:
    """Return a line's kind and step; None for a line that is incomplete or not the ledger's."""
    try:
        line = parse_json(raw) if raw.endswith(b"\n") else None
    except ValueError:
        return None
    kind, content = next(iter(line.items()), ("", None)) if isinstance(line, dict) else ("", None)
    if isinstance(content, dict):
        content = content.get("finished" if kind == "start" else "step", 0)
    return (kind, content) if kind in KINDS and isinstance(content, int) else None


def _without_nan(value: Any) -> Any:
    """Replace NaN and infinity, which JSON does not have, by null."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
