"""Checkpoint folders: their names, the choice of one to resume from, and the check that it is undamaged.

`checkpoints/step-N/` appears by one rename, complete or not at all, with a manifest of every file's size and SHA-256.
PyTorch's own checkpoint format does not notice a flipped byte, so the files are compared with the manifest first.
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
from phi1.user_files import LARGEST_JSON, open_regular, parse_json, read_file, read_json

MANIFEST = "manifest.json"
STATE = "trainer.json"
LEDGER = "ledger.jsonl"
_NAME = re.compile(r"step-\d+")


def checkpoint_name(step: int) -> str:
    return f"step-{step}"


def step_of(checkpoint: Path) -> int:
    """Return the step in a checkpoint's name."""
    return int(checkpoint.name.removeprefix("step-"))


def checkpoints(folder: Path) -> list[Path]:
    """List the checkpoints in `folder`, oldest step first. Unfinished ones have other names."""
    return sorted((path for path in folder.glob("step-*") if _NAME.fullmatch(path.name)), key=step_of)


def choose(folder: Path, resume: str, report: Callable[[str], None] = say) -> Path | None:
    """Choose the checkpoint to resume from, and verify it; None to start from the beginning.

    Args:
        folder: the run's checkpoints/.
        resume: "auto" for the newest undamaged one, or a checkpoint's name. Damaged newer ones are renamed.
        report: called with a line for each that is renamed.

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
                report(f"warning: checkpoint {wrong} is damaged: {what}; it is now {_put_aside(wrong)}, and the run "
                       f"goes on from {path.name}")
            return path
        damaged[path] = damage
    if damaged:
        newest, damage = next(iter(damaged.items()))
        others = f", and so are {', '.join(path.name for path in list(damaged)[1:])}" if len(damaged) > 1 else ""
        raise RunError(f"checkpoint {newest} is damaged: {damage}{others}; there is no other: give another "
                       f"--run.folder, or remove {folder} and {folder.parent / LEDGER} to start over")
    return None


def _put_aside(damaged: Path) -> str:
    """Rename a damaged checkpoint, and return its new name. Raises RunError if it cannot be renamed."""
    aside = damaged.with_name(f"damaged-{damaged.name}")
    try:
        if aside.is_dir() and not aside.is_symlink():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.unlink(missing_ok=True)
        damaged.rename(aside)
    except OSError as error:
        raise RunError(f"checkpoint {damaged} is damaged, and cannot be renamed to {aside.name}: {error.strerror}; "
                       "once one of the two is gone, the same command goes on") from None
    return aside.name


class Notes(dict[str, Any]):
    """The values in JSON beside a checkpoint's tensors: step, scaler, recipe, data, environment.

    Raises:
        RunError: a key is read that an older or newer version of the trainer did not write.
    """

    def __init__(self, checkpoint: Path) -> None:
        self._path = checkpoint
        try:
            notes = read_json(checkpoint / STATE)
        except ValueError as error:
            raise RunError(f"checkpoint {checkpoint}: {STATE}: {error}") from None
        if not isinstance(notes, dict) or not isinstance(notes.get("defining", {}), dict):
            raise RunError(f"checkpoint {checkpoint}: {STATE} does not hold what a trainer notes there")
        super().__init__(notes)

    def __missing__(self, key: str) -> NoReturn:
        raise RunError(f"checkpoint {self._path} was written by another version of phi1, which noted no {key!r} in "
                       f"{STATE}; go on with that version, or begin another --run.folder")


def describe(path: Path, written: bool = True) -> list[int | str]:
    """Return the size and SHA-256 of a file. If it has just been `written`, force it to the disk."""
    with open_regular(path) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if written:  # not every file system has an fsync for files that are only read
            os.fsync(file.fileno())
        return [file.tell(), digest]


def write_manifest(checkpoint: Path, files: dict[str, list[int | str]]) -> None:
    (checkpoint / MANIFEST).write_text(_manifest_text(files), encoding="utf-8")
    describe(checkpoint / MANIFEST)


def find_damage(checkpoint: Path) -> str | None:
    """Describe the damage of a checkpoint's files in a few words; None if each is as it was written."""
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
    """Read the size and SHA-256 of each file; None if the manifest is not as it was written."""
    text = read_file(path, LARGEST_JSON).decode(errors="replace")
    try:
        files = parse_json(text)["files"]
        if text == _manifest_text(files) and all(_is_entry(*entry) for entry in files.values()):
            return files
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    return None


def _is_entry(size: Any, digest: Any) -> bool:
    return isinstance(size, int) and isinstance(digest, str)


def _manifest_text(files: dict[str, list[int | str]]) -> str:
    listed = json.dumps(files, indent=1, sort_keys=True)
    own = hashlib.sha256(listed.encode()).hexdigest()  # reveals a flipped byte in the manifest itself
    return f'{{"files": {listed},\n"sha256": "{own}"}}\n'


def commit(temporary: Path, final: Path, files: dict[str, list[int | str]]) -> None:
    """Add the manifest to the written files, give the checkpoint its name, and force the name to the disk."""
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
    """Restore the name of a checkpoint that was set aside for a new one of its step, if the new one is not there."""
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
    """Remove old checkpoints, but keep the newest `keep`, every `keep_every`-th step's (0: none) and step `best`'s."""
    for path in checkpoints(folder)[:-keep]:
        step = step_of(path)
        if step != best and not (keep_every and step % keep_every == 0):
            _remove(path)


def remove_after(folder: Path, chosen: Path | None) -> list[str]:
    """Remove checkpoints after the one that the run resumes from, and remains of a killed save, or raise RunError."""
    found = checkpoints(folder)
    later = found[found.index(chosen) + 1 :] if chosen else []
    for path in [*reversed(later), *folder.glob(".step-*.tmp")]:
        if error := _remove(path):
            raise RunError(f"{path} cannot be removed: {error}; once that is mended, the same command goes on")
    return [path.name for path in later]


def _remove(path: Path) -> str | None:
    """Rename a folder, so that nobody reads a part of it or writes into it, and remove it. Returns an error's text."""
    gone = path.with_name(f".step-{secrets.token_hex(4)}.tmp")
    try:
        path.rename(gone)
        shutil.rmtree(gone)
    except OSError as error:
        return error.strerror
    return None
