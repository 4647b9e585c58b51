"""Checkpoint folders: which there are, which one to go on from, and whether it is whole.

`checkpoints/step-N/` appears by one rename, complete or not at all, with a manifest of every file's size and SHA-256.
PyTorch's own checkpoint format does not notice a flipped byte, so nothing is loaded before the manifest holds.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from phi1.train.runtime.launch import RunError, say

MANIFEST = "manifest.json"
STATE = "trainer.json"
LEDGER = "ledger.jsonl"
_NAME = re.compile(r"step-\d+")


def checkpoint_name(step: int) -> str:
    return f"step-{step}"


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint's name says."""
    return int(checkpoint.name.removeprefix("step-"))


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest step first. Unfinished ones have other names."""
    return sorted((path for path in folder.glob("step-*") if _NAME.fullmatch(path.name)), key=step_of)


def choose(folder: Path, resume: str, report: Callable[[str], None] = say) -> Path | None:
    """The checkpoint to go on from, whole and verified; None to start from the beginning.

    Args:
        folder: the run's checkpoints/.
        resume: "auto" for the newest that is whole, or a checkpoint's name. Newer ones that are damaged are put aside.
        report: called with a line for each that is put aside.

    Raises:
        RunError: no such checkpoint, or it is damaged, or all are; one line says which file and what to do.
    """
    found = checkpoints(folder)
    if resume == "auto":
        return _newest_whole(folder, found, report)
    path = folder / resume
    if path not in found:
        there = ", ".join(other.name for other in found) or "none"
        raise RunError(f"checkpoint.resume: there is no {resume} in {folder}; there: {there}")
    if damage := find_damage(path):
        raise RunError(f"checkpoint {path} is damaged: {damage}; go on from the newest that is whole with "
                       "--checkpoint.resume auto")
    return path


def _newest_whole(folder: Path, found: list[Path], report: Callable[[str], None]) -> Path | None:
    damaged: dict[Path, str] = {}
    for path in reversed(found):
        damage = find_damage(path)
        if not damage:
            for wrong, what in damaged.items():
                aside = wrong.with_name(f"damaged-{wrong.name}")
                shutil.rmtree(aside, ignore_errors=True)
                wrong.rename(aside)
                report(f"warning: checkpoint {wrong} is damaged: {what}; it is now {aside.name}, and the run goes on "
                       f"from {path.name}")
            return path
        damaged[path] = damage
    if damaged:
        newest, damage = next(iter(damaged.items()))
        others = f", and so are {', '.join(path.name for path in list(damaged)[1:])}" if len(damaged) > 1 else ""
        raise RunError(f"checkpoint {newest} is damaged: {damage}{others}; there is no other: give another "
                       f"--run.folder, or remove {folder} and {folder.parent / LEDGER} to start over")
    return None


class Notes(dict[str, Any]):
    """What rank 0 noted beside a checkpoint's tensors: step, scaler, recipe, data, environment.

    Raises:
        RunError: something is asked for that an older or newer version of the trainer did not note.
    """

    def __init__(self, checkpoint: Path) -> None:
        super().__init__(json.loads((checkpoint / STATE).read_text(encoding="utf-8")))
        self._path = checkpoint

    def __missing__(self, key: str) -> NoReturn:
        raise RunError(f"checkpoint {self._path} was written by another version of phi1, which noted no {key!r} in "
                       f"{STATE}; go on with that version, or begin another --run.folder")


def describe(path: Path, written: bool = True) -> list[int | str]:
    """Size and SHA-256 of a file, which is forced to the disk on the way where it has just been `written`."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if written:  # not where it is only read: not every file system has an fsync of that
            os.fsync(file.fileno())
        return [file.tell(), digest]


def write_manifest(checkpoint: Path, files: dict[str, list[int | str]]) -> None:
    (checkpoint / MANIFEST).write_text(_manifest_text(files), encoding="utf-8")
    describe(checkpoint / MANIFEST)


def find_damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, in a few words; None if each is as it was written."""
    name = MANIFEST
    try:
        files = _read_manifest(checkpoint / MANIFEST)
        if files is None:
            return f"{MANIFEST} is not as it was written"
        if extra := set(os.listdir(checkpoint)) - files.keys() - {MANIFEST}:
            return f"{min(extra)} is not one of its files"
        for name, (size, digest) in files.items():
            if (now := os.stat(checkpoint / name).st_size) != size:
                return f"{name} has {now} bytes where {size} were written"
            if describe(checkpoint / name, written=False)[1] != digest:
                return f"{name} is not as it was written (SHA-256 differs)"
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        return f"{name} is missing" if missing else f"{name} cannot be read: {error.strerror}"
    return None


def _read_manifest(path: Path) -> dict[str, list[Any]] | None:
    """Size and SHA-256 of each file; None if the manifest is not as it was written."""
    text = path.read_bytes().decode(errors="replace")
    try:
        files = json.loads(text)["files"]
        return files if text == _manifest_text(files) else None
    except (ValueError, KeyError, TypeError):
        return None


def _manifest_text(files: dict[str, list[int | str]]) -> str:
    listed = json.dumps(files, indent=1, sort_keys=True)
    own = hashlib.sha256(listed.encode()).hexdigest()  # so that a flipped byte in the manifest shows as well
    return f'{{"files": {listed},\n"sha256": "{own}"}}\n'


def commit(temporary: Path, final: Path, files: dict[str, list[int | str]]) -> None:
    """Add the manifest to what has been written, give the checkpoint its name, and make the name durable."""
    write_manifest(temporary, files)
    sync_folder(temporary)
    aside = final.with_name(f".{final.name}.old.tmp")
    try:
        if final.exists():  # the same step again
            final.rename(aside)
        temporary.rename(final)
    finally:
        give_back(final.parent)
    sync_folder(final.parent)
    if aside.exists():
        _remove(aside)


def give_back(folder: Path) -> None:
    """Give a checkpoint its name again that was put aside for another of its step, where that did not take it."""
    for aside in folder.glob(".step-*.old.tmp"):
        final = aside.with_name(aside.name[1:].removesuffix(".old.tmp"))
        if not final.exists():
            aside.rename(final)


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def prune(folder: Path, keep: int, keep_every: int = 0, best: int | None = None) -> None:
    """Remove all but the newest `keep` checkpoints, every `keep_every`-th step's (0: none) and that of step `best`."""
    for path in checkpoints(folder)[:-keep]:
        step = step_of(path)
        if step != best and not (keep_every and step % keep_every == 0):
            _remove(path)


def remove_after(folder: Path, chosen: Path | None) -> list[str]:
    """Remove what lies after the checkpoint that the run goes on from, and what a killed save has left behind.

    Raises:
        RunError: something cannot be removed.
    """
    found = checkpoints(folder)
    later = found[found.index(chosen) + 1 :] if chosen else []
    for path in [*reversed(later), *folder.glob(".step-*.tmp")]:
        if error := _remove(path):
            raise RunError(f"{path} cannot be removed: {error}; once that is mended, the same command goes on")
    return [path.name for path in later]


def _remove(path: Path) -> str | None:
    """Remove a folder, after it has another name: nobody takes a part of it for a checkpoint, or writes into it.

    Returns:
        What has kept it from that.
    """
    gone = path.with_name(f".step-{secrets.token_hex(4)}.tmp")
    try:
        path.rename(gone)
        shutil.rmtree(gone)
    except OSError as error:
        return error.strerror
    return None
