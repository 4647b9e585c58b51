"""The files of a corpus: shards of uint16 tokens, a document index and a manifest, each with its checksum.

    corpus/
      manifest.json          the contents: splits, files, sizes, hashes; `fingerprint` is the corpus's identity
      train-00000.bin ...    the split's tokens, a stream of documents each followed by `<|endoftext|>`, in equal shards
      train-documents.npy    one record per document (DOCUMENT): the place of its tokens in the stream
      val-...                the same for the other split
      tokenizer/             tokenizer.json, tokenizer_config.json

A shard is a header, padded to a multiple of 4096 bytes, and little-endian uint16 tokens. Checksums are xxh3. It runs at
memory speed (14 GB/s measured, against 1.3 for sha256), so the whole corpus is checked whenever it is opened. It guards
against accidents, not against an adversary. xxhash comes with datasets, and is imported only to read a corpus.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from phi1.user_files import LARGEST_JSON, open_regular, parse_json, read_file

MAGIC = b"phi1tok\n"
VERSION = 1
FORMAT = "phi1-corpus"
MANIFEST = "manifest.json"
PAGE = 4096
BLOCK_TOKENS = 1 << 20
"""Tokens per checksum: damage is located to 2 MiB."""
SHARD_TOKENS = 100 * BLOCK_TOKENS
TOKEN = np.dtype("<u2")
DOCUMENT = np.dtype([("offset", "<u8"), ("tokens", "<u4"), ("bytes", "<u4"), ("hash", "V16")])
"""A document: position of its first token in the split's stream, number of tokens (without `<|endoftext|>`), number of
UTF-8 bytes, and their blake2b-128."""

# magic, version, header bytes, bits per token, tokens per block, tokens, sha256 of the tokenizer, header's checksum
_HEADER = struct.Struct("<8sIIIIQ32sQ")


class DataError(ValueError):
    """A corpus, or a source for one, is missing, damaged or too small; the message is one line."""


@dataclass(frozen=True)
class ShardHeader:
    """A shard's header: its size, the sha256 of the tokenizer that made its ids, and one checksum per block."""

    header_bytes: int
    n_tokens: int
    tokenizer: str
    block_tokens: int
    blocks: tuple[int, ...]

    def pack(self) -> bytes:
        """Return the header's bytes, its own checksum included."""
        def fixed(checksum: int) -> bytes:
            return _HEADER.pack(MAGIC, VERSION, self.header_bytes, 8 * TOKEN.itemsize, self.block_tokens,
                                self.n_tokens, bytes.fromhex(self.tokenizer), checksum)
        blocks = struct.pack(f"<{len(self.blocks)}Q", *self.blocks)
        checksum = _checksum((fixed(0) + blocks).ljust(self.header_bytes, b"\0"))
        return (fixed(checksum) + blocks).ljust(self.header_bytes, b"\0")

    @staticmethod
    def size(shard_tokens: int, block_tokens: int) -> int:
        """Return the bytes of a header with room for the checksums of `shard_tokens`, in whole pages."""
        return -(-(_HEADER.size + 8 * -(-shard_tokens // block_tokens)) // PAGE) * PAGE


def _checksum(data: bytes | memoryview) -> int:
    import xxhash
    return xxhash.xxh3_64_intdigest(data)


def read_header(path: Path) -> ShardHeader:
    """Read and check a shard's header.

    Raises:
        DataError: it is not a shard, or its header is damaged or of another version.
    """
    with open_regular(path) as file:
        fixed = file.read(_HEADER.size)
        if len(fixed) < _HEADER.size or not fixed.startswith(MAGIC):
            raise DataError(f"{path}: not a shard of tokens: it does not begin with {MAGIC!r}")
        _, version, header_bytes, bits, block_tokens, n_tokens, tokenizer, checksum = _HEADER.unpack(fixed)
        if (version, bits) != (VERSION, 8 * TOKEN.itemsize):
            raise DataError(f"{path}: format version {version} with {bits}-bit tokens; this reader knows version "
                            f"{VERSION} with {8 * TOKEN.itemsize}-bit tokens: prepare the corpus again")
        if header_bytes > os.fstat(file.fileno()).st_size:
            raise DataError(f"{path}: the header is damaged: it is longer than the file")
        rest = file.read(max(0, header_bytes - _HEADER.size))
    n_blocks = -(-n_tokens // max(1, block_tokens))
    if _checksum(fixed[:-8] + bytes(8) + rest) != checksum or len(rest) < 8 * n_blocks:
        raise DataError(f"{path}: the header is damaged: its checksum is wrong")
    return ShardHeader(header_bytes, n_tokens, tokenizer.hex(), block_tokens,
                       struct.unpack(f"<{n_blocks}Q", rest[:8 * n_blocks]))


class Shard:
    """A shard's tokens, read from its file on demand; several threads may read at once.

    The file is not memory-mapped, because an error of the disk, or a truncated file, would then end the process by
    SIGBUS, without a message. It stays open, one descriptor per shard (67 for phi-1's 7 billion tokens), so that a run
    continues with the file that was checked if another takes its name.

    Each block is compared with its checksum when it is first read, and again when the file has been written to since.

    Args:
        path: of the shard.
        tokenizer: sha256 of the tokenizer that must have made its ids.
        vocab_size: every id must be below it.

    Raises:
        DataError: it is not such a shard, or its header is damaged.
    """

    def __init__(self, path: Path, tokenizer: str, vocab_size: int = 1 << 8 * TOKEN.itemsize) -> None:
        self._header = header = read_header(path)
        self.vocab_size = vocab_size
        self._whole: set[int] = set()
        """Numbers of blocks that were as they were written when the file had the times and size of `_stamp`."""
        self._stamp: tuple[int, int] | None = None
        self.path, self.tokenizer, self.size, self.header_bytes = path, tokenizer, header.n_tokens, header.header_bytes
        self._file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)
        if os.fstat(self._file).st_size != header.header_bytes + header.n_tokens * TOKEN.itemsize:
            raise DataError(f"{path}: damaged: its size is not that of the {header.n_tokens:,} tokens in its header")
        if header.tokenizer != tokenizer:
            raise DataError(f"{path}: its tokenizer ({header.tokenizer[:12]}) is not the corpus' ({tokenizer[:12]})")

    def __reduce__(self) -> tuple[type[Shard], tuple[Path, str, int]]:
        return Shard, (self.path, self.tokenizer, self.vocab_size)  # a spawned process opens the file again

    @property
    def n_blocks(self) -> int:
        return len(self._header.blocks)

    def read(self, first: int, out: np.ndarray) -> None:
        """Fill `out`, uint16 [n], with the tokens from `first` on.

        Raises:
            DataError: the disk fails, the file has been changed or cut short, or an id is not below vocab_size.
        """
        size = max(1, self._header.block_tokens)
        self.check(first // size, -(-(first + out.size) // size))
        self._fill(first, out)

    def _fill(self, first: int, out: np.ndarray) -> None:
        begin, done = self.header_bytes + first * TOKEN.itemsize, 0
        while done < out.nbytes:
            rest = out.view(np.uint8)[done:] if done else out  # a view takes a third of a read's time; few are short
            if not (got := _read(self.path, self._file, rest, begin + done)):
                raise DataError(f"{self.path}: cut short since it was opened: it has no byte {begin + done:,} any more")
            done += got

    def check(self, first: int, last: int) -> None:
        """Read the blocks first..last - 1 that are not known to be whole. Raises as `read`."""
        status = os.fstat(self._file)
        if self._stamp != (status.st_mtime_ns, status.st_size):
            self._stamp, self._whole = (status.st_mtime_ns, status.st_size), set()
        for number in range(first, last):
            if number not in self._whole:
                self._check_block(number)
                self._whole.add(number)

    def _check_block(self, number: int) -> None:
        size, at = self._header.block_tokens, number * self._header.block_tokens
        block = np.empty(min(size, self.size - at), dtype=TOKEN)
        self._fill(at, block)
        where = f"block {number} (tokens {at:,} to {at + block.size - 1:,})"
        if _checksum(block.data) != self._header.blocks[number]:
            raise DataError(f"{self.path}: damaged: {where} is not as it was written; restore it or prepare the corpus "
                            "again")
        if block.size and (largest := int(block.max())) >= self.vocab_size:
            raise DataError(f"{self.path}: damaged: {where} holds the id {largest}, and the tokenizer has "
                            f"{self.vocab_size:,}; prepare the corpus again")


def _read(path: Path, file: int, buffer: Any, at: int) -> int:
    """Read from byte `at` of a file on into a buffer; returns the number of bytes, 0 at the end.

    Raises:
        DataError: it cannot be read; the message names the file, which the system's own does not.
    """
    try:
        return os.preadv(file, [buffer], at)
    except OSError as error:
        raise DataError(f"{path}: cannot be read at byte {at:,}: {error.strerror}") from None


def damaged_block(path: Path) -> str:
    """Describe the damaged tokens of a shard with a wrong content hash."""
    header = read_header(path)
    with open_regular(path) as file:
        file.seek(header.header_bytes)
        for i, expected in enumerate(header.blocks):
            tokens = min(header.block_tokens, header.n_tokens - i * header.block_tokens)
            if _checksum(file.read(tokens * TOKEN.itemsize)) != expected:
                return f"block {i} (tokens {i * header.block_tokens:,} to {i * header.block_tokens + tokens - 1:,})"
    return "each block agrees with the header, so it is a shard of another corpus"


def file_hash(path: Path) -> str:
    """Return the xxh3-128 of a file's content, in hex, as `xxhsum -H2` prints it."""
    import xxhash
    digest, at = xxhash.xxh3_128(), 0
    buffer = memoryview(bytearray(1 << 22))
    with open_regular(path) as file:
        while size := _read(path, file.fileno(), buffer, at):
            digest.update(buffer[:size])
            at += size
    return digest.hexdigest()


def fingerprint(content: dict[str, Any]) -> str:
    """Return the sha256, in hex, of a manifest's content: the identity of a corpus."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def manifest_text(content: dict[str, Any], made: dict[str, Any]) -> str:
    """Return the text of a manifest; its last value is a hash of the others, which reveals any flipped byte."""
    manifest = {"format": FORMAT, "version": VERSION, "fingerprint": fingerprint(content), "content": content,
                "made": made}
    return json.dumps(manifest | {"sha256": fingerprint(manifest)}, indent=1)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a corpus. Raises DataError if there is none, it is damaged, or it has another version."""
    path = folder / MANIFEST
    none = f"{folder}: no corpus there (no {MANIFEST}); make one with: phi1 prepare --out {folder}"
    try:
        manifest = parse_json(text := read_file(path, LARGEST_JSON).decode())
        if manifest["format"] != FORMAT or manifest["version"] != VERSION:
            raise DataError(f"{path}: {manifest['format']} version {manifest['version']}; this reader knows {FORMAT} "
                            f"version {VERSION}: prepare the corpus again")
        if text != manifest_text(manifest["content"], manifest["made"]):
            raise DataError(f"{path}: damaged: it is not as it was written; restore it or prepare the corpus again")
        _check_form(manifest["content"])
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(none) from None
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DataError(f"{path}: damaged: it is no corpus' manifest any more; restore it or prepare the corpus "
                        "again") from None
    return manifest


def _check_form(content: dict[str, Any]) -> None:
    """Raise one of the errors of `read_manifest` unless a manifest's content has all that `open_corpus` reads."""
    whole = [content["vocab_size"], content["eos_id"]]
    texts = [content["tokenizer"]]
    for name, entry in content["files"].items():
        texts += [name, entry["xxh3_128"]]
        whole.append(entry["bytes"])
    for split in ("train", "val"):
        part = content["splits"][split]
        whole += [part["tokens"], part["bytes"]]
        texts += part["shards"]
    if not all(isinstance(x, int) for x in whole) or not all(isinstance(x, str) for x in texts):
        raise ValueError("a number or a text is missing")
