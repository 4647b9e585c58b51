"""Device functions that attention's kernels share: which rows a program has, tiles of rows, masks and rotation.

A sample is a sequence of the batch, or a packed document. `cu_seqlens` is what the launcher makes of the caller's: it
begins with 0, ends with N and never descends, so that the first and the last document hold the rows of no document.

H heads, K head size, N rows, R rotary dimension.
"""

from __future__ import annotations

import triton
import triton.language as tl

from phi1.kernels.core import constants
from phi1.kernels.core.philox_triton import philox_key

LOG2E = tl.constexpr(constants.LOG2E)
# The largest score of a query that sees nothing: finite, so that its probabilities are 0 and not NaN.
LOWEST = tl.constexpr(-1e30)


@triton.jit
def find_document(slot, cu_seqlens_ptr, n_documents, BLOCK: tl.constexpr):
    """(document, block of it) of a slot: document i has the slots from cu_seqlens[i] // BLOCK + i on, enough for it."""
    low, high = tl.cast(0, tl.int32), n_documents - 1
    while low < high:
        middle = (low + high + 1) // 2
        before = tl.load(cu_seqlens_ptr + middle) // BLOCK + middle <= slot
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle - 1)
    return low, slot - (tl.load(cu_seqlens_ptr + low) // BLOCK + low)


@triton.jit
def program_rows(cu_seqlens_ptr, n_queries, n_keys, n_heads, n_blocks, n_samples, BLOCK: tl.constexpr,
                 LAST_FIRST: tl.constexpr):
    """(head, first, sample, origin, row, n_queries, n_keys): what this program attends to, from token `first` on.

    origin, int64, is the sample's number in a batch and its first row among packed documents; row is its first row in
    either. Of packed documents a program may have none: first is then n_queries or more. Heads are innermost, so that
    within a sample the longest tiles of all heads start first.
    """
    pid = tl.program_id(0)
    head = pid % n_heads
    block, sample = pid // n_heads % n_blocks, pid // n_heads // n_blocks
    if LAST_FIRST:
        block = n_blocks - 1 - block
    origin = sample.to(tl.int64)
    row = origin * n_queries
    if cu_seqlens_ptr is not None:
        document, block = find_document(block, cu_seqlens_ptr, n_samples + 2, BLOCK)
        begin = tl.load(cu_seqlens_ptr + document)
        origin = begin.to(tl.int64)
        row = origin
        n_queries = tl.load(cu_seqlens_ptr + document + 1) - begin
        n_keys = n_queries
        sample = document - 1
    return head.to(tl.int64), block * BLOCK, sample, origin, row, n_queries, n_keys


@triton.jit
def keys_of_queries(first, start, n_queries, n_keys, IS_CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr,
                    BLOCK_N: tl.constexpr):
    """(begin, whole, end): some of the queries first.. see keys of tiles begin..end, and all of them see begin..whole
    (but for those before start)."""
    offset = n_keys - n_queries
    begin, whole, end = start // BLOCK_N * BLOCK_N, n_keys, n_keys
    if IS_CAUSAL:
        whole = tl.minimum(n_keys, first + offset + 1)
        end = tl.minimum(n_keys, first + offset + BLOCK_M)
    return begin, whole // BLOCK_N * BLOCK_N, end


@triton.jit
def load_rows(ptr, first, low, high, stride_t, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
              MASKED: tl.constexpr):
    """Rows first.. of a head, [ROWS, BLOCK_D]: 0 outside of low..high (if MASKED) and of HEAD_DIM."""
    offs_r, offs_d = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    ptrs = ptr + tl.cast(first, tl.int64) * stride_t + (offs_r[:, None] * stride_t + offs_d[None, :])
    if MASKED:
        row = first + offs_r
        mask = ((row >= low) & (row < high))[:, None]
        if BLOCK_D > HEAD_DIM:
            mask = mask & (offs_d < HEAD_DIM)[None, :]
        x = tl.load(ptrs, mask=mask, other=0.0)
    elif BLOCK_D > HEAD_DIM:
        x = tl.load(ptrs, mask=(offs_d < HEAD_DIM)[None, :], other=0.0)
    else:
        x = tl.load(ptrs)
    return x


@triton.jit
def store_rows(ptr, x, first, n_rows, stride_t, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write x [ROWS, BLOCK_D] to rows first.. of a head, up to n_rows and HEAD_DIM."""
    offs_r, offs_d = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    ptrs = ptr + tl.cast(first, tl.int64) * stride_t + (offs_r[:, None] * stride_t + offs_d[None, :])
    mask = (first + offs_r < n_rows)[:, None]
    if BLOCK_D > HEAD_DIM:
        mask = mask & (offs_d < HEAD_DIM)[None, :]
    tl.store(ptrs, x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def rotate(x, rotation, first, n_rows, SIGN: tl.constexpr, HALF: tl.constexpr):
    """x [ROWS, BLOCK_D] in float32, its first 2 HALF columns rotated by the positions of rows first.. of the sample.

    rotation: (cos [T, HALF], sin, the sample's positions, T). SIGN -1 rotates back. A position outside of the tables
    gives NaN.
    """
    cos_ptr, sin_ptr, positions_ptr, n_positions = rotation
    offs_r = first + tl.arange(0, x.shape[0])
    position = tl.load(positions_ptr + offs_r, mask=offs_r < n_rows, other=0).to(tl.int64)
    known = (position >= 0) & (position < n_positions)
    x = x.to(tl.float32)
    if HALF & (HALF - 1):
        x = rotate_columns(x, cos_ptr, sin_ptr, position, known, SIGN, HALF)
    else:
        x = rotate_halves(x, cos_ptr, sin_ptr, position, known, SIGN, HALF)
    return x


@triton.jit
def rotate_halves(x, cos_ptr, sin_ptr, position, known, SIGN: tl.constexpr, HALF: tl.constexpr):
    """`rotate` where HALF is a power of two: as a tensor of halves, whose pairs meet in one thread."""
    ROWS: tl.constexpr = x.shape[0]
    PAIRS: tl.constexpr = x.shape[1] // (2 * HALF)
    offs_p, offs_d = tl.arange(0, PAIRS)[None, :, None], tl.arange(0, HALF)[None, None, :]
    at, known = position[:, None, None] * HALF + offs_d, known[:, None, None]
    c = tl.load(cos_ptr + at, mask=known & (offs_p == 0), other=1.0)  # [ROWS, PAIRS, HALF]
    s = tl.load(sin_ptr + at, mask=known & (offs_p == 0), other=0.0) * SIGN
    c = tl.where(known, c, float("nan"))
    a, b = tl.split(tl.permute(tl.reshape(x, (ROWS, PAIRS, 2, HALF)), (0, 1, 3, 2)))
    turned = tl.permute(tl.join(a * c - b * s, b * c + a * s), (0, 1, 3, 2))
    return tl.reshape(turned, (ROWS, PAIRS * 2 * HALF))


@triton.jit
def rotate_columns(x, cos_ptr, sin_ptr, position, known, SIGN: tl.constexpr, HALF: tl.constexpr):
    """`rotate` of any HALF: each column fetches its pair's other one, an exchange between threads."""
    offs_d = tl.arange(0, x.shape[1])[None, :]
    other = tl.where(offs_d < HALF, offs_d + HALF, tl.where(offs_d < 2 * HALF, offs_d - HALF, offs_d))
    at, known = position[:, None] * HALF + offs_d % HALF, known[:, None]
    c = tl.load(cos_ptr + at, mask=known & (offs_d < 2 * HALF), other=1.0)  # [ROWS, BLOCK_D]
    s = tl.load(sin_ptr + at, mask=known & (offs_d < 2 * HALF), other=0.0) * SIGN
    c = tl.where(known, c, float("nan"))
    return x * c + tl.gather(x, tl.broadcast_to(other, x.shape), 1) * tl.where(offs_d < HALF, -s, s)


@triton.jit
def sees(query, key, n_keys, start, IS_CAUSAL: tl.constexpr, HAS_STARTS: tl.constexpr):
    """Which queries see which keys, by positions whose shapes broadcast."""
    seen = key < n_keys
    if IS_CAUSAL:
        seen = seen & (key <= query)
    if HAS_STARTS:
        seen = seen & (key >= start) & (query >= start)
    return seen


@triton.jit
def first_token(seq_starts_ptr, sample, n_keys):
    """The first position of the sample that attends and is attended to, 0 without seq_starts."""
    start = n_keys * 0
    if seq_starts_ptr is not None:
        start = tl.load(seq_starts_ptr + sample).to(tl.int32)
        start = tl.minimum(tl.maximum(start, 0), n_keys)
    return start


@triton.jit
def masks_of(rng_ptr, sample_ids_ptr, sample, n_samples, head, stream, threshold):
    """(key, sample, stream, threshold) of the dropout masks of one head: their counters but for row and columns.

    The sample is that of sample_ids [n_samples], or its number. Without dropout nothing reads this.
    """
    if sample_ids_ptr is not None:
        inside = (sample >= 0) & (sample < n_samples)
        sample = tl.load(sample_ids_ptr + sample, mask=inside, other=0).to(tl.int32)
    key = 0
    if rng_ptr is not None:
        key = philox_key(rng_ptr)
    return key, sample, stream + head.to(tl.int32), threshold


@triton.jit
def load_statistics(ptr, first, n_rows, other, ROWS: tl.constexpr):
    """Float32 statistics of rows first.., [ROWS]; other past n_rows.

    The sum over one element keeps the compiler from loading in the layout of the use: there a thread would load 16 of
    the values, 4 bytes at a time, and hold 16 addresses.
    """
    rows = first + tl.arange(0, ROWS)
    x = tl.load(ptr + rows, mask=rows < n_rows, other=other)
    return tl.sum(x[:, None], 1)


@triton.jit
def mask_scale(rng_ptr, threshold):
    """What kept probabilities are multiplied by."""
    if rng_ptr is None:
        return 1.0
    else:  # noqa: RET505  after a return, Triton would compile what does not run too
        return 65536.0 / (65536 - threshold)


@triton.jit(do_not_specialize=["n_tokens", "n_positions"])
def rotate_rows_kernel(
    x_ptr,  # [B, T, H, K]
    y_ptr,  # [B, T, H, K] contiguous
    cos_ptr,  # [P, R/2] float32
    sin_ptr,  # [P, R/2]
    positions_ptr,  # [B, T]
    n_tokens,
    n_heads,
    n_positions,
    stride_x_b,
    stride_x_t,
    stride_x_h,
    HALF: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """One program per BLOCK_T tokens of one head."""
    pid, blocks = tl.program_id(0), tl.cdiv(n_tokens, BLOCK_T)
    head, sample = (pid % n_heads).to(tl.int64), (pid // n_heads // blocks).to(tl.int64)
    first = pid // n_heads % blocks * BLOCK_T
    x = load_rows(x_ptr + sample * stride_x_b + head * stride_x_h, first, 0, n_tokens, stride_x_t, BLOCK_T, HEAD_DIM,
                  BLOCK_D, True)
    y = rotate(x, (cos_ptr, sin_ptr, positions_ptr + sample * n_tokens, n_positions), first, n_tokens, 1, HALF)
    store_rows(y_ptr + (sample * n_tokens * n_heads + head) * HEAD_DIM, y, first, n_tokens, n_heads * HEAD_DIM, BLOCK_T,
               HEAD_DIM, BLOCK_D)
