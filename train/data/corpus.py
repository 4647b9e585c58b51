"""A corpus as training reads it: checked when it is opened, and cut into rows."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from phi1.tokenizer import Tokenizer
from phi1.train.data.shards import TOKEN, DataError, Shard, damaged_block, file_hash, read_manifest

SPLITS = ("train", "val")
_OURS = re.compile(r"(train|val)-(\d+\.bin|documents\.npy)|tokenizer/.*")


@dataclass(frozen=True, eq=False)
class Corpus:
    """One split of a corpus: documents, each followed by `<|endoftext|>`, as one stream of tokens. See open_corpus."""

    folder: Path
    split: str
    fingerprint: str
    """Identity of the whole corpus, both splits and the tokenizer: a hash of its contents."""
    n_tokens: int
    """Tokens in the stream, including the `<|endoftext|>` after each document."""
    n_bytes: int
    """UTF-8 bytes of the documents."""
    vocab_size: int
    """Tokens of the tokenizer; every id is below it."""
    eos_id: int
    shards: tuple[Shard, ...] = field(repr=False)
    """All of equal size, but the last, which may be shorter."""

    @cached_property
    def documents(self) -> np.ndarray:
        """One DOCUMENT record per document: offset, tokens, bytes, hash."""
        # Read on demand, since training does not need them. By read_bytes, since np.load on the file takes an error of
        # the disk for the end of the file.
        return np.load(io.BytesIO((self.folder / f"{self.split}-documents.npy").read_bytes()))

    def n_samples(self, seq_len: int) -> int:
        """Return the number of rows in the stream, each of `seq_len` inputs and targets; a short rest is not used."""
        return max(0, (self.n_tokens - 1) // seq_len)

    def require_samples(self, seq_len: int, count: int) -> None:
        """Raise DataError if there are fewer than `count` samples."""
        if self.n_samples(seq_len) < count:
            raise DataError(f"{self.folder}: the {self.split} split is too small: its {self.n_tokens:,} tokens give "
                            f"{self.n_samples(seq_len):,} samples of {seq_len} + 1 tokens, and {count:,} are needed; "
                            "prepare more text, or choose shorter sequences or a smaller batch")

    def rows(self, indices: np.ndarray, seq_len: int) -> np.ndarray:
        """Return the tokens of some samples; sample i begins at token i * seq_len of the stream.

        Args:
            indices: int64 [B], each from 0 to n_samples(seq_len) - 1.
            seq_len: tokens of a sample, T.

        Returns:
            int64 [B, T + 1]: inputs [:, :-1], targets [:, 1:].

        Raises:
            ValueError: an index is out of range.
            DataError: a shard can no longer be read.
        """
        indices = np.asarray(indices)
        n_samples = self.n_samples(seq_len)
        if indices.size and not 0 <= indices.min() <= indices.max() < n_samples:
            raise ValueError(f"rows: indices must be from 0 to {n_samples - 1} (seq_len {seq_len}); "
                             f"got {indices.min()} to {indices.max()}")
        out = np.empty((indices.size, seq_len + 1), dtype=TOKEN)
        for row, index in zip(out, indices.tolist(), strict=True):
            self._read(index * seq_len, row)
        return out.astype(np.int64)

    def document(self, index: int) -> np.ndarray:
        """Return the tokens, int64 [n], of one document, without the `<|endoftext|>` after it."""
        record = self.documents[index]
        out = np.empty(int(record["tokens"]), dtype=TOKEN)
        self._read(int(record["offset"]), out)
        return out.astype(np.int64)

    def load_tokenizer(self) -> Tokenizer:
        """Return the tokenizer that made the ids."""
        return Tokenizer.from_folder(self.folder / "tokenizer")

    def _read(self, start: int, out: np.ndarray) -> None:
        """Fill `out` with the stream's tokens from `start` on, across shards if necessary."""
        filled = 0
        while filled < out.size:
            number, at = divmod(start + filled, self.shards[0].size)
            piece = out[filled:filled + self.shards[number].size - at]
            self.shards[number].read(at, piece)
            filled += piece.size


def open_corpus(folder: str | Path, split: str = "train", *, verify: bool = True) -> Corpus:
    """Open one split of a corpus that `phi1 prepare` made, after checking that it is complete and undamaged.

    Args:
        folder: the corpus.
        split: "train" or "val".
        verify: also read the split's files and compare their hashes (at memory speed once they are cached). False
            checks names, sizes and headers only; it is for the other processes of a run whose first has verified.

    Raises:
        DataError: a file is missing, truncated, damaged or not of this corpus; the message names it.
    """
    if split not in SPLITS:
        raise ValueError(f"open_corpus: split must be one of {', '.join(SPLITS)}; got {split!r}")
    try:
        return _open(Path(folder), split, verify)
    except OSError as error:
        raise DataError(f"{error.filename or folder}: cannot be read: {error.strerror}") from None


def _open(folder: Path, split: str, verify: bool) -> Corpus:
    manifest = read_manifest(folder)
    content = manifest["content"]
    _check_names(folder, set(content["files"]))
    part = content["splits"][split]
    for name, expected in content["files"].items():
        if name.startswith((f"{split}-", "tokenizer/")):
            _check_file(folder, name, expected, verify)
    shards = tuple(Shard(folder / name, content["tokenizer"], content["vocab_size"]) for name in part["shards"])
    if verify:
        for shard in shards:
            shard.check(0, shard.n_blocks)
    if sum(shard.size for shard in shards) != part["tokens"]:
        raise DataError(f"{folder}: the {split} split's shards do not hold what the manifest says")
    return Corpus(folder, split, manifest["fingerprint"], part["tokens"], part["bytes"], content["vocab_size"],
                  content["eos_id"], shards)


def _check_names(folder: Path, expected: set[str]) -> None:
    """Check that the files named like a corpus's are those of the manifest; others, such as a note, are ignored."""
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    for name in sorted(expected - present):
        raise DataError(f"{folder / name}: missing; restore it or prepare the corpus again")
    for name in sorted(present - expected):
        if _OURS.fullmatch(name):
            raise DataError(f"{folder / name}: an extra file that the manifest does not know; remove it")


def _check_file(folder: Path, name: str, expected: dict[str, Any], verify: bool) -> None:
    path = folder / name
    size = path.stat().st_size
    if size != expected["bytes"]:
        change = "truncated" if size < expected["bytes"] else "too long"
        raise DataError(f"{path}: {change}: {size:,} bytes instead of {expected['bytes']:,}; restore it or prepare the "
                        "corpus again")
    if verify and file_hash(path) != expected["xxh3_128"]:
        where = f": {damaged_block(path)}" if path.suffix == ".bin" else ""
        raise DataError(f"{path}: damaged: its content hash is wrong{where}; restore it or prepare the corpus again")
