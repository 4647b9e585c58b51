"""The masks inside Triton kernels have the bits of the PyTorch specification; known answers included."""

import pytest
import torch
import triton
import triton.language as tl
from kernel_checks import kernel_device

from phi1.kernels import Dropout
from phi1.kernels.core.philox import attention_keep, residual_keep, threshold
from phi1.kernels.core.philox_triton import keep_mask, keep_mask_transposed, philox, philox_key

pytestmark = pytest.mark.triton
DEVICE = kernel_device()
FULL = 0xFFFFFFFF


@triton.jit
def words_kernel(counter_ptr, rng_ptr, out_ptr, BLOCK: tl.constexpr):
    """One program for BLOCK counters. counter [4, BLOCK] and out [4, BLOCK] int32, rng [2] int64."""
    offs = tl.arange(0, BLOCK)
    c0 = tl.load(counter_ptr + offs)
    c1 = tl.load(counter_ptr + BLOCK + offs)
    c2 = tl.load(counter_ptr + 2 * BLOCK + offs)
    c3 = tl.load(counter_ptr + 3 * BLOCK + offs)
    r0, r1, r2, r3 = philox(philox_key(rng_ptr), c0, c1, c2, c3)
    tl.store(out_ptr + offs, r0.to(tl.int32, bitcast=True))
    tl.store(out_ptr + BLOCK + offs, r1.to(tl.int32, bitcast=True))
    tl.store(out_ptr + 2 * BLOCK + offs, r2.to(tl.int32, bitcast=True))
    tl.store(out_ptr + 3 * BLOCK + offs, r3.to(tl.int32, bitcast=True))


@triton.jit
def keep_kernel(rng_ptr, sample_ptr, out_ptr, first_row, first_column, stream, t, STEP: tl.constexpr,
                BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The mask of one tile; rows STEP apart, sample [BLOCK_M] int64."""
    offs_m, offs_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    sample = tl.load(sample_ptr + offs_m).to(tl.int32)[:, None]
    keep = keep_mask(philox_key(rng_ptr), first_row + offs_m * STEP, first_column, sample, stream, t, BLOCK_N)
    tl.store(out_ptr + offs_m[:, None] * BLOCK_N + offs_n[None, :], keep)


def test_random123s_known_answer():
    counter = torch.tensor([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344])
    out = torch.empty(4, 16, dtype=torch.int32, device=DEVICE)
    counters = torch.where(counter > 0x7FFFFFFF, counter - (1 << 32), counter)[:, None].expand(4, 16).contiguous()
    # The upper halves of seed and step do not count.
    rng = torch.tensor([0xA4093822 + (3 << 32), 0x299F31D0 + (5 << 32)], device=DEVICE)
    words_kernel[(1,)](counters.to(DEVICE, torch.int32), rng, out, BLOCK=16)
    words = out.cpu().to(torch.int64) & FULL
    assert " ".join(f"{word:08x}" for word in words[:, 7].tolist()) == "4dfccaba 190a87f0 c47362ba b6b5242a"


def tile_mask(dropout, first_row, first_column, head, block_n, samples, step=1):
    block_m = len(samples)
    out = torch.zeros(block_m, block_n, dtype=torch.bool, device=DEVICE)
    stream = dropout.layer << 16 | dropout.kind << 12 | head
    stream = stream - (1 << 32) if stream > 0x7FFFFFFF else stream
    keep_kernel[(1,)](dropout.rng, samples, out, first_row, first_column, stream, threshold(dropout.p), STEP=step,
                      BLOCK_M=block_m, BLOCK_N=block_n)
    return out


@pytest.mark.parametrize(("block_n", "first_column"), [(32, 0), (32, 2016), (64, 1984), (128, 128), (256, 256)])
@pytest.mark.parametrize("layer", [23, 0xFFFF])
def test_keep_mask_is_attention_keep(block_n, first_column, layer):
    sample, head = 0x80000001, 31
    rng = torch.tensor([0xDEADBEEF, 5], device=DEVICE)
    dropout = Dropout(0.1, rng, torch.tensor([sample], device=DEVICE), layer, 2)
    got = tile_mask(dropout, 2040, first_column, head, block_n, torch.full((16,), sample, device=DEVICE))
    expected = attention_keep(dropout, samples=range(1), heads=range(head, head + 1), queries=range(2040, 2056),
                              keys=range(first_column, first_column + block_n))[0, 0]
    assert torch.equal(got, expected)
    assert 0.8 < got.float().mean() < 1


@triton.jit
def transposed_kernel(rng_ptr, out_ptr, first_row, first_column, sample, stream, t, BLOCK_M: tl.constexpr,
                      BLOCK_N: tl.constexpr):
    """The mask of one tile, columns first."""
    offs_m, offs_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    keep = keep_mask_transposed(philox_key(rng_ptr), first_row + offs_m, first_column, sample, stream, t, BLOCK_N)
    tl.store(out_ptr + offs_n[:, None] * BLOCK_M + offs_m[None, :], keep)


@pytest.mark.parametrize(("block_n", "first_column"), [(32, 0), (32, 2016), (64, 1984), (128, 128)])
def test_keep_mask_transposed_is_attention_keep(block_n, first_column):
    dropout = Dropout(0.1, torch.tensor([0xDEADBEEF, 5], device=DEVICE), torch.tensor([9], device=DEVICE), 3, 2)
    got = torch.zeros(block_n, 16, dtype=torch.bool, device=DEVICE)
    transposed_kernel[(1,)](dropout.rng, got, 2040, first_column, 9, 3 << 16 | 2 << 12 | 31, threshold(0.1), BLOCK_M=16,
                            BLOCK_N=block_n)
    expected = attention_keep(dropout, samples=range(1), heads=range(31, 32), queries=range(2040, 2056),
                              keys=range(first_column, first_column + block_n))[0, 0]
    assert torch.equal(got.t(), expected)


@pytest.mark.parametrize("p", [1 / 65536, 0.5, 65535 / 65536])
def test_keep_mask_at_the_thresholds_ends(p):
    dropout = Dropout(p, torch.tensor([1, 2], device=DEVICE), layer=1)
    got = tile_mask(dropout, 0, 0, 0, 256, torch.zeros(64, dtype=torch.int64, device=DEVICE))
    expected = attention_keep(dropout, samples=range(1), heads=range(1), queries=range(64), keys=range(256))[0, 0]
    assert torch.equal(got, expected)


def test_keep_mask_is_residual_keep_without_sample_ids():
    dropout = Dropout(0.3, torch.tensor([8, 9], device=DEVICE), layer=4, kind=1)
    got = tile_mask(dropout, 0, 64, 0, 64, torch.arange(32, device=DEVICE), step=0)
    assert torch.equal(got, residual_keep(dropout, 32, 128)[:, 64:])
