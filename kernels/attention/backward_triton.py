"""The Triton kernels of attention's backward pass (FlashAttention-2, arXiv 2307.08691). `dispatch.py` has the formulas.

Two kernels compute seven products; one with atomic additions would need five. In return every sum has one order, and a
run repeats bit for bit. The first computes dq and writes delta = rowsum(dout out) for the second, which computes dk and
dv and holds S transposed, because S would take more registers there. Both rotate gradients back in float32.

q, k, v, dout and the gradients have their own dtype, to which P and dS are rounded for their products. Sums and
exponentials are float32. delta comes from the rounded out, so dq and dk of a query that sees one key are not exactly 0.

B samples, Tq queries, Tk keys, N rows, T positions, H heads, K head size, R rotary dimension.
"""

from __future__ import annotations

import triton
import triton.language as tl

from phi1.kernels.attention.device_triton import (
    dropout_of,
    first_token,
    kept_scale,
    keys_of_queries,
    load_rows,
    load_statistics,
    program_rows,
    rotate,
    sees,
    store_rows,
)
from phi1.kernels.core.constants_triton import LOG2E
from phi1.kernels.core.philox_triton import keep_mask, keep_mask_transposed


@triton.jit(do_not_specialize=["n_queries", "n_keys", "n_rows", "n_blocks", "n_samples", "n_positions",
                               "stream", "threshold"])
def attention_backward_dq_kernel(
    dout_ptr,  # [N, H, K] contiguous
    q_ptr,  # [B, Tq, H, K]
    k_ptr,  # [B, Tk, H, K]
    v_ptr,  # [B, Tk, H, K]
    out_ptr,  # [N, H, K] contiguous
    lse_ptr,  # [H, N] float32
    delta_ptr,  # [H, N] float32 output
    dq_ptr,  # [B, Tq, H, K] output
    cu_seqlens_ptr,  # [B + 3] int32 of packed documents, or None
    seq_starts_ptr,  # [B] integer, or None
    cos_ptr,  # [T, R/2] float32, or None for no rotation
    sin_ptr,  # [T, R/2] float32, or None
    positions_ptr,  # [N] integer, or None
    rng_ptr,  # [2] int64, or None for no dropout
    sample_ids_ptr,  # [B] int64, or None
    n_queries,
    n_keys,
    n_rows,
    n_heads,
    n_blocks,
    n_samples,
    n_positions,
    stride_q_b,  # of packed documents: stride_q_t
    stride_q_t,
    stride_q_h,
    stride_k_b,
    stride_k_t,
    stride_k_h,
    stride_v_b,
    stride_v_t,
    stride_v_h,
    stride_dq_b,
    stride_dq_t,
    stride_dq_h,
    scale,
    stream,
    threshold,
    IS_CAUSAL: tl.constexpr,
    ROTATE_Q: tl.constexpr,
    ROTATE_K: tl.constexpr,
    HALF: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program per BLOCK_M queries of one head."""
    head, first, sample, origin, row, n_queries, n_keys = program_rows(
        cu_seqlens_ptr, n_queries, n_keys, n_heads, n_blocks, n_samples, BLOCK_M, True)
    if first >= n_queries:
        return
    if positions_ptr is not None:
        positions_ptr += row
    rotation, rotation_of_k = (cos_ptr, sin_ptr, positions_ptr, n_positions), None
    if ROTATE_K:
        rotation_of_k = rotation
    start, dropout = None, None
    if seq_starts_ptr is not None:
        start = first_token(seq_starts_ptr, sample, n_keys)
    if rng_ptr is not None:
        dropout = dropout_of(rng_ptr, sample_ids_ptr, sample, n_samples, head, stream, threshold)
    q_ptr += origin * stride_q_b + head * stride_q_h
    q = load_rows(q_ptr, first, None, n_queries, stride_q_t, BLOCK_M, HEAD_DIM, BLOCK_D, True)
    if ROTATE_Q:
        q = rotate(q, rotation, first, n_queries, 1, HALF).to(q.dtype)
    at, stride_out_t = (row * n_heads + head) * HEAD_DIM, n_heads * HEAD_DIM
    dout = load_rows(dout_ptr + at, first, None, n_queries, stride_out_t, BLOCK_M, HEAD_DIM, BLOCK_D, True)
    out = load_rows(out_ptr + at, first, None, n_queries, stride_out_t, BLOCK_M, HEAD_DIM, BLOCK_D, True)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)  # [BLOCK_M]
    offs_m = first + tl.arange(0, BLOCK_M)
    statistics = head * n_rows + row + offs_m
    tl.store(delta_ptr + statistics, delta, mask=offs_m < n_queries)
    lse = tl.load(lse_ptr + statistics, mask=offs_m < n_queries, other=float("inf")) * LOG2E
    query = offs_m + n_keys - n_queries  # [BLOCK_M], positions in the sample
    k_ptr += origin * stride_k_b + head * stride_k_h
    v_ptr += origin * stride_v_b + head * stride_v_h
    rows, keys = (q, dout, lse, delta, query), (k_ptr, v_ptr, stride_k_t, stride_v_t, n_keys, start)
    begin, masked, end = keys_of_queries(first, start, n_queries, n_keys, IS_CAUSAL, BLOCK_M, BLOCK_N)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dq = add_keys(dq, rows, keys, masked, end, rotation_of_k, dropout, scale, IS_CAUSAL, HEAD_DIM, HALF, BLOCK_N, True)
    if start is None:
        dq = add_keys(dq, rows, keys, begin, masked, rotation_of_k, dropout, scale, IS_CAUSAL, HEAD_DIM, HALF, BLOCK_N,
                      False)
    dq *= scale
    if cos_ptr is not None:
        dq = rotate(dq, rotation, first, n_queries, -1, HALF)
    store_rows(dq_ptr + origin * stride_dq_b + head * stride_dq_h, dq, first, n_queries, stride_dq_t, BLOCK_M,
               HEAD_DIM, BLOCK_D)


@triton.jit
def add_keys(
    dq, rows, keys, first, last, rotation, dropout, scale, IS_CAUSAL: tl.constexpr, HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):
    """Add the contribution of keys first..last to dq [BLOCK_M, BLOCK_D].

    rows: (q, dout, lse, delta, query). keys: (k_ptr, v_ptr, stride_k_t, stride_v_t, n_keys, start). The other arguments
    are as in the forward's `attend`.
    """
    q, dout, lse, delta, query = rows
    k_ptr, v_ptr, stride_k_t, stride_v_t, n_keys, start = keys
    offs_n = tl.arange(0, BLOCK_N)
    for n in range(first, last, BLOCK_N):
        k = load_rows(k_ptr, n, start, n_keys, stride_k_t, BLOCK_N, HEAD_DIM, q.shape[1], MASKED)
        if rotation is not None:
            k = rotate(k, rotation, n, n_keys, 1, HALF).to(k.dtype)
        v = load_rows(v_ptr, n, start, n_keys, stride_v_t, BLOCK_N, HEAD_DIM, q.shape[1], MASKED)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        if MASKED:
            s = tl.where(sees(query[:, None], (n + offs_n)[None, :], n_keys, start, IS_CAUSAL), s, float("-inf"))
        p = tl.exp2(s * (scale * LOG2E) - lse[:, None])
        dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
        if dropout is not None:
            key, number, stream, threshold = dropout
            keep = keep_mask(key, query, n, number, stream, threshold, BLOCK_N)
            dp = tl.where(keep, dp * kept_scale(dropout), 0.0)
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    return dq


@triton.jit(do_not_specialize=["n_queries", "n_keys", "n_rows", "n_blocks", "n_samples", "n_positions",
                               "stream", "threshold"])
def attention_backward_dkdv_kernel(
    dout_ptr,  # [N, H, K] contiguous
    q_ptr,  # [B, Tq, H, K]
    k_ptr,  # [B, Tk, H, K]
    v_ptr,  # [B, Tk, H, K]
    lse_ptr,  # [H, N] float32
    delta_ptr,  # [H, N] float32
    dk_ptr,  # [B, Tk, H, K] output
    dv_ptr,  # [B, Tk, H, K] output, with dk's strides
    cu_seqlens_ptr,  # [B + 3] int32 of packed documents, or None
    seq_starts_ptr,  # [B] integer, or None
    cos_ptr,  # [T, R/2] float32, or None for no rotation
    sin_ptr,  # [T, R/2] float32, or None
    positions_ptr,  # [N] integer, or None
    rng_ptr,  # [2] int64, or None for no dropout
    sample_ids_ptr,  # [B] int64, or None
    n_queries,
    n_keys,
    n_rows,
    n_heads,
    n_blocks,
    n_samples,
    n_positions,
    stride_q_b,  # of packed documents: stride_q_t
    stride_q_t,
    stride_q_h,
    stride_k_b,
    stride_k_t,
    stride_k_h,
    stride_v_b,
    stride_v_t,
    stride_v_h,
    stride_dk_b,
    stride_dk_t,
    stride_dk_h,
    scale,
    stream,
    threshold,
    IS_CAUSAL: tl.constexpr,
    ROTATE_Q: tl.constexpr,
    ROTATE_K: tl.constexpr,
    HALF: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program per BLOCK_N keys of one head."""
    head, first, sample, origin, row, n_queries, n_keys = program_rows(
        cu_seqlens_ptr, n_queries, n_keys, n_heads, n_blocks, n_samples, BLOCK_N, False)
    if first >= n_keys:
        return
    if positions_ptr is not None:
        positions_ptr += row
    rotation, rotation_of_q = (cos_ptr, sin_ptr, positions_ptr, n_positions), None
    if ROTATE_Q:
        rotation_of_q = rotation
    start, dropout = None, None
    if seq_starts_ptr is not None:
        start = first_token(seq_starts_ptr, sample, n_keys)
    if rng_ptr is not None:
        dropout = dropout_of(rng_ptr, sample_ids_ptr, sample, n_samples, head, stream, threshold)
    k = load_rows(k_ptr + origin * stride_k_b + head * stride_k_h, first, start, n_keys, stride_k_t, BLOCK_N, HEAD_DIM,
                  BLOCK_D, True)
    v = load_rows(v_ptr + origin * stride_v_b + head * stride_v_h, first, start, n_keys, stride_v_t, BLOCK_N, HEAD_DIM,
                  BLOCK_D, True)
    if ROTATE_K:
        k = rotate(k, rotation, first, n_keys, 1, HALF).to(k.dtype)
    q_ptr += origin * stride_q_b + head * stride_q_h
    dout_ptr += (row * n_heads + head) * HEAD_DIM
    tile = (k, v, first)
    queries = (q_ptr, dout_ptr, lse_ptr + (head * n_rows + row), delta_ptr + (head * n_rows + row), stride_q_t,
               n_heads * HEAD_DIM, n_queries, n_keys, start)
    # The first query that sees a key of the program, and the first that sees all its keys; both begin a tile.
    begin, unmasked = 0, 0
    if IS_CAUSAL:
        begin = tl.maximum(first - (n_keys - n_queries), 0) // BLOCK_M * BLOCK_M
        unmasked = tl.cdiv(tl.maximum(first + BLOCK_N - 1 - (n_keys - n_queries), 0), BLOCK_M) * BLOCK_M
    sums = (tl.zeros([BLOCK_N, BLOCK_D], tl.float32), tl.zeros([BLOCK_N, BLOCK_D], tl.float32))
    if start is not None:
        tl.assume(begin < n_queries)
        sums = add_queries(sums, tile, queries, begin, n_queries, rotation_of_q, dropout, scale, IS_CAUSAL, HEAD_DIM,
                           HALF, BLOCK_M, True)
    elif IS_CAUSAL:
        sums = add_queries(sums, tile, queries, begin, tl.minimum(unmasked, n_queries), rotation_of_q, dropout, scale,
                           IS_CAUSAL, HEAD_DIM, HALF, BLOCK_M, True)
        sums = add_queries(sums, tile, queries, unmasked, n_queries, rotation_of_q, dropout, scale, IS_CAUSAL,
                           HEAD_DIM, HALF, BLOCK_M, False)
    else:
        tl.assume(n_queries > 0)
        sums = add_queries(sums, tile, queries, 0, n_queries, rotation_of_q, dropout, scale, IS_CAUSAL, HEAD_DIM,
                           HALF, BLOCK_M, False)
    dk, dv = sums
    at = origin * stride_dk_b + head * stride_dk_h
    dv *= kept_scale(dropout)
    store_rows(dv_ptr + at, dv, first, n_keys, stride_dk_t, BLOCK_N, HEAD_DIM, BLOCK_D)
    dk *= scale
    if cos_ptr is not None:
        dk = rotate(dk, rotation, first, n_keys, -1, HALF)
    store_rows(dk_ptr + at, dk, first, n_keys, stride_dk_t, BLOCK_N, HEAD_DIM, BLOCK_D)


@triton.jit
def add_queries(
    sums, tile, queries, first, last, rotation, dropout, scale, IS_CAUSAL: tl.constexpr, HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr, BLOCK_M: tl.constexpr, MASKED: tl.constexpr,
):
    """Add the contribution of queries first..last to (dk, dv), both [BLOCK_N, BLOCK_D].

    tile: (k, v, their first key). queries: (q_ptr [Tq, H, K], dout_ptr [Tq, H, K], lse_ptr [Tq], delta_ptr [Tq],
    stride_q_t, stride_out_t, n_queries, n_keys, start). The other arguments are as in the forward's `attend`.
    """
    dk, dv = sums
    k, v, first_key = tile
    q_ptr, dout_ptr, lse_ptr, delta_ptr, stride_q_t, stride_out_t, n_queries, n_keys, start = queries
    offs_n, offs_m = first_key + tl.arange(0, k.shape[0]), tl.arange(0, BLOCK_M)
    for m in range(first, last, BLOCK_M):
        # Rows past the end add 0: q and dout are 0 there, and an lse of infinity makes their probabilities 0.
        lse = load_statistics(lse_ptr, m, n_queries, float("inf"), BLOCK_M) * LOG2E
        delta = load_statistics(delta_ptr, m, n_queries, 0.0, BLOCK_M)
        q = load_rows(q_ptr, m, None, n_queries, stride_q_t, BLOCK_M, HEAD_DIM, k.shape[1], True)
        if rotation is not None:
            q = rotate(q, rotation, m, n_queries, 1, HALF).to(q.dtype)
        dout = load_rows(dout_ptr, m, None, n_queries, stride_out_t, BLOCK_M, HEAD_DIM, k.shape[1], True)
        query = m + offs_m + (n_keys - n_queries)
        s = tl.dot(k, tl.trans(q), input_precision="ieee")  # [BLOCK_N, BLOCK_M]
        if MASKED:
            s = tl.where(sees(query[None, :], offs_n[:, None], n_keys, start, IS_CAUSAL), s, float("-inf"))
        p = tl.exp2(s * (scale * LOG2E) - lse[None, :])
        dp = tl.dot(v, tl.trans(dout), input_precision="ieee")
        dropped = p
        if dropout is not None:
            key, number, stream, threshold = dropout
            keep = keep_mask_transposed(key, query, first_key, number, stream, threshold, k.shape[0])
            dropped = tl.where(keep, p, 0.0)
            dp = tl.where(keep, dp * kept_scale(dropout), 0.0)
        dv = tl.dot(dropped.to(dout.dtype), dout, dv, input_precision="ieee")
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv
