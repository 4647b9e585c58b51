"""Memory for an operation's temporaries on CPUs, kept from call to call.

PyTorch returns every large CPU block to the system when it is freed, and takes it back page by page on first use: 12 %
of a training step of nano, where these operations would take 100 MB a step. GPUs have an allocator that keeps memory.

A block belongs to a name and a thread, and is the caller's until the next call under that name: it must not leave the
operation, and no two that are used at once may share a name.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import torch

KEEP_BYTES = 256 << 20  # a larger block is not kept; the default workspace of linear_cross_entropy is not larger

_kept = threading.local()


def scratch(name: str, shape: Sequence[int], dtype: torch.dtype, like: torch.Tensor) -> torch.Tensor:
    """An uninitialised contiguous tensor on the device of `like`."""
    n_bytes = math.prod(shape) * dtype.itemsize
    if not like.is_cpu or n_bytes > KEEP_BYTES:
        return like.new_empty(shape, dtype=dtype)
    block = getattr(_kept, name, None)
    if block is None or block.numel() < n_bytes:
        with torch.inference_mode(False):  # a tensor made in inference mode could not be written to outside
            block = torch.empty(n_bytes, dtype=torch.uint8, device="cpu")
        setattr(_kept, name, block)
    tensor = block[:n_bytes].view(dtype).view(shape)
    fills = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    if fills and torch.are_deterministic_algorithms_enabled():
        tensor.fill_(torch.nan)  # as PyTorch does with memory of its own
    return tensor


def kept() -> dict[str, torch.Tensor]:
    """This thread's blocks, bytes, by name."""
    return vars(_kept)
