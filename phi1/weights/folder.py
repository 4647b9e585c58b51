"""The folder of a saved model: filled beside its place, then put there whole."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from phi1.atomic import NEW, publish, sweep, workspace
from phi1.weights import checksums

_SAVED = ("config.json", "generation_config.json", "model.safetensors", "model-*-of-*.safetensors",
          "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
          "vocab.json", "merges.txt", "added_tokens.json", checksums.NAME)


@contextlib.contextmanager
def filled(folder: Path, replace: bool, card: str | None = None) -> Iterator[Path]:
    """Yield a temporary folder that replaces `folder` at the end, or is removed if the block fails.

    With the text of a model card, README.md and SHA256SUMS are added at the end.
    """
    folder = Path(os.path.realpath(folder))
    sweep(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"save: {folder} is a file; give an empty or new folder")
    if folder.is_dir():
        _check_own(folder, folder, replace)
    with workspace(folder) as work:
        new = work / NEW
        new.mkdir()
        yield new
        if card is not None:
            (new / checksums.CARD).write_text(card, encoding="utf-8")
            checksums.write(new)
        for path in new.iterdir():
            path.chmod(new.stat().st_mode & 0o666)  # safetensors makes files that only their owner may read
            _flush(path)
        if not publish(work, folder, (lambda old: _check_own(old, folder, replace)) if replace else None):
            raise ValueError(f"save: {folder} must be new or empty, and has got files since; give another folder")


def _check_own(found: Path, folder: Path, replace: bool) -> None:
    """Refuse to replace `folder`, whose entries are now in `found`, unless `save` wrote all of them."""
    names = [path.name for path in sorted(found.iterdir())]
    foreign = [name for name in names if not (replace and (is_saved(name) or _is_own_card(found, name)))]
    if foreign:
        raise ValueError(f"save: {folder} holds other files ({', '.join(foreign[:3])}); give an empty or new folder")


def is_saved(name: str) -> bool:
    """Return True for the name of a file of a saved model, other than its card."""
    return any(Path(name).match(pattern) for pattern in _SAVED)


def _is_own_card(folder: Path, name: str) -> bool:
    """Return True for a model card as it was written; one that was edited is its owner's."""
    try:
        return name == checksums.CARD and checksums.read(folder).get(name) == checksums.sha256(folder / name)
    except (ValueError, OSError):
        return False


def _flush(path: Path) -> None:
    """Write a file to the disk, so that a rename never precedes its content."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
