"""Writes a corpus: shards, document index, tokenizer and manifest (shards.py describes the format)."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash

from phi1.tokenizer import Tokenizer
from phi1.train.data.shards import (
    BLOCK_TOKENS,
    DOCUMENT,
    MANIFEST,
    SHARD_TOKENS,
    TOKEN,
    DataError,
    ShardHeader,
    file_hash,
    fingerprint,
    manifest_text,
)


class ShardWriter:
    """Writes one split's stream of tokens as shards of equal size, the last one shorter."""

    def __init__(self, folder: Path, split: str, tokenizer: str, *, shard_tokens: int = SHARD_TOKENS,
                 block_tokens: int = BLOCK_TOKENS) -> None:
        if shard_tokens % block_tokens:
            raise ValueError(f"ShardWriter: shard_tokens must be a multiple of block_tokens ({block_tokens}); "
                             f"got {shard_tokens}")
        self.names: list[str] = []
        """The shards' file names."""
        self.n_tokens = 0
        """Number of tokens appended."""
        self._folder, self._split, self._tokenizer = folder, split, tokenizer
        self._shard_tokens, self._block_tokens = shard_tokens, block_tokens
        self._pending: list[np.ndarray] = []
        self._n_pending = 0
        self._file: BinaryIO | None = None
        self._blocks: list[int] = []
        self._shard_size = 0

    def append(self, tokens: np.ndarray) -> None:
        """Add tokens, uint16 [n], to the stream."""
        self._pending.append(tokens)
        self._n_pending += tokens.size
        self.n_tokens += tokens.size
        if self._n_pending < self._block_tokens:
            return
        stream = np.concatenate(self._pending)
        whole = stream.size - stream.size % self._block_tokens
        for start in range(0, whole, self._block_tokens):
            self._write_block(stream[start:start + self._block_tokens])
        self._pending, self._n_pending = [stream[whole:]], stream.size - whole

    def close(self) -> None:
        """Write the pending tokens and the last shard's header."""
        if self._n_pending:
            self._write_block(np.concatenate(self._pending))
            self._pending, self._n_pending = [], 0
        self._close_shard()

    def _write_block(self, tokens: np.ndarray) -> None:
        if self._file is None:
            self.names.append(f"{self._split}-{len(self.names):05d}.bin")
            self._file = (self._folder / self.names[-1]).open("xb")
            self._file.write(bytes(ShardHeader.size(self._shard_tokens, self._block_tokens)))
        content = tokens.astype(TOKEN, copy=False).tobytes()
        self._file.write(content)
        self._blocks.append(xxhash.xxh3_64_intdigest(content))
        self._shard_size += tokens.size
        if self._shard_size == self._shard_tokens:
            self._close_shard()

    def _close_shard(self) -> None:
        if self._file is None:
            return
        size = ShardHeader.size(self._shard_tokens, self._block_tokens)
        header = ShardHeader(size, self._shard_size, self._tokenizer, self._block_tokens, tuple(self._blocks))
        with self._file as file:
            file.seek(0)
            file.write(header.pack())
        self._file, self._blocks, self._shard_size = None, [], 0


class CorpusWriter:
    """Writes the files of a corpus into an empty folder; the manifest comes last.

    Args:
        folder: exists; the caller gives it its final name once `close` has returned.
        tokenizer: made the ids and is stored with them. At most 65,536 tokens.
        shard_tokens: tokens per shard, a multiple of `block_tokens`.
        block_tokens: tokens per checksum.

    Raises:
        DataError: the tokenizer's ids do not fit into 16 bits.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer, *, shard_tokens: int = SHARD_TOKENS,
                 block_tokens: int = BLOCK_TOKENS) -> None:
        if len(tokenizer) > 1 << 8 * TOKEN.itemsize:
            raise DataError(f"the tokenizer must have at most {1 << 8 * TOKEN.itemsize:,} tokens, since a corpus "
                            f"stores 16-bit ids; got {len(tokenizer):,}")
        self._folder, self._tokenizer = folder, tokenizer
        tokenizer.save(folder / "tokenizer")
        self._shards = {split: ShardWriter(folder, split, tokenizer.fingerprint, shard_tokens=shard_tokens,
                                           block_tokens=block_tokens) for split in ("train", "val")}
        self._documents: dict[str, list[np.ndarray]] = {"train": [], "val": []}

    def add(self, split: str, tokens: np.ndarray, documents: np.ndarray) -> None:
        """Append documents to a split.

        Args:
            split: "train" or "val".
            tokens: uint16 [n], the documents' tokens, each document followed by `<|endoftext|>`.
            documents: DOCUMENT [m]; their offsets are filled in here.
        """
        shards = self._shards[split]
        ends = np.cumsum(documents["tokens"].astype(np.uint64) + np.uint64(1))
        assert tokens.size == (int(ends[-1]) if ends.size else 0)
        documents = documents.copy()
        documents["offset"] = shards.n_tokens + ends - documents["tokens"] - np.uint64(1)
        self._documents[split].append(documents)
        shards.append(tokens)

    def close(self, made: dict[str, Any]) -> str:
        """Write the rest and the manifest; returns the corpus's fingerprint. `made`: see write_manifest."""
        splits = {}
        for split, shards in self._shards.items():
            shards.close()
            documents = np.concatenate([np.empty(0, DOCUMENT), *self._documents[split]])
            buffer = io.BytesIO()  # np.save to a file does not say that the disk is full, only that less was written
            np.save(buffer, documents)
            (self._folder / f"{split}-documents.npy").write_bytes(buffer.getbuffer())
            splits[split] = {"documents": documents.size, "tokens": shards.n_tokens,
                             "bytes": int(documents["bytes"].sum(dtype=np.uint64)), "shards": shards.names}
        content = {"tokenizer": self._tokenizer.fingerprint, "vocab_size": len(self._tokenizer),
                   "eos_id": self._tokenizer.eos_id, "splits": splits}
        return write_manifest(self._folder, content, made)


def write_manifest(folder: Path, content: dict[str, Any], made: dict[str, Any]) -> str:
    """Write manifest.json; returns the fingerprint.

    Args:
        folder: holds all files of the corpus but the manifest; their sizes and hashes are added to `content`.
        content: covered by the fingerprint.
        made: information on how the corpus was made; not covered.
    """
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "xxh3_128": file_hash(path)}
    content = {**content, "files": files}
    with (folder / MANIFEST).open("w", encoding="utf-8") as text:
        text.write(manifest_text(content, made))
        text.flush()
        os.fsync(text.fileno())
    return fingerprint(content)
