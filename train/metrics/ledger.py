"""ledger.jsonl: one line a step, so that a run can be checked and compared long after it ended.

A line holds what a replay reproduces bit for bit (step, loss, lr, norm, scale, skipped, hash of the sample ids) and,
apart from it under "measured", what depends on the day (tokens/s, memory, and MFU where the GPU is known). A line
{"start": ...} is written each time the run starts or resumes, with versions, commit, the recipe and what changed in it;
{"eval": ...} and {"humaneval": ...} after each evaluation, {"saved": step} after each checkpoint, once a step: what a
run does again after a stop or a kill is not noted again.
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

if TYPE_CHECKING:
    from phi1.train.metrics.loggers import Logger
    from phi1.train.step.trainer import Outcome

# Loggers draw curves; the ledger alone is complete.
LOG_EVERY = 10
KINDS = ("start", "step", "eval", "humaneval", "saved")


class Ledger:
    """Appends to a run's ledger, line by line, so that a killed process loses none.

    Args:
        path: the file; made if it is not there.
        finished: steps that the checkpoint to go on from has finished; later lines are cut off.
        loggers: where curves are drawn as well.

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
        """Note what the run starts or resumes with: facts, versions, commit, the recipe and what changed in it."""
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
        """Note that a checkpoint of `step` finished steps is there, and force all lines to the disk."""
        self._write_once("saved", step, {"saved": step, "measured": measured})
        with contextlib.suppress(OSError):  # a full disk, which _write reports
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Raises RunError if lines were never written."""
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
            except Exception as error:  # other people's code, on a disk that may be full: no reason to end a run
                self._loggers.remove(logger)
                say(f"warning: {logger.name} at step {step}: {error}; from here on it is left out")

    def _write_once(self, kind: str, step: int, line: dict[str, Any]) -> None:
        if (kind, step) not in self._noted:
            self._noted.add((kind, step))
            self._write(line)

    def _write(self, line: dict[str, Any]) -> None:
        """Write a line and what waits before it. While the disk is full they wait; the first time that is raised."""
        were_waiting = bool(self._waiting)
        self._waiting += (json.dumps(_without_nan(line)) + "\n").encode()
        try:
            while self._waiting:
                del self._waiting[:self._file.write(self._waiting)]
        except OSError as error:
            if not were_waiting:
                raise RunError(f"{self.path}: cannot be written: {error.strerror}; its lines wait in memory") from None


def as_line(outcome: Outcome) -> dict[str, Any]:
    """What a replay reproduces of a step's line, as it reads back."""
    return _without_nan(asdict(outcome))


def cut_back(path: Path, finished: int) -> set[tuple[str, int]]:
    """Remove the lines of steps after `finished`, and what follows a damaged line; all at once, whatever ends that.

    Returns:
        What the others speak of: ("eval", 20) for the evaluation after step 20.
    """
    left: set[tuple[str, int]] = set()
    sweep(path)
    if not path.exists():
        return left
    kept = []
    with open(path, "rb") as file:
        for raw in file:
            what = _subject(raw)
            if what is None:
                break
            if what[1] <= finished:  # after a later step too: that a checkpoint is there, which steps do not wait for
                left.add(what)
                kept.append(raw)
    content = b"".join(kept)
    if len(content) < path.stat().st_size:
        write_file(path, content.decode())
    return left


def has_saved(path: Path) -> bool:
    """Whether a checkpoint was ever saved. A run that was killed before its first may begin anew, others may not."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return any(raw.startswith(b'{"saved"') for raw in file)


def last_config(path: Path) -> dict[str, Any] | None:
    """The recipe of the newest start; None in a ledger without one."""
    found = None
    with open(path, "rb") as file:
        for raw in file:
            if raw.startswith(b'{"start"'):
                found = json.loads(raw)["start"].get("config")
    return found


def read_ledger(path: Path) -> list[dict[str, Any]]:
    """All lines but one that is cut short at the end; those of steps have the key "step"."""
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.endswith("\n")]


def _subject(raw: bytes) -> tuple[str, int] | None:
    """What a line speaks of, and of which step; None for a line that is cut short or is not the ledger's."""
    try:
        line = json.loads(raw) if raw.endswith(b"\n") else None
    except ValueError:
        return None
    kind, content = next(iter(line.items()), ("", None)) if isinstance(line, dict) else ("", None)
    if isinstance(content, dict):
        content = content.get("finished" if kind == "start" else "step", 0)
    return (kind, content) if kind in KINDS and isinstance(content, int) else None


def _without_nan(value: Any) -> Any:
    """JSON has no NaN and no infinity: null stands for them."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
