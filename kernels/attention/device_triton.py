"""Device functions that attention's kernels share: the rows of a program, tiles of rows, masks and rotation.

A sample is a sequence of the batch, or a packed document. The launcher pads the caller's `cu_seqlens`: it starts with
0, ends with N and never descends. Its first and last document therefore hold the rows that belong to no document.

B samples, T tokens or positions, N rows, H heads, K head size, R rotary dimension.
"""

from __future__ import annotations

import triton
import triton.language as tl

from phi1.kernels.core.philox_triton import philox_key


@triton.jit
def find_document(slot, cu_seqlens_ptr, n_documents, BLOCK: tl.constexpr):
    """Return (document, block of that document) of a slot.

    The slots of document i begin at cu_seqlens[i] // BLOCK + i, which leaves enough slots for every document.
    cu_seqlens_ptr: [n_documents + 1] int32.
    """
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
    """Return (head, first, sample, origin, row, n_queries, n_keys) of this program, which begins at token `first`.

    cu_seqlens_ptr: [n_samples + 3] int32, or None. origin (int64) is the sample's index in a batch, or its first row
    among packed documents. row is its first row in both cases. With packed documents a program may have no work; first
    is then n_queries or more. Heads are innermost, so the longest tiles of all heads of a sample start first.
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
    """Return (begin, masked, end) in keys for BLOCK_M queries from `first` on. start: the sample's first, or None.

    Some query sees a key in each tile of begin..end. Every query sees all keys of the tiles begin..masked. A causal
    program has a tile in masked..end: the one of its first query. Saying so saves registers.
    """
    masked, end = n_keys, n_keys
    if IS_CAUSAL:
        masked = first + n_keys - n_queries
        end = tl.minimum(n_keys, masked + BLOCK_M)
    if start is None:
        begin, masked = 0, masked // BLOCK_N * BLOCK_N
        if IS_CAUSAL:
            tl.assume(masked < end)
    else:
        begin = start // BLOCK_N * BLOCK_N
        masked = begin
    return begin, masked, end


@triton.jit
def load_rows(ptr, first, low, high, stride_t, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
              MASKED: tl.constexpr):
    """Load rows first.. of a head, [ROWS, BLOCK_D]. Columns past HEAD_DIM and, if MASKED, rows outside low..high are 0.

    ptr: [T, H, K] of one sample and head. low: None for 0.
    """
    offs_r, offs_d = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    ptrs = ptr + tl.cast(first, tl.int64) * stride_t + (offs_r[:, None] * stride_t + offs_d[None, :])
    if MASKED:
        row = first + offs_r
        mask = (row < high)[:, None]
        if low is not None:
            mask = mask & (row >= low)[:, None]
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
    """Store x [ROWS, BLOCK_D] to rows first.. of a head, up to n_rows and HEAD_DIM.

    ptr: [T, H, K] of one sample and head.
    """
    offs_r, offs_d = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    ptrs = ptr + tl.cast(first, tl.int64) * stride_t + (offs_r[:, None] * stride_t + offs_d[None, :])
    mask = (first + offs_r < n_rows)[:, None]
    if BLOCK_D > HEAD_DIM:
        mask = mask & (offs_d < HEAD_DIM)[None, :]
    tl.store(ptrs, x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def rotate(x, rotation, first, n_rows, SIGN: tl.constexpr, HALF: tl.constexpr):
    """Return x [ROWS, BLOCK_D] in float32, its first 2 HALF columns rotated by the positions of rows first.. .

    rotation: pointers to cos [T, HALF], sin [T, HALF] and the sample's positions [n_rows], and T. SIGN = -1 rotates
    back. A position outside the tables gives NaN.
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
    """Compute `rotate` for a HALF that is a power of two. One thread holds both elements of a pair.

    cos_ptr, sin_ptr: [T, HALF] float32.
    """
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
    """Compute `rotate` for any HALF. Each column gathers the other element of its pair, an exchange between threads.

    cos_ptr, sin_ptr: [T, HALF] float32.
    """
    offs_d = tl.arange(0, x.shape[1])[None, :]
    other = tl.where(offs_d < HALF, offs_d + HALF, tl.where(offs_d < 2 * HALF, offs_d - HALF, offs_d))
    at, known = position[:, None] * HALF + offs_d % HALF, known[:, None]
    c = tl.load(cos_ptr + at, mask=known & (offs_d < 2 * HALF), other=1.0)  # [ROWS, BLOCK_D]
    s = tl.load(sin_ptr + at, mask=known & (offs_d < 2 * HALF), other=0.0) * SIGN
    c = tl.where(known, c, float("nan"))
    return x * c + tl.gather(x, tl.broadcast_to(other, x.shape), 1) * tl.where(offs_d < HALF, -s, s)


@triton.jit
def sees(query, key, n_keys, start, IS_CAUSAL: tl.constexpr):
    """Return True where a query sees a key. query and key are positions whose shapes broadcast.

    A causal query is before n_keys, so a key that it sees is, too. Rows of queries past the end add nothing to a
    result, whatever they see. start: the first visible position of the sample, or None.
    """
    if IS_CAUSAL:
        seen = key <= query
    else:
        seen = key < n_keys
    if start is not None:
        seen = seen & (key >= start)
        if not IS_CAUSAL:
            seen = seen & (query >= start)
    return seen


@triton.jit
def first_token(seq_starts_ptr, sample, n_keys):
    """Return the first visible position of the sample. seq_starts_ptr: [B]."""
    start = tl.load(seq_starts_ptr + sample).to(tl.int32)
    return tl.minimum(tl.maximum(start, 0), n_keys)


@triton.jit
def dropout_of(rng_ptr, sample_ids_ptr, sample, n_samples, head, stream, threshold):
    """Return (key, sample, stream, threshold) of the dropout masks of one head, all of the counters but row and column.

    rng_ptr: [2] int64. sample_ids_ptr: [n_samples] int64, or None, and then the sample's index is its id.
    """
    if sample_ids_ptr is not None:
        inside = (sample >= 0) & (sample < n_samples)
        sample = tl.load(sample_ids_ptr + sample, mask=inside, other=0).to(tl.int32)
    return philox_key(rng_ptr), sample, stream + head.to(tl.int32), threshold


@triton.jit
def kept_scale(dropout):
    """Return the factor on kept probabilities. dropout: from `dropout_of`, or None."""
    if dropout is None:
        return 1.0
    else:  # noqa: RET505  without the else, Triton would also compile the code that never runs
        return 65536.0 / (65536 - dropout[3])


@triton.jit
def load_statistics(ptr, first, n_rows, other, ROWS: tl.constexpr):
    """Load float32 statistics of rows first.., [ROWS], with `other` past n_rows. ptr: [n_rows] float32.

    The sum over one element keeps the compiler from loading in the layout in which the values are used. In that layout
    a thread would load 16 values, 4 bytes at a time, and hold 16 addresses.
    """
    rows = first + tl.arange(0, ROWS)
    x = tl.load(ptr + rows, mask=rows < n_rows, other=other)
    return tl.sum(x[:, None], 1)


@triton.jit(do_not_specialize=["n_tokens", "n_positions"])
def rotate_rows_kernel(
    x_ptr,  # [B, T, H, K] input
    y_ptr,  # [B, T, H, K] contiguous output
    cos_ptr,  # [n_positions, R/2] float32
    sin_ptr,  # [n_positions, R/2] float32
    positions_ptr,  # [B, T] integer
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
    x = load_rows(x_ptr + sample * stride_x_b + head * stride_x_h, first, None, n_tokens, stride_x_t, BLOCK_T, HEAD_DIM,
                  BLOCK_D, True)
    y = rotate(x, (cos_ptr, sin_ptr, positions_ptr + sample * n_tokens, n_positions), first, n_tokens, 1, HALF)
    store_rows(y_ptr + (sample * n_tokens * n_heads + head) * HEAD_DIM, y, first, n_tokens, n_heads * HEAD_DIM, BLOCK_T,
               HEAD_DIM, BLOCK_D)
