"""Triton's own Philox gives the bits of the PyTorch specification, known answers included."""

import pytest
import torch

from phi1 import testing
from phi1.kernels import Dropout
from phi1.kernels._philox import attention_keep, threshold

if testing.kernel_device() is None:
    pytest.skip("no GPU: test_interpreter.py runs these", allow_module_level=True)

import triton
import triton.language as tl

DEVICE = testing.kernel_device()
FULL = 0xFFFFFFFF


@triton.jit
def words_kernel(counter_ptr, key_ptr, out_ptr, ROUNDS: tl.constexpr, BLOCK: tl.constexpr):
    """One program for BLOCK counters. counter [4, BLOCK] and out [4, BLOCK] int32, key [2] int32."""
    offs = tl.arange(0, BLOCK)
    c0 = tl.load(counter_ptr + offs)
    c1 = tl.load(counter_ptr + BLOCK + offs)
    c2 = tl.load(counter_ptr + 2 * BLOCK + offs)
    c3 = tl.load(counter_ptr + 3 * BLOCK + offs)
    low = tl.load(key_ptr).to(tl.uint32).to(tl.uint64)
    high = tl.load(key_ptr + 1).to(tl.uint32).to(tl.uint64)
    r0, r1, r2, r3 = tl.philox(low | (high << 32), c0, c1, c2, c3, ROUNDS)
    tl.store(out_ptr + offs, r0.to(tl.int32, bitcast=True))
    tl.store(out_ptr + BLOCK + offs, r1.to(tl.int32, bitcast=True))
    tl.store(out_ptr + 2 * BLOCK + offs, r2.to(tl.int32, bitcast=True))
    tl.store(out_ptr + 3 * BLOCK + offs, r3.to(tl.int32, bitcast=True))


def triton_words(counters, key, rounds):
    """counters: int64 [n, 4] and key: int64 [2], all uint32 values; the words as int64 [n, 4]."""
    block = triton.next_power_of_2(len(counters))
    padded = torch.zeros(4, block, dtype=torch.int64)
    padded[:, : len(counters)] = counters.T
    out = torch.empty(4, block, dtype=torch.int32, device=DEVICE)
    words_kernel[(1,)](as_int32(padded), as_int32(key), out, ROUNDS=rounds, BLOCK=block)
    return (out.cpu().to(torch.int64) & FULL)[:, : len(counters)].T


def as_int32(x):
    """The same 32 bits in int32: an int64 counter would silently select Philox4x64."""
    return torch.where(x > 0x7FFFFFFF, x - (1 << 32), x).to(DEVICE, torch.int32)


@pytest.mark.parametrize(
    ("rounds", "expected"),
    [(7, "4dfccaba 190a87f0 c47362ba b6b5242a"), (10, "d16cfe09 94fdcceb 5001e420 24126ea1")],
)
def test_triton_gives_random123s_known_answers(rounds, expected):
    counter = torch.tensor([[0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]])
    words = triton_words(counter, torch.tensor([0xA4093822, 0x299F31D0]), rounds)
    assert " ".join(f"{word:08x}" for word in words[0].tolist()) == expected


def test_triton_gives_the_bits_of_attention_keep():
    seed, step, sample, layer, head = 0xDEADBEEF, 5, 0x80000001, 23, 31
    dropout = Dropout(0.1, torch.tensor([seed, step]), torch.tensor([sample]), layer)
    queries, keys = range(2040, 2048), range(1984, 2048 + 64)
    expected = attention_keep(dropout, samples=range(1), heads=range(head, head + 1), queries=queries, keys=keys)[0, 0]
    column = torch.tensor(keys)
    counters = torch.stack(
        torch.broadcast_tensors(
            column // 64 * 8 + column % 8, torch.tensor(queries).view(-1, 1), torch.tensor(sample),
            torch.tensor(layer << 16 | head),
        ),
        dim=-1,
    ).reshape(-1, 4)
    words = triton_words(counters, torch.tensor([seed, step]), 7).view(len(queries), len(keys), 4)
    j = column % 64 // 8
    word = words.gather(-1, (j % 4).expand(len(queries), -1).unsqueeze(-1)).squeeze(-1)
    value = word >> (16 * (j // 4)) & 0xFFFF
    assert torch.equal(value >= threshold(0.1), expected)
    assert 0.8 < expected.float().mean() < 1
