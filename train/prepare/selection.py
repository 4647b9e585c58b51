"""The selection of a corpus's documents: their order, duplicates removed, and their split."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from phi1.train.data.shards import DOCUMENT, DataError

if TYPE_CHECKING:
    import datasets


class Selection:
    """The documents that are text, without duplicates (the first is kept), split by content hash.

    Args:
        documents: from sources.gather.
        val_fraction: documents whose hash lies in this lowest part of all hashes are for validation, whatever other
            documents there are. If none lies there, the lowest of at least two is taken; one document always stays for
            training.
        skipped: number of documents already left out, by reason.

    Raises:
        DataError: no document is left.
    """

    def __init__(self, documents: datasets.Dataset, val_fraction: float, skipped: dict[str, int]) -> None:
        columns = documents.select_columns(["digest", "bytes", "problem"])[:]
        self._documents = documents
        self._digests: list[bytes] = columns["digest"]
        self._bytes = np.array(columns["bytes"], dtype=np.int64)
        reasons = Counter(skipped)
        seen: set[bytes] = set()
        kept = []
        for i, (digest, problem) in enumerate(zip(self._digests, columns["problem"], strict=True)):
            if not problem and digest in seen:
                problem = "duplicate"
            if problem:
                reasons[problem] += 1
            else:
                seen.add(digest)
                kept.append(i)
        self.skipped = {reason: count for reason, count in sorted(reasons.items()) if count}
        if not kept:
            raise DataError("the sources hold no document"
                            + "".join(f"; {count:,} {reason}" for reason, count in self.skipped.items()))
        by_hash = sorted(kept, key=self._digests.__getitem__)
        limit = int(val_fraction * 2.0**64)
        n_low = sum(int.from_bytes(self._digests[i][:8]) < limit for i in kept)
        n_val = min(max(n_low, int(val_fraction > 0)), len(kept) - 1)
        # Validation in the order of the hashes, so that its first part is a fair sample and not one folder.
        self.rows = {"train": np.sort(np.array(by_hash[n_val:], dtype=np.int64)),
                     "val": np.array(by_hash[:n_val], dtype=np.int64)}
        """Rows of `documents` for each split."""

    @property
    def n_documents(self) -> int:
        return sum(rows.size for rows in self.rows.values())

    def texts(self, rows: np.ndarray) -> list[str]:
        """Return the text of some rows."""
        return self._documents[rows.tolist()]["text"]

    def records(self, rows: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Return the DOCUMENT records of some rows, given the number of tokens of each; the offsets are 0."""
        records = np.zeros(rows.size, DOCUMENT)
        records["tokens"], records["bytes"] = tokens, self._bytes[rows]
        records["hash"] = np.frombuffer(b"".join(self._digests[i] for i in rows), dtype="V16")
        return records

    def chunks(self, split: str, chunk_bytes: int) -> list[np.ndarray]:
        """Cut the rows of a split into pieces of about `chunk_bytes` of text."""
        rows = self.rows[split]
        piece = np.cumsum(self._bytes[rows]) // chunk_bytes
        return [part for part in np.split(rows, np.flatnonzero(np.diff(piece)) + 1) if part.size]

    def training_texts(self, at_most: int) -> Iterator[str]:
        """Yield the texts of the training split; beyond `at_most` bytes, those with the highest hashes alone."""
        by_hash = sorted(self.rows["train"].tolist(), key=self._digests.__getitem__, reverse=True)
        rows = np.array(by_hash, dtype=np.int64)
        enough = np.sort(rows[np.cumsum(self._bytes[rows]) - self._bytes[rows] < at_most])
        for part in np.array_split(enough, -(-enough.size // 64)):
            yield from self.texts(part)
