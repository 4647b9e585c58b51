"""Memory on CPUs that stays with the process, as a GPU's caching allocator keeps it.

PyTorch returns every large CPU block to the system when it is freed, and takes it back page by page on first use: a
tenth of a training step of nano, which needs 200 MB a step. Here a block that no tensor holds any more is lent again to
the next request of its size. Where the system has huge pages, blocks lie in them: looking up the addresses of pages of
4 KiB makes the step 2 % longer.
"""

from __future__ import annotations

import math
import mmap
import os
import sys
import threading
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress

import torch

SMALL_BYTES = 128 << 10  # the C library keeps smaller blocks itself
KEEP_BYTES = 2 << 30  # in all, lent and not
HUGE_PAGE_BYTES = 2 << 20
CHUNK_BYTES = 32 << 20  # that blocks are cut from; what none of them has touched takes no memory

# How many hold a storage; PyTorch's own CUDA graphs ask it. Without it nothing is kept.
_holders = getattr(torch._C, "_storage_Use_Count", None)
_lock = threading.Lock()
_blocks: dict[int, list[torch.UntypedStorage]] = defaultdict(list)
_rest = memoryview(b"")  # of the newest chunk


def empty(shape: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """torch.empty(shape), contiguous; on a CPU in memory that the process keeps when the tensor has gone.

    Args:
        shape: of the tensor.
        dtype: any.
        device: any; on another device than a CPU this is torch.empty.

    Returns:
        An uninitialised tensor, aligned to 64 bytes. Its storage may be an eighth larger, and cannot be resized.
    """
    n_bytes = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or n_bytes < SMALL_BYTES or _holders is None:
        return torch.empty(shape, dtype=dtype, device=device)
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False):  # memory of an inference tensor could not be used in training later
            return empty(shape, dtype=dtype, device=device)
    with _lock:
        # Not a view of the bytes: an operator's output has no base.
        tensor = torch.empty(0, dtype=dtype, device="cpu").set_(_block(n_bytes), 0, shape)  # type: ignore[call-overload]
    fills = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    if fills and torch.are_deterministic_algorithms_enabled() and dtype.is_floating_point:
        tensor.fill_(torch.nan)  # as PyTorch does with memory of its own
    return tensor


def _block(n_bytes: int) -> torch.UntypedStorage:
    """At least n_bytes that nobody holds."""
    step = 1 << max(12, n_bytes.bit_length() - 4)  # at most an eighth more than asked for, so that near sizes share
    size = -(-n_bytes // step) * step
    for block in reversed(_blocks[size]):  # the newest is the likeliest to be in a cache
        if _is_free(block):
            return block
    # What was moved to shared memory is another process's as well, and not a block any more.
    _blocks[size] = [block for block in _blocks[size] if not block.is_shared()]
    if _kept_bytes() + size > KEEP_BYTES:
        for blocks in _blocks.values():
            blocks[:] = [block for block in blocks if not _is_free(block)]
    if _kept_bytes() + size > KEEP_BYTES:
        return torch.empty(size, dtype=torch.uint8, device="cpu").untyped_storage()
    block = _new_block(size)
    _blocks[size].append(block)
    return block


def _new_block(size: int) -> torch.UntypedStorage:
    """A block cut from a chunk, which goes back to the system with the last of its blocks."""
    global _rest
    if len(_rest) < size:
        try:
            _rest = _chunk(max(size, CHUNK_BYTES))
        except (AttributeError, OSError):  # a system without huge pages, or without so much memory in one piece
            return torch.empty(size, dtype=torch.uint8, device="cpu").untyped_storage()
    block, _rest = _rest[:size], _rest[size:]
    return torch.frombuffer(block, dtype=torch.uint8).untyped_storage()


def _chunk(n_bytes: int) -> memoryview:
    """Fresh memory that starts with a page, which is huge if the system has such."""
    memory = mmap.mmap(-1, n_bytes + HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel that was built without
        memory.madvise(mmap.MADV_HUGEPAGE)
    start = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % HUGE_PAGE_BYTES
    return memoryview(memory)[start : start + n_bytes]


def _after_fork() -> None:
    """In the child: another thread of the parent may have held the lock, and is not here to give it back."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _is_free(block: torch.UntypedStorage) -> bool:
    """True where no tensor and no Python variable holds the block; the list, the caller and the calls here do."""
    assert _holders is not None
    return _holders(block._cdata) == 1 and sys.getrefcount(block) <= 4 and not block.is_shared()


def _kept_bytes() -> int:
    return sum(size * len(blocks) for size, blocks in _blocks.items())
