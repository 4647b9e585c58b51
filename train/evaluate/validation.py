"""Held-out loss and bits per byte, on a fixed stretch of the validation documents."""

from __future__ import annotations

import lzma
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import torch

from phi1 import Phi1
from phi1.tokenizer import Tokenizer
from phi1.train.data.corpus import Corpus
from phi1.train.runtime.all_ranks import all_ranks
from phi1.train.runtime.engine import Engine, all_sum, reshard

IGNORED = -100
SMALLEST_DICTIONARY, LARGEST_DICTIONARY = 4096, 64 << 20  # bytes: what LZMA2 allows, and what xz -9 takes


@dataclass(frozen=True)
class Figures:
    """What an evaluation found."""

    loss: float
    """Nats a token."""
    bits_per_byte: float
    """Of the text without `<|endoftext|>`; the bits spent on that token count."""
    tokens: int
    n_bytes: int

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


class HeldOut:
    """Collective: the first `sequences` rows of the validation split, consecutive text from held-out documents.

    Args:
        corpus: validation split.
        tokenizer: the corpus's.
        seq_len: T; a token sees at most the T - 1 before it in its row.
        sequences: rows to take; 0 takes all.

    Raises:
        Failed: on every process, if one cannot read them.
    """

    def __init__(self, corpus: Corpus, tokenizer: Tokenizer, seq_len: int, sequences: int) -> None:
        there = corpus.n_samples(seq_len)
        count = min(sequences, there) if sequences else there
        first = np.arange(count, dtype=np.int64)
        [self.rows] = all_ranks(lambda: corpus.rows(first, seq_len), keep=True)  # [count, T + 1]
        targets = self.rows[:, 1:].ravel()
        self.text = tokenizer.decode_bytes(targets[targets != tokenizer.eos_id].tolist())

    def evaluate(self, model: Phi1, engine: Engine, rank: int, batch: int,
                 stop: Callable[[], bool] = lambda: False) -> Figures | None:
        """Collective: the model's loss on these rows.

        Args:
            model: sharded.
            engine, rank: where this process stands.
            batch: rows in a forward pass of one process.
            stop: asked on all processes between batches; True ends the evaluation.

        Returns:
            The figures, the same on all processes; None if it was stopped.
        """
        model.eval()
        total = torch.zeros((), dtype=torch.float64, device=engine.device)
        with torch.no_grad():
            # All processes take the same number of batches, since each forward pass may gather parameters.
            for first in range(0, len(self.rows), batch * engine.world_size):
                if stop():
                    reshard(model)
                    return None
                total += self._batch_loss(model, engine.device, first + rank * batch, batch)
        reshard(model)
        (nats,) = all_sum(total.item())
        tokens = self.rows[:, 1:].size
        return Figures(nats / tokens, nats / math.log(2) / max(1, len(self.text)), tokens, len(self.text))

    def _batch_loss(self, model: Phi1, device: torch.device, first: int, batch: int) -> torch.Tensor:
        """Summed loss of up to `batch` rows from `first` on; what is missing of them is made up by ignored ones."""
        rows = self.rows[first : first + batch]
        padded = np.zeros((batch, self.rows.shape[1]), dtype=np.int64)
        padded[: len(rows)] = rows
        tokens = torch.from_numpy(padded).to(device)
        targets = tokens[:, 1:].clone()
        targets[len(rows):] = IGNORED
        return model.loss(tokens[:, :-1].contiguous(), targets, reduction="sum", ignore_index=IGNORED).double()


def xz_bits_per_byte(text: bytes) -> float | None:
    """What `xz -9` makes of the same bytes; None if there is too little memory to find out."""
    # A dictionary that is longer than the text is no use, but the 64 MiB of the preset take 674 MB whatever the text.
    dictionary = min(max(SMALLEST_DICTIONARY, len(text)), LARGEST_DICTIONARY)
    try:
        packed = lzma.compress(text, filters=[{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": dictionary}])
    except MemoryError:
        return None
    return 8 * len(packed) / max(1, len(text))
