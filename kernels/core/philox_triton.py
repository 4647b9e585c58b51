"""Dropout masks inside Triton kernels: the bits of `core/philox.py`, 8 columns from one call of Philox4x32.

Counters and keys are int32: an int64 counter would silently select Philox4x64. One call gives the columns d, d + 8,
..., d + 56 of a block of 64. In the accumulator of a tensor instruction a thread holds columns 8 apart of one row, so
that the bits of a call fall to the thread that needs them, without an exchange.
"""

from __future__ import annotations

import triton
import triton.language as tl

from phi1.kernels.core.philox import ROUNDS

PHILOX_ROUNDS = tl.constexpr(ROUNDS)


@triton.jit
def philox_key(
    rng_ptr,  # [2] int64, (seed, step)
):
    """The low words of seed and step in one uint64, as `philox` takes them."""
    seed = tl.load(rng_ptr).to(tl.uint64) & 0xFFFFFFFF
    step = tl.load(rng_ptr + 1).to(tl.uint64) & 0xFFFFFFFF
    return seed | (step << 32)


@triton.jit
def philox(key, c0, c1, c2, c3):
    """Four uint32 words of int32 counters; shapes that broadcast stay small for two of the rounds."""
    return tl.philox(key, c0, c1, c2, c3, PHILOX_ROUNDS)


@triton.jit
def keep_mask(key, rows, first_column, sample, stream, threshold, BLOCK_N: tl.constexpr):
    """Which elements are kept, [BLOCK_M, BLOCK_N] of bool.

    key: of `philox_key`. rows [BLOCK_M] int32: the counter's row. first_column: int32, a multiple of BLOCK_N. sample:
    int32, one number or [BLOCK_M, 1]. stream: int32, layer << 16 | kind << 12 | head. threshold: round(65536 p).
    BLOCK_N: 32, or a multiple of 64.
    """
    BLOCK_M: tl.constexpr = rows.shape[0]
    tl.static_assert(BLOCK_N == 32 or BLOCK_N % 64 == 0, "a tile with dropout has 32 columns or a multiple of 64")
    BLOCKS: tl.constexpr = (BLOCK_N + 63) // 64
    first_column = tl.cast(first_column, tl.int32)
    group = first_column // 64 * 8 + tl.arange(0, BLOCKS * 8)  # [BLOCKS * 8]
    w0, w1, w2, w3 = philox(key, group[None, :], rows[:, None], sample, stream)  # [BLOCK_M, BLOCKS * 8]
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [BLOCK_M, BLOCKS * 8, 2, 2], word 2 i + j at [i, j]
    if BLOCK_N == 32:  # 4 columns of a call: of its words' low halves, or of the high ones
        half = (words >> (first_column % 64 // 32 * 16).to(tl.uint32)) & 0xFFFF
        keep = tl.permute(half.to(tl.int32) >= threshold, (0, 2, 3, 1))
    else:
        low, high = (words & 0xFFFF).to(tl.int32) >= threshold, (words >> 16).to(tl.int32) >= threshold
        keep = tl.permute(tl.reshape(tl.join(low, high), (BLOCK_M, BLOCKS, 8, 2, 2, 2)), (0, 1, 5, 3, 4, 2))
    return tl.reshape(keep, (BLOCK_M, BLOCK_N))


@triton.jit
def keep_mask_transposed(key, rows, first_column, sample, stream, threshold, BLOCK_N: tl.constexpr):
    """`keep_mask` with columns first, [BLOCK_N, BLOCK_M]; sample is one number."""
    BLOCK_M: tl.constexpr = rows.shape[0]
    tl.static_assert(BLOCK_N == 32 or BLOCK_N % 64 == 0, "a tile with dropout has 32 columns or a multiple of 64")
    BLOCKS: tl.constexpr = (BLOCK_N + 63) // 64
    COLUMNS: tl.constexpr = 4 if BLOCK_N == 32 else 8  # of a call
    first_column = tl.cast(first_column, tl.int32)
    group = first_column // 64 * 8 + tl.arange(0, BLOCKS * 8)  # [BLOCKS * 8]
    w0, w1, w2, w3 = philox(key, group[:, None], rows[None, :], sample, stream)  # [BLOCKS * 8, BLOCK_M]
    bits = (_kept_bits(w0, threshold) | (_kept_bits(w1, threshold) << 1)
            | (_kept_bits(w2, threshold) << 2) | (_kept_bits(w3, threshold) << 3))
    # Here the columns of a call fall to several threads. The sum over one element stops the compiler from moving the
    # exchange above Philox: four times as many calls, or an exchange of 8 unpacked bits.
    bits = tl.sum(bits[:, :, None], 2)
    if BLOCK_N == 32:
        bits = bits >> (first_column % 64 // 32 * 4)
    bits = tl.broadcast_to(tl.reshape(bits, (BLOCKS, 1, 8, BLOCK_M)), (BLOCKS, COLUMNS, 8, BLOCK_M))
    keep = (bits >> tl.arange(0, COLUMNS)[None, :, None, None]) & 1
    return tl.reshape(keep, (BLOCK_N, BLOCK_M)) != 0


@triton.jit
def _kept_bits(word, threshold):
    """Bit 0: whether the low half of a word is kept; bit 4: the high half."""
    low, high = (word & 0xFFFF).to(tl.int32) >= threshold, (word >> 16).to(tl.int32) >= threshold
    return low.to(tl.int32) | (high.to(tl.int32) << 4)
