"""A caching allocator for CPU memory, as PyTorch has one for GPUs.

PyTorch returns every large CPU block to the system when it is freed. The system then maps the next block page by page
on first use, which takes a tenth of a training step of nano (200 MB a step). This allocator keeps a freed block and
reuses it for the next request of its size. Blocks lie in huge pages if the system has them: address translation with
pages of 4 KiB makes the step 2 % longer.
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
KEEP_BYTES = 2 << 30  # of all blocks, in use or free
HUGE_PAGE_BYTES = 2 << 20
CHUNK_BYTES = 32 << 20  # blocks are cut from chunks; untouched pages of a chunk take no memory

# The reference count of a storage, which PyTorch's own CUDA graphs use. Without this function no block is kept.
_holders = getattr(torch._C, "_storage_Use_Count", None)
_lock = threading.Lock()
_blocks: dict[int, list[torch.UntypedStorage]] = defaultdict(list)
_rest = memoryview(b"")  # the uncut part of the newest chunk


def empty(shape: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return torch.empty(shape), on a CPU in memory that the process reuses after the tensor is freed.

    Args:
        shape: the tensor's shape.
        dtype: any dtype.
        device: any device. On a device that is not a CPU this is torch.empty.

    Returns:
        An uninitialised contiguous tensor, aligned to 64 bytes. Its storage may be an eighth larger, and cannot be
        resized.
    """
    n_bytes = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or n_bytes < SMALL_BYTES or _holders is None:
        return torch.empty(shape, dtype=dtype, device=device)
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False):  # training could not reuse the memory of an inference tensor
            return empty(shape, dtype=dtype, device=device)
    with _lock:
        # Not a view of the bytes: an operator's output has no base.
        tensor = torch.empty(0, dtype=dtype, device="cpu").set_(_block(n_bytes), 0, shape)  # type: ignore[call-overload]
    fills = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    if fills and torch.are_deterministic_algorithms_enabled() and dtype.is_floating_point:
        tensor.fill_(torch.nan)  # as torch.empty does
    return tensor


def _block(n_bytes: int) -> torch.UntypedStorage:
    """Return a free block of at least n_bytes."""
    step = 1 << max(12, n_bytes.bit_length() - 4)  # rounds up by at most an eighth, so that similar sizes share blocks
    size = -(-n_bytes // step) * step
    for block in reversed(_blocks[size]):  # the newest block is the most likely to be in a cache
        if _is_free(block):
            return block
    # A storage moved to shared memory may be another process's as well, so it is no longer a block.
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
    """Cut a block from a chunk. The system gets the chunk back when its last block is freed."""
    global _rest
    if len(_rest) < size:
        try:
            _rest = _chunk(max(size, CHUNK_BYTES))
        except (AttributeError, OSError):  # no huge pages, or no contiguous range of this size
            return torch.empty(size, dtype=torch.uint8, device="cpu").untyped_storage()
    block, _rest = _rest[:size], _rest[size:]
    return torch.frombuffer(block, dtype=torch.uint8).untyped_storage()


def _chunk(n_bytes: int) -> memoryview:
    """Return new memory that starts at a page boundary, in huge pages if the system has them."""
    memory = mmap.mmap(-1, n_bytes + HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # the system's kernel may be built without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    start = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % HUGE_PAGE_BYTES
    return memoryview(memory)[start : start + n_bytes]


def _after_fork() -> None:
    """Renew the lock in a forked child: the parent's thread that may have held it does not exist there."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _is_free(block: torch.UntypedStorage) -> bool:
    """True if no tensor holds the block. The references of the list, the caller and the calls here do not count."""
    assert _holders is not None
    return _holders(block._cdata) == 1 and sys.getrefcount(block) <= 4 and not block.is_shared()


def _kept_bytes() -> int:
    return sum(size * len(blocks) for size, blocks in _blocks.items())
