"""The next step's batch, read by a thread while this step runs.

It is a function of the step, so what was read ahead and is not wanted, at a stop for example, is no loss.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from phi1.train.data.batch_plan import BatchPlan, micro_batches
from phi1.train.data.corpus import Corpus


@dataclass(frozen=True)
class Batch:
    """A step's samples, and this rank's part of them."""

    samples: np.ndarray
    """int64 [batch_size], over all processes."""
    micro_batches: list[tuple[Tensor, Tensor]]
    """Sample ids [b] and their tokens [b, T + 1], both int64, on the CPU."""

    @classmethod
    def read(cls, corpus: Corpus, samples: np.ndarray, batch_plan: BatchPlan, seq_len: int,
             device: torch.device) -> Batch:
        """Read it, for a GPU into memory from which it copies while it computes."""
        def tensor(array: np.ndarray) -> Tensor:
            return torch.from_numpy(array).pin_memory() if device.type == "cuda" else torch.from_numpy(array)

        return cls(samples, [(tensor(ids), tensor(rows))
                             for ids, rows in micro_batches(corpus, samples, batch_plan, seq_len)])

    @property
    def n_targets(self) -> int:
        """Target tokens of this rank's part."""
        return sum(rows[:, 1:].numel() for _, rows in self.micro_batches)


class Prefetch:
    """Reads one step ahead.

    Args:
        read: a step's batch, from the number of finished steps; called in the thread.
        device: of the process. A thread that pins memory without knowing it would open a context on the first GPU.
    """

    def __init__(self, read: Callable[[int], Batch], device: torch.device) -> None:
        start = (torch.cuda.set_device, (device,)) if device.type == "cuda" else (None, ())
        self._pool = ThreadPoolExecutor(1, "prefetch", *start)
        self._read = read
        self._ahead: tuple[int, Future[Batch]] | None = None

    def forget(self) -> None:
        """Give up what was read ahead, since it would be read otherwise now."""
        self._ahead = None

    def take(self, step: int) -> Batch:
        """The batch of `step`; from now on the thread reads the following one's. Raises what `read` has raised."""
        ahead, self._ahead = self._ahead, None
        reading = ahead[1] if ahead and ahead[0] == step else self._pool.submit(self._read, step)
        batch = reading.result()
        self._ahead = step + 1, self._pool.submit(self._read, step + 1)
        return batch
