"""SHA256SUMS of an exported model: `sha256sum -c SHA256SUMS` and `phi1 verify` compare its files with it."""

from __future__ import annotations

import hashlib
from pathlib import Path

NAME = "SHA256SUMS"
CARD = "README.md"
"""The model card. It is prose that its owner may edit, so a changed one is no damage."""


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write(folder: Path) -> None:
    """Write the hashes of all files of a folder."""
    files = sorted(path for path in folder.iterdir() if path.name != NAME)
    (folder / NAME).write_text("".join(f"{sha256(path)}  {path.name}\n" for path in files), encoding="utf-8")


def read(folder: Path) -> dict[str, str]:
    """Return name -> hash, as they were written; empty if there is no SHA256SUMS.

    Raises:
        ValueError: it is damaged.
    """
    try:
        lines = (folder / NAME).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return {}
    except UnicodeDecodeError:
        raise ValueError(f"{folder / NAME} is damaged: it is no UTF-8 text") from None
    found = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    if not all(len(digest) == 64 and name and Path(name).name == name for name, digest in found.items()):
        raise ValueError(f"{folder / NAME} is damaged: each line must hold a SHA-256 and a file's name")
    return found


def find_damage(folder: Path) -> str | None:
    """Describe the first file of an export that is not as it was written; None if there is none, or no SHA256SUMS."""
    try:
        for name, digest in read(folder).items():
            if name != CARD and sha256(folder / name) != digest:
                return f"{name} is not as it was written (SHA-256 differs)"
    except ValueError as error:
        return str(error).removeprefix(f"{folder}/")
    except OSError as error:
        return f"{Path(error.filename).name}: {error.strerror}"
    return None
