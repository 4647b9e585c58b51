"""Upload an exported model to the Hugging Face Hub."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from phi1.arguments import require, shown
from phi1.weights import checksums
from phi1.weights.files import read_json, weight_files
from phi1.weights.folder import is_saved

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_PLACE = re.compile(r'^model = "\."$', re.MULTILINE)  # in the code of a model card


def files_to_push(folder: Path) -> list[Path]:
    """Return the files of a model that belong on the Hub: those that `save` writes, and the model card.

    Raises:
        FileNotFoundError: there is no configuration, or no weights.
        ValueError: a file is not as it was written.
    """
    read_json(folder / "config.json")
    weight_files(folder)
    if damage := checksums.find_damage(folder):
        raise ValueError(f"push: {folder}: {damage}")
    return [path for path in sorted(folder.iterdir())
            if path.is_file() and (is_saved(path.name) or path.name == checksums.CARD)]


def check_repository(repository: str) -> None:
    """Raise ValueError unless a text is the name of a repository on the Hub."""
    require(_REPOSITORY.fullmatch(repository) is not None, "push", "the repository must be OWNER/NAME, of letters, "
            "digits, '.', '-' and '_'", shown(repository))


def push(folder: Path, repository: str, *, private: bool = False, report: Callable[[str], None] = print) -> None:
    """Upload the files of `files_to_push` in one commit. The repository is made if it is not there.

    In the code of the model card, the folder becomes the repository's name.

    Raises:
        FileNotFoundError, ValueError: as `files_to_push` and `check_repository`.
        OSError: the Hub refused, or could not be reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    check_repository(repository)
    operations: list[Any] = [CommitOperationAdd(path.name, _content(path, repository))
                             for path in files_to_push(folder)]
    try:
        api = HfApi()
        report(f"uploading {len(operations)} files to {repository}")
        api.create_repo(repository, private=private or None, exist_ok=True)
        done = api.create_commit(repository, operations, commit_message="Upload the model with phi1")
    except Exception as error:  # errors of the Hub, its HTTP client and the system: a dozen types
        status = getattr(getattr(error, "response", None), "status_code", None)
        reason = "no permission; log in with `hf auth login`, or set HF_TOKEN to a token that may write" \
            if status in (401, 403) or type(error).__name__ == "LocalTokenNotFoundError" \
            else " ".join(str(error).split()) or type(error).__name__
        raise OSError(f"push: {repository}: {reason}") from error
    report(f"uploaded to {done.commit_url}")


def _content(path: Path, repository: str) -> bytes | str:
    """Return the path of a file, or the bytes of one that changes on its way: the card, and the line of its hash."""
    import hashlib

    card = path.parent / checksums.CARD
    if path.name not in (checksums.CARD, checksums.NAME) or not card.is_file():
        return str(path)
    text = _PLACE.sub(f'model = "{repository}"', card.read_text(encoding="utf-8")).encode()
    if path.name == checksums.CARD:
        return text
    hashes = checksums.read(path.parent) | {checksums.CARD: hashlib.sha256(text).hexdigest()}
    return "".join(f"{digest}  {name}\n" for name, digest in hashes.items()).encode()
