"""Checkpoint folders: which there are, which one to go on from, and whether it is whole.

`checkpoints/step-N/` appears by one rename, complete or not at all, with a manifest of every file's size and SHA-256.
PyTorch's own checkpoint format does not notice a flipped byte, so nothing is loaded before the manifest holds.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from phi1.train.launch import RunError

MANIFEST = "manifest.json"
STATE = "trainer.json"
LEDGER = "ledger.jsonl"
_NAME = re.compile(r"step-(\d+)")


def checkpoint_name(step: int) -> str:
    return f"step-{step}"


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest step first. Unfinished ones have other names."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def choose(folder: Path, resume: str) -> Path | None:
    """The checkpoint to go on from, whole and verified; None to start from the beginning.

    Args:
        folder: the run's checkpoints/.
        resume: "auto" for the newest, or a checkpoint's name.

    Raises:
        RunError: no such checkpoint, or it is damaged; one line says which file and what to do.
    """
    found = checkpoints(folder)
    if resume == "auto":
        if not found:
            return None
        chosen = found[-1]
    else:
        by_name = {path.name: path for path in found}
        if resume not in by_name:
            there = ", ".join(by_name) or "none"
            raise RunError(f"checkpoint.resume: there is no {resume} in {folder}; there: {there}")
        chosen = by_name[resume]
    damage = find_damage(chosen)
    if damage:
        others = [path.name for path in found if path != chosen]
        fix = f"go on from an older one with --checkpoint.resume {others[-1]}" if others else \
            f"there is no other: give another --run.folder, or remove {chosen} and {folder.parent / LEDGER} to "\
            "start over"
        raise RunError(f"checkpoint {chosen} is damaged: {damage}; {fix}")
    return chosen


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What rank 0 noted beside the tensors: step, scaler, recipe, data, environment."""
    return json.loads((checkpoint / STATE).read_text(encoding="utf-8"))


def describe(path: Path) -> list[int | str]:
    """Size and SHA-256 of a file, which is forced to the disk on the way."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
        return [file.tell(), digest]


def write_manifest(checkpoint: Path, files: dict[str, list[int | str]]) -> None:
    path = checkpoint / MANIFEST
    path.write_text(_manifest_text(files), encoding="utf-8")
    describe(path)


def find_damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, in a few words; None if each is as it was written."""
    path = checkpoint / MANIFEST
    if not path.is_file():
        return f"{MANIFEST} is missing"
    try:
        text = path.read_text(encoding="utf-8")
        files = json.loads(text)["files"]
        whole = text == _manifest_text(files)
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        return f"{MANIFEST} is not as it was written"
    for name, (size, digest) in files.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes where {size} were written"
        if describe(file)[1] != digest:
            return f"{name} is not as it was written (SHA-256 differs)"
    return None


def _manifest_text(files: dict[str, list[int | str]]) -> str:
    listed = json.dumps(files, indent=1, sort_keys=True)
    own = hashlib.sha256(listed.encode()).hexdigest()  # so that a flipped byte in the manifest shows as well
    return f'{{"files": {listed},\n"sha256": "{own}"}}\n'


def commit(temporary: Path, final: Path) -> None:
    """Give a finished checkpoint its name, and make the name durable."""
    sync_folder(temporary)
    aside = final.with_name(f".{final.name}.old.tmp")
    if final.exists():  # the same step again
        final.rename(aside)
    temporary.rename(final)
    sync_folder(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints."""
    for path in checkpoints(folder)[:-keep]:
        shutil.rmtree(path, ignore_errors=True)


def remove_after(folder: Path, chosen: Path | None) -> list[str]:
    """Remove what lies after the checkpoint that the run goes on from, and what a killed save has left behind."""
    found = checkpoints(folder)
    later = found[found.index(chosen) + 1 :] if chosen else []
    unfinished = list(folder.glob(".step-*.tmp")) if folder.is_dir() else []
    for path in later + unfinished:
        shutil.rmtree(path)
    return [path.name for path in later]
