"""Which samples a process computes in which micro-step: a pure function of the step, whatever the world size.

A step takes the next `batch_size` samples of the global order. Micro-step m of rank r takes the rows from
(m * world + r) * micro_batch on, so that the global batch, and with it the dropout masks, which are keyed by sample,
are the same for any number of processes and any micro-batch that divides.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from phi1.train.data.corpus import Corpus, sample_order
from phi1.train.runtime.launch import RunError


@dataclass(frozen=True)
class BatchPlan:
    """How a global batch is cut: batch_size = micro_steps * world_size * micro_batch."""

    batch_size: int
    micro_batch: int
    micro_steps: int
    rank: int
    world_size: int

    @classmethod
    def of(cls, batch_size: int, micro_batch: int, rank: int, world_size: int) -> BatchPlan:
        """Cut a batch. `micro_batch` 0 takes all of a process's share at once.

        Raises:
            RunError: the batch does not divide; the line names the sizes that would.
        """
        if batch_size % world_size:
            below = batch_size - batch_size % world_size
            fitting = f"{below} or {below + world_size}" if below else f"{world_size}"
            raise RunError(f"train.batch_size must be a multiple of the number of processes, {world_size}; got "
                           f"{batch_size}; {fitting} would do, or {_listed(divisors(batch_size))} processes")
        share = batch_size // world_size
        micro = micro_batch or share
        if share % micro:
            raise RunError(f"train.micro_batch_size must divide each process's share of the batch, {batch_size} / "
                           f"{world_size} = {share}; got {micro}; {_listed(divisors(share))} would do")
        return cls(batch_size, micro, share // micro, rank, world_size)

    def rows(self, micro_step: int) -> slice:
        """This rank's rows of the global batch in a micro-step."""
        first = (micro_step * self.world_size + self.rank) * self.micro_batch
        return slice(first, first + self.micro_batch)


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:-1])) + f" or {numbers[-1]}" if len(numbers) > 1 else str(numbers[0])


def samples_of_step(step: int, batch_size: int, seed: int, n_samples: int) -> np.ndarray:
    """Sample indices [batch_size] int64 of the step that follows `step` finished ones."""
    return sample_order(seed, step * batch_size, batch_size, n_samples)


def samples_hash(samples: np.ndarray) -> str:
    """Sixteen hex digits that name a batch in the ledger."""
    return hashlib.sha256(samples.astype("<i8").tobytes()).hexdigest()[:16]


def micro_batches(corpus: Corpus, samples: np.ndarray, batch_plan: BatchPlan, seq_len: int) \
        -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """This rank's micro-batches of a step: sample ids [b] and their tokens [b, T + 1], both int64."""
    for micro_step in range(batch_plan.micro_steps):
        ids = samples[batch_plan.rows(micro_step)]
        yield ids, corpus.rows(ids, seq_len)
