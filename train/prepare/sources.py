"""Sources of documents: the standard library, folders of Python files, JSON lines, Hub datasets.

The documents of all sources become one Hugging Face dataset with a row per document: text, blake2b-128 of its UTF-8
bytes, their number, and the reason to leave it out ("" for none).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phi1.arguments import expanded
from phi1.train.data.shards import DataError

if TYPE_CHECKING:
    import datasets

MAX_DOCUMENT = 1 << 30
"""Bytes; nobody has written a longer document."""
NOT_UTF8, EMPTY, TOO_LARGE = "not UTF-8", "empty", "larger than 1 GiB"
_HUB_ID = re.compile(r"(\w[\w.-]*/[\w.-]+)(?::([\w.-]+))?")
Stamp = tuple[str, int, str]
"""Path, size and content hash of a file."""


@dataclass(frozen=True)
class Source:
    """A source that exists. `kind` is "files" (one document per file), "lines" (JSON lines) or "rows" (a dataset)."""

    name: str
    kind: str
    files: tuple[Stamp, ...] = ()
    unreadable: int = 0
    outside: int = 0
    """Links that lead out of the folder: what they point to is not read."""
    rows: Any = None
    """The datasets.Dataset of a Hub source."""

    @property
    def identity(self) -> list[Any]:
        """JSON that identifies the documents: sizes and hashes without paths, so that a folder may be moved."""
        if self.kind == "rows":
            return [self.kind, self.rows._fingerprint]
        return [self.kind, [[size, digest] for _, size, digest in self.files]]

    @property
    def n_bytes(self) -> int:
        """Bytes of the files; 0 if not known."""
        return sum(size for _, size, _ in self.files)


def find_source(name: str, column: str = "text") -> Source:
    """Find a source and hash its files.

    Args:
        name: "stdlib" (the running interpreter's standard library, its tests included), a folder (its *.py files, at
            any depth, in the order of their paths; hidden folders and links that lead out are left out), a .jsonl file,
            or a Hub dataset id, OWNER/NAME or OWNER/NAME:CONFIG.
        column: the field of the JSON lines, or the column of the dataset, that holds the text.

    Raises:
        DataError: there is nothing of that name, or no Python file in it.
    """
    if name == "stdlib":
        return _folder(name, Path(sysconfig.get_path("stdlib")), leave_out={"site-packages", "dist-packages"})
    name = expanded(name)
    path = Path(name)
    if name and path.is_dir():
        return _folder(name, path, leave_out=set())
    if path.is_file() and path.suffix == ".jsonl":
        stamp = _stamp(path)
        with path.open("rb") as file:
            if not any(line.strip() for line in file):
                raise DataError(f"source {name}: no line in it")
        return Source(name, "lines", (stamp,))
    match = _HUB_ID.fullmatch(name)
    if match is None or path.exists():
        raise DataError("source must be stdlib, a folder, a .jsonl file or a Hub dataset (OWNER/NAME[:CONFIG]); "
                        f"got {name!r}")
    return Source(name, "rows", rows=_hub(match[1], match[2], column))


def gather(sources: Sequence[Source], column: str, cache: Path) -> datasets.Dataset:
    """Gather all documents of some sources in one dataset; its columns are text, digest, bytes and problem.

    Args:
        sources: from find_source.
        column: as for find_source.
        cache: folder for the dataset's Arrow files; the caller removes it.

    Raises:
        DataError: a file changed since it was found, or a line is not JSON with the column.
    """
    import datasets

    features = datasets.Features({"text": datasets.Value("large_string"), "digest": datasets.Value("binary"),
                                  "bytes": datasets.Value("int64"), "problem": datasets.Value("string")})
    # Sizes and hashes are among the arguments, because `datasets` caches the rows of a generator by its arguments and
    # would serve the old text of a changed file.
    parts = tuple((source.kind, source.files, source.rows) for source in sources)
    shown = not datasets.utils.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        return datasets.Dataset.from_generator(_documents, features=features, cache_dir=str(cache),
                                               gen_kwargs={"parts": parts, "column": column})
    finally:
        if shown:
            datasets.enable_progress_bars()


def content_hash(content: bytes) -> bytes:
    """Return the blake2b-128 of a document: collision-free in practice, in every Python, and fast beside tokenising."""
    return hashlib.blake2b(content, digest_size=16).digest()


def _folder(name: str, folder: Path, leave_out: set[str]) -> Source:
    found: list[Path] = []
    outside: set[Path] = set()
    unreadable: list[OSError] = []
    root = folder.resolve()
    for where, folders, names in os.walk(folder, onerror=unreadable.append):  # which follows no link to a folder
        folders[:] = [one for one in folders if one not in leave_out and not one.startswith(".")]
        found += [Path(where, one) for one in names if one.endswith(".py")]
        links = (Path(where, one) for one in (*folders, *(name for name in names if name.endswith(".py")))
                 if os.path.islink(os.path.join(where, one)))
        outside.update(link for link in links if not link.resolve().is_relative_to(root))
    files, left_out = [], len(unreadable)
    for path in sorted(set(found) - outside, key=lambda path: path.relative_to(folder).as_posix()):
        try:
            if path.is_file():  # opening a pipe would block
                files.append(_stamp(path))
        except OSError:
            left_out += 1
    if not files:
        raise DataError(f"source {name}: no readable Python file in {folder}")
    return Source(name, "files", tuple(files), left_out, len(outside))


def _stamp(path: Path) -> Stamp:
    digest = hashlib.blake2b(digest_size=16)
    size = 0
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
            size += len(piece)
    return str(path), size, digest.hexdigest()


def _hub(name: str, config: str | None, column: str) -> datasets.Dataset:
    import datasets

    try:
        rows = datasets.load_dataset(name, config, split="train")
    except Exception as error:  # connection, authorisation, no such dataset: each its own class
        reason = str(error).strip().split("\n")[0]
        raise DataError(f"source {name} is no folder or .jsonl file, and the Hub did not give it: {reason}") from error
    if column not in rows.column_names:
        raise DataError(f"source {name}: it has no column {column!r}; its columns are {', '.join(rows.column_names)}")
    if not len(rows):
        raise DataError(f"source {name}: no row in it")
    return rows.select_columns([column])


def _documents(parts: Sequence[tuple[str, Sequence[Stamp], Any]], column: str) -> Iterator[dict[str, Any]]:
    for kind, files, rows in parts:
        if kind == "rows":
            yield from (_document(row[column], "a row") for row in rows)
        for stamp in files:
            try:
                yield from _from_lines(stamp, column) if kind == "lines" else _from_file(stamp)
            except OSError as error:  # a failed read does not name its file
                raise DataError(f"{stamp[0]}: cannot be read: {error.strerror}") from None


def _from_file(stamp: Stamp) -> Iterator[dict[str, Any]]:
    path, _, digest = stamp
    content = Path(path).read_bytes()
    _check_same(path, content_hash(content).hex(), digest)
    yield _document(content, path)


def _from_lines(stamp: Stamp, column: str) -> Iterator[dict[str, Any]]:
    path, _, digest = stamp
    read = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            read.update(line)
            if line.strip():
                where = f"{path}, line {number}"
                yield _document(_field(line, column, where), where)
    _check_same(path, read.hexdigest(), digest)


def _field(line: bytes, column: str, where: str) -> Any:
    """Return the text in a line of JSON; a line that is not UTF-8 is returned as it is."""
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return line
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON: {error}") from None
    if not isinstance(record, dict) or column not in record:
        has = f"the fields {', '.join(record)}" if isinstance(record, dict) else "no fields"
        raise DataError(f"{where}: it must have the field {column!r}; it has {has}")
    return record[column]


def _check_same(path: str, digest: str, expected: str) -> None:
    if digest != expected:
        raise DataError(f"{path}: it changed while it was read; run again")


def _document(content: Any, where: str) -> dict[str, Any]:
    """Return the row of a document, given as text or as bytes."""
    text, encoded, problem = "", b"", ""
    try:
        if isinstance(content, bytes):
            text, encoded = content.decode("utf-8"), content
        elif isinstance(content, str):
            text, encoded = content, content.encode("utf-8")
        elif content is not None:
            raise DataError(f"{where}: the text must be a string; got {str(content)[:40]}")
    except UnicodeError:  # also from a lone surrogate, which JSON can contain
        problem = NOT_UTF8
    else:
        problem = "" if encoded else EMPTY
    if len(encoded) > MAX_DOCUMENT:
        problem = TOO_LARGE
    return {"text": "" if problem else text, "digest": content_hash(encoded), "bytes": len(encoded), "problem": problem}
