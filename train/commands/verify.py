"""`phi1 verify`: compare every byte of checkpoints, runs, exports and corpora with the stored hashes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from phi1.arguments import path_option
from phi1.train.checkpoint.files import STATE, checkpoints, find_damage
from phi1.train.data.corpus import SPLITS, open_corpus
from phi1.train.data.shards import MANIFEST
from phi1.train.runtime.launch import RunError
from phi1.weights import checksums


def verify(path: Path) -> Iterator[tuple[Path, str | None]]:
    """Yield each checkpoint, export or corpus at `path` with a description of its damage, or None if it is whole.

    Checkpoints that a running training removes meanwhile are left out.

    Args:
        path: a checkpoint, a run's folder, its checkpoints/, its export, or a corpus.

    Raises:
        RunError: it is none of these.
    """
    if not path.is_dir():
        raise RunError(f"{path}: " + ("a file, where the folder of a checkpoint, run, export or corpus is wanted"
                                      if path.exists() else "there is no such folder"))
    alone = (path / STATE).is_file() or path.name.startswith("step-")
    if found := [path] if alone else checkpoints(path / "checkpoints") or checkpoints(path):
        some = False
        for checkpoint in found:
            damage = find_damage(checkpoint)
            if damage is None or checkpoint.is_dir():
                some = True
                yield checkpoint, damage
        if not some:
            yield from verify(path)  # the newer ones that have replaced them
            return
    export = path / "export" if found else path
    if (export / checksums.NAME).is_file():
        yield export, checksums.find_damage(export)
    elif not found:
        if not (path / MANIFEST).is_file():
            raise RunError(f"{path}: neither a checkpoint, nor a run with checkpoints, nor an export with "
                           f"{checksums.NAME}, nor a corpus")
        yield path, _corpus_damage(path)


def _corpus_damage(path: Path) -> str | None:
    try:
        for split in SPLITS:
            open_corpus(path, split)
    except ValueError as error:
        return str(error).removeprefix(f"{path}/")
    return None


def main(argv: list[str], parser_class: type) -> int:
    """Run the command; returns 0, or 1 if anything is damaged."""
    parser = parser_class("phi1 verify", "Compare checkpoints, runs, exports and corpora with the hashes "
                          "that lie beside them.")
    parser.add_argument("paths", nargs="+", type=path_option, metavar="PATH",
                        help="a checkpoint, a run's folder, an export, or a corpus")
    damaged = 0
    for path in parser.parse_args(argv).paths:
        try:
            for piece, damage in verify(path):
                print(f"{piece}: {damage or 'whole'}", flush=True)
                damaged += damage is not None
        except RunError as error:
            parser.error(str(error))
    return 1 if damaged else 0
