"""Memory that stays with the process: never in two hands at once, and back when nobody holds it."""

import gc
import mmap
import os
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from phi1.kernels.core import cpu_memory
from phi1.kernels.core.cpu_memory import CHUNK_BYTES, HUGE_PAGE_BYTES, SMALL_BYTES, empty

CPU = torch.device("cpu")
MAP = mmap.mmap


def of_bytes(n, dtype=torch.uint8):
    return empty((n // dtype.itemsize,), dtype=dtype, device=CPU)


@pytest.fixture(autouse=True)
def nothing_is_kept(monkeypatch):
    monkeypatch.setattr(cpu_memory, "_blocks", type(cpu_memory._blocks)(list))
    monkeypatch.setattr(cpu_memory, "_rest", memoryview(b""))


def test_a_block_is_taken_again_when_its_tensor_has_gone():
    first = of_bytes(1 << 20)
    address = first.data_ptr()
    second = of_bytes(1 << 20)
    assert second.data_ptr() != address
    del first
    assert of_bytes(1 << 20, torch.float32).data_ptr() == address


@pytest.mark.parametrize("hold", [lambda x: x[5:9], lambda x: x.view(16, -1).t(), lambda x: x.detach(),
                                  lambda x: x.untyped_storage(), lambda x: x.numpy()])
def test_a_view_holds_the_block(hold):
    tensor = of_bytes(1 << 20)
    address = tensor.data_ptr()
    held = hold(tensor)
    del tensor
    assert of_bytes(1 << 20).data_ptr() != address
    del held
    gc.collect()
    assert address in {of.data_ptr() for of in [of_bytes(1 << 20), of_bytes(1 << 20)]}


def test_what_is_kept_is_bounded_and_unused_sizes_make_room(monkeypatch):
    monkeypatch.setattr(cpu_memory, "KEEP_BYTES", 3 << 20)
    tensors = [of_bytes(1 << 20) for _ in range(5)]
    assert len({tensor.data_ptr() for tensor in tensors}) == 5
    assert cpu_memory._kept_bytes() == 3 << 20
    del tensors[0]
    larger = of_bytes(3 << 19)
    assert cpu_memory._kept_bytes() == (2 << 20)  # the free block went, and the larger one would be too much
    del tensors, larger
    of_bytes(3 << 19)
    assert cpu_memory._kept_bytes() == 3 << 19


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="a system without huge pages")
def test_blocks_lie_in_huge_pages_and_a_chunk_goes_with_its_last_block(monkeypatch):
    chunks = []

    def recorded(*args, **kwargs):
        chunk = MAP(*args, **kwargs)
        chunks.append(weakref.ref(chunk))
        return chunk

    monkeypatch.setattr(mmap, "mmap", recorded)
    tensors = [of_bytes(n) for n in (CHUNK_BYTES - (4 << 20), 2 << 20, 2 << 20, CHUNK_BYTES + (8 << 20))]
    addresses = [tensor.data_ptr() for tensor in tensors]
    assert addresses[0] % HUGE_PAGE_BYTES == addresses[3] % HUGE_PAGE_BYTES == 0
    ends = sorted((tensor.data_ptr(), tensor.data_ptr() + tensor.numel()) for tensor in tensors)
    assert all(end <= start for (_, end), (start, _) in pairwise(ends))
    assert all("hg" in flags_of_mapping(address) for address in addresses)
    assert len(chunks) == 2
    cpu_memory._blocks.clear()
    del tensors[1:3]
    assert chunks[0]()
    del tensors[:2]
    assert not chunks[0]()
    assert chunks[1]()


def flags_of_mapping(address):
    """The system's flags of the mapping that holds an address; "hg" is the advice to use huge pages."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            start, end = (int(part, 16) for part in first.split("-"))
            inside = start <= address < end
        elif inside and first == "VmFlags:":
            return line.split()[1:]
    raise LookupError(address)


def test_what_was_moved_to_shared_memory_is_given_up():
    shared = of_bytes(1 << 20).fill_(1)
    shared.share_memory_()
    address = shared.data_ptr()
    del shared
    assert of_bytes(1 << 20).data_ptr() != address
    assert cpu_memory._kept_bytes() == 1 << 20


def test_without_room_for_a_chunk_blocks_come_from_pytorch(monkeypatch):
    def full(*args, **kwargs):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", full)
    address = of_bytes(1 << 20).data_ptr()
    assert of_bytes(1 << 20).data_ptr() == address


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a system without fork")
def test_a_child_forked_while_another_thread_takes_a_block_takes_its_own():
    with cpu_memory._lock:
        child = os.fork()
        if not child:
            of_bytes(1 << 20)
            os._exit(0)
    end = time.monotonic() + 60
    while not (found := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > end:
            os.kill(child, 9)
        time.sleep(0.01)
    assert found[1] == 0


def test_threads_never_get_the_same_block():
    def work(number):
        for _ in range(300):
            tensor = of_bytes(1 << 18).fill_(number)
            if not bool((tensor == number).all()):
                return "shared"
        return "own"

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(work, range(4))) == {"own"}


def test_tensors_are_as_torch_empty_makes_them():
    large, odd = ((SMALL_BYTES,), torch.int64), ((300, 999), torch.bfloat16)
    for shape, dtype in (large, odd, ((3, 0), torch.float32), ((), torch.float32)):
        tensor, torchs = empty(shape, dtype=dtype, device=CPU), torch.empty(shape, dtype=dtype)
        for what in ("shape", "dtype", "device", "requires_grad", "is_leaf", "_base"):
            assert getattr(tensor, what) == getattr(torchs, what), what
        assert tensor.stride() == torchs.stride()
        assert tensor.data_ptr() % 64 == 0


def test_memory_of_inference_serves_training_later():
    with torch.inference_mode():
        address = of_bytes(1 << 20, torch.float32).fill_(1).data_ptr()
    tensor = of_bytes(1 << 20, torch.float32).fill_(2).requires_grad_()
    assert tensor.data_ptr() == address
    tensor.square().sum().backward()
    assert tensor.grad is not None
