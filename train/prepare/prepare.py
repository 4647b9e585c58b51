"""`phi1 prepare`: documents are gathered, deduplicated, split, tokenised and written as a corpus (see shards.py).

The result depends on the documents and the settings alone: not on paths, workers or time. A document belongs to the
validation split if its content hash is among the lowest `val_fraction` of all hashes. So it stays in its split when
other documents come or go, and no text is in both splits. The BPE is trained on the training split alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import phi1
from phi1.arguments import user_path
from phi1.atomic import NEW, publish, read_unreplaced, sweep
from phi1.tokenizer import Tokenizer, load_tokenizer, train_bpe
from phi1.tokenizer_rules import MIN_VOCAB
from phi1.train.data.corpus import SPLITS, open_corpus
from phi1.train.data.shards import BLOCK_TOKENS, MANIFEST, SHARD_TOKENS, VERSION, DataError, read_manifest
from phi1.train.prepare.encode_pool import EncodePool
from phi1.train.prepare.selection import Selection
from phi1.train.prepare.sources import Source, find_source, gather
from phi1.train.prepare.workspace import chain, foreign_file, format_bytes, workspace
from phi1.train.prepare.writer import CorpusWriter
from phi1.train.runtime.launch import cores

CHUNK_BYTES = 1 << 20
"""Text that a worker takes at a time; it does not affect the result."""
BPE_BYTES = 1 << 28
"""Limit of the text that a BPE is trained on: more changes few merges."""


@dataclass(frozen=True)
class Summary:
    """The contents of a prepared corpus, and the time that it took."""

    folder: Path
    fingerprint: str
    already_done: bool
    """The folder held this corpus before."""
    splits: dict[str, dict[str, Any]]
    """Documents, tokens, bytes and shards of "train" and "val"."""
    skipped: dict[str, int]
    """Number of documents left out, by reason."""
    seconds: float
    """Time of the whole preparation."""
    tokens_per_second: float
    """Speed of tokenising and writing."""

    def _total(self, key: str) -> int:
        return sum(split[key] for split in self.splits.values())

    @property
    def documents(self) -> int:
        return self._total("documents")

    @property
    def tokens(self) -> int:
        return self._total("tokens")

    @property
    def bytes(self) -> int:
        return self._total("bytes")

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {split['tokens']:,}" for name, split in self.splits.items())
        text = (f"{self.folder}: {self.documents:,} documents, {format_bytes(self.bytes)}, {self.tokens:,} tokens "
                f"({parts}), fingerprint {self.fingerprint[:12]}")
        if self.skipped:
            text += "\nskipped: " + ", ".join(f"{count:,} {reason}" for reason, count in self.skipped.items())
        if self.already_done:
            return f"already prepared from the same sources and settings\n{text}"
        return f"{text}\nin {self.seconds:.1f} s; {self.tokens_per_second / 1e6:.2f} M tokens/s tokenised and written"


def prepare(sources: str | Sequence[str], out: str | Path, *, tokenizer: str | Path | Tokenizer = "microsoft/phi-1",
            vocab_size: int = 4096, val_fraction: float = 0.02, workers: int = 0, force: bool = False,
            column: str = "text", shard_tokens: int = SHARD_TOKENS,
            report: Callable[[str], None] | None = None) -> Summary:
    """Make a corpus from documents; the folder appears complete or not at all.

    Args:
        sources: names for find_source: "stdlib", folders, .jsonl files, Hub datasets.
        out: the corpus folder. If it holds the corpus of these sources and settings already, nothing is done.
        tokenizer: a Tokenizer, a name for load_tokenizer, or "train" for a BPE trained on the training split.
        vocab_size: of the trained BPE, 295 to 65,536.
        val_fraction: share of the documents held out, 0 <= f < 1; at least one if there are two and f > 0.
        workers: processes that tokenise; 0: one per core. They do not affect the result.
        force: replace a corpus that is there.
        column: field of JSON lines, or column of a Hub dataset, with the text.
        shard_tokens: tokens per file.
        report: called with a line of text at each stage.

    Raises:
        DataError: no documents, another corpus in `out`, a file that changed meanwhile, or no room on the disk.
        ValueError: an argument is out of range, or there is no such tokenizer.
    """
    start, say = time.perf_counter(), report or (lambda line: None)
    if not 0 <= val_fraction < 1:
        raise ValueError(f"prepare: val_fraction must be at least 0 and less than 1; got {val_fraction}")
    if workers < 0:
        raise ValueError(f"prepare: workers must be 0 or more; got {workers}")
    out = user_path("prepare", "out", out)
    chosen = _chosen_tokenizer(tokenizer, vocab_size)
    names = [sources] if isinstance(sources, str) else list(sources)
    found = [find_source(name, column) for name in names]
    request = _request(found, column, chosen, vocab_size, val_fraction, shard_tokens)
    place = Path(os.path.realpath(out))
    sweep(place)

    def existing() -> Summary | None:
        return read_unreplaced("prepare", out, lambda: _existing(out, request, force))

    done = existing()
    if done:
        return done

    n_bytes = sum(source.n_bytes for source in found)
    say(f"gathering {', '.join(names)}" + (f": {format_bytes(n_bytes)}" if n_bytes else ""))
    # On the disk: the documents once as Arrow, and 2 bytes per token of about 3 bytes of text.
    with workspace(place, int(1.7 * n_bytes)) as work:
        selection = _select(found, column, work / "cache", val_fraction)
        if chosen is None:
            say(f"training a BPE of {vocab_size:,} tokens")
            chosen = train_bpe(selection.training_texts(BPE_BYTES), vocab_size)
        say(f"tokenising {selection.n_documents:,} documents")
        made = {"request": request, "sources": names, "skipped": selection.skipped, "phi1": phi1.__version__}
        (work / NEW).mkdir()
        writer = CorpusWriter(work / NEW, chosen, shard_tokens=shard_tokens,
                              block_tokens=min(BLOCK_TOKENS, shard_tokens))
        rate = _encode(selection, writer, work / NEW / "tokenizer", workers or cores(), say)
        writer.close(made)
        manifest = read_manifest(work / NEW)
        while not done and not publish(work, place, (lambda old: _check_own(old, out)) if force else None):
            done = existing()
    return done or _summary(out, manifest, seconds=time.perf_counter() - start, tokens_per_second=rate)


def _chosen_tokenizer(tokenizer: str | Path | Tokenizer, vocab_size: int) -> Tokenizer | None:
    """Load the requested tokenizer; None if it is to be trained."""
    if tokenizer == "train":
        if not MIN_VOCAB <= vocab_size <= 65_536:
            raise ValueError(f"prepare: vocab_size must be from {MIN_VOCAB} to 65,536; got {vocab_size}")
        return None
    return tokenizer if isinstance(tokenizer, Tokenizer) else load_tokenizer(tokenizer)


def _existing(out: Path, request: str, force: bool) -> Summary | None:
    """Return the summary of the requested corpus if `out` holds it, None if `out` is free; else raise DataError."""
    try:
        names = os.listdir(out)
    except (FileNotFoundError, NotADirectoryError) as error:
        if isinstance(error, NotADirectoryError) and out.exists():
            raise DataError(f"{out}: it is there and is no folder; choose another place") from None
        return None
    if not names:
        return None
    if not force and MANIFEST in names:
        try:
            manifest = read_manifest(out)
            for split in SPLITS:
                open_corpus(out, split)
        except DataError as error:
            raise DataError(f"{error}; --force replaces it") from None
        if manifest["made"].get("request") != request:
            made_from = ", ".join(manifest["made"].get("sources", []))
            raise DataError(f"{out}: another corpus is there (made from {made_from}, or with other settings); --force "
                            "replaces it")
        return _summary(out, manifest, already_done=True)
    _check_own(out, out)
    if not force:
        raise DataError(f"{out}: an unfinished or damaged corpus is there; --force replaces it")
    return None


def _check_own(folder: Path, out: Path) -> None:
    """Refuse to replace a folder, shown to the user as `out`, that holds anything but a corpus."""
    foreign = foreign_file(folder)
    if foreign is not None:
        raise DataError(f"{out}: it holds {foreign}, which is no part of a corpus, and is left as it is; choose "
                        "another place")


def _request(sources: list[Source], column: str, tokenizer: Tokenizer | None, vocab_size: int, val_fraction: float,
             shard_tokens: int) -> str:
    """Return a hash of all that decides the result: the same request gives the same corpus."""
    asked = {
        "version": VERSION, "sources": [source.identity for source in sources],
        "column": column if any(source.kind != "files" for source in sources) else None,
        "tokenizer": f"train {vocab_size}" if tokenizer is None else tokenizer.fingerprint,
        "val_fraction": val_fraction, "shard_tokens": shard_tokens,
    }
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def _select(sources: list[Source], column: str, cache: Path, val_fraction: float) -> Selection:
    left_out = {"unreadable": sum(source.unreadable for source in sources),
                "links that lead out of the source": sum(source.outside for source in sources)}
    try:
        return Selection(gather(sources, column, cache), val_fraction, left_out)
    except Exception as error:
        # `datasets` wraps whatever a generator raises.
        ours = next((cause for cause in chain(error) if isinstance(cause, DataError)), None)
        if ours is None or ours is error:
            raise
        raise DataError(str(ours)) from error


def _encode(selection: Selection, writer: CorpusWriter, tokenizer: Path, workers: int,
            say: Callable[[str], None]) -> float:
    """Tokenise and write all documents; returns tokens per second."""
    chunks = [(split, rows) for split in SPLITS for rows in selection.chunks(split, CHUNK_BYTES)]
    start = said = time.perf_counter()
    n_tokens = n_documents = 0
    with EncodePool(tokenizer, min(workers, len(chunks))) as pool:
        encoded = pool.encode(selection.texts(rows) for _, rows in chunks)
        for (split, rows), (tokens, counts) in zip(chunks, encoded, strict=True):
            writer.add(split, tokens, selection.records(rows, counts))
            n_tokens, n_documents = n_tokens + tokens.size, n_documents + rows.size
            if time.perf_counter() - said > 10:
                said = time.perf_counter()
                say(f"{n_documents:,} of {selection.n_documents:,} documents, {n_tokens:,} tokens, "
                    f"{n_tokens / (said - start) / 1e6:.2f} M tokens/s")
    return n_tokens / (time.perf_counter() - start)


def _summary(folder: Path, manifest: dict[str, Any], *, already_done: bool = False, seconds: float = 0.0,
             tokens_per_second: float = 0.0) -> Summary:
    return Summary(folder, manifest["fingerprint"], already_done, manifest["content"]["splits"],
                   manifest["made"].get("skipped", {}), seconds, tokens_per_second)
