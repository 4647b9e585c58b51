"""Memory on CPUs that stays with the process, as a GPU's caching allocator keeps it.

PyTorch returns every large CPU block to the system when it is freed, and takes it back page by page on first use: a
fifth of a training step of nano, which needs 200 MB a step. Here a block that nobody holds any more waits for the next
request of its size.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch

SMALL_BYTES = 128 << 10  # the C library keeps smaller blocks itself
KEEP_BYTES = 2 << 30  # what may wait, in all

_waiting: dict[int, list[np.ndarray]] = defaultdict(list)
_waiting_bytes = 0


class _Lent(np.ndarray):
    """A block while a tensor holds it. When the tensor's storage goes, this goes, and the block waits again."""

    def __del__(self) -> None:
        global _waiting_bytes
        block = self.base
        if isinstance(block, np.ndarray) and _waiting_bytes + block.nbytes <= KEEP_BYTES:
            _waiting_bytes += block.nbytes
            _waiting[block.nbytes].append(block)


def empty(shape: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """torch.empty(shape), contiguous; on a CPU in memory that the process keeps when the tensor has gone.

    Args:
        shape: of the tensor.
        dtype: any.
        device: any; on another device than a CPU this is torch.empty.

    Returns:
        An uninitialised tensor, aligned to 64 bytes. On a CPU its storage cannot be resized.
    """
    n_bytes = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or n_bytes < SMALL_BYTES:
        return torch.empty(shape, dtype=dtype, device=device)
    with torch.inference_mode(False):  # memory of an inference tensor could not be used in training later
        storage = torch.from_numpy(_block(n_bytes).view(_Lent)).untyped_storage()
        # Not a view of the bytes: an operator's output has no base.
        tensor = torch.empty(0, dtype=dtype, device="cpu").set_(storage, 0, shape)  # type: ignore[call-overload]
    fills = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    if fills and torch.are_deterministic_algorithms_enabled() and dtype.is_floating_point:
        tensor.fill_(torch.nan)  # as PyTorch does with memory of its own
    return tensor


def _block(n_bytes: int) -> np.ndarray:
    """At least n_bytes, aligned as PyTorch aligns."""
    global _waiting_bytes
    step = 1 << max(12, n_bytes.bit_length() - 4)  # at most an eighth more than asked for, so that near sizes share
    size = -(-n_bytes // step) * step
    if blocks := _waiting[size]:
        _waiting_bytes -= size
        return blocks.pop()
    return torch.empty(size, dtype=torch.uint8).numpy()
