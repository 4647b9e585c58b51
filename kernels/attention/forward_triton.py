"""The Triton kernel of attention's forward pass (FlashAttention-2, arXiv 2307.08691). `dispatch.py` has the formulas.

q, k, v and out are loaded and stored in their own dtype, and both products have operands of that dtype. Sums, maxima
and exponentials are float32. The softmax is in base 2 and the scale is part of its exponent, so scores of float16 q and
k as large as 300 stay finite.

Tiles that need a mask come first, from the diagonal on, and then the tiles whose keys every query of the program sees,
from the first key on. In the other order ptxas serialises the wgmma instructions of sm_90: the first of two loops may
run not once, and then sets the accumulators to 0 while products of the loop may still write them.

k and v are loaded by TMA, from descriptors made on the host, if the tile says so and the layout allows it.

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
    program_rows,
    rotate,
    sees,
    store_rows,
)
from phi1.kernels.core.constants_triton import LOG2E, LOWEST
from phi1.kernels.core.philox_triton import keep_mask


@triton.jit(do_not_specialize=["n_queries", "n_keys", "n_rows", "n_blocks", "n_samples", "n_positions",
                               "stream", "threshold"])
def attention_forward_kernel(
    q_ptr,  # [B, Tq, H, K]
    k_ptr,  # [B, Tk, H, K], or its descriptor if TMA
    v_ptr,  # [B, Tk, H, K], or its descriptor if TMA
    out_ptr,  # [N, H, K] contiguous output
    lse_ptr,  # [H, N] float32 output
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
    stride_q_b,  # stride_q_t for packed documents, as for k and v
    stride_q_t,
    stride_q_h,
    stride_k_b,
    stride_k_t,
    stride_k_h,
    stride_v_b,
    stride_v_t,
    stride_v_h,
    scale_log2,
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
    TMA: tl.constexpr,
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
    start, dropout, at = None, None, None  # at: in the descriptors of k and v
    if seq_starts_ptr is not None:
        start = first_token(seq_starts_ptr, sample, n_keys)
    if rng_ptr is not None:
        dropout = dropout_of(rng_ptr, sample_ids_ptr, sample, n_samples, head, stream, threshold)
    q_ptr += origin * stride_q_b + head * stride_q_h
    q = load_rows(q_ptr, first, None, n_queries, stride_q_t, BLOCK_M, HEAD_DIM, BLOCK_D, True)
    if ROTATE_Q:
        q = rotate(q, rotation, first, n_queries, 1, HALF).to(q.dtype)
    if TMA:
        at = (sample, head.to(tl.int32))
    else:
        k_ptr += origin * stride_k_b + head * stride_k_h
        v_ptr += origin * stride_v_b + head * stride_v_h
    keys = (k_ptr, v_ptr, stride_k_t, stride_v_t, n_keys, start, at)
    query = first + n_keys - n_queries + tl.arange(0, BLOCK_M)  # [BLOCK_M], positions in the sample
    begin, masked, end = keys_of_queries(first, start, n_queries, n_keys, IS_CAUSAL, BLOCK_M, BLOCK_N)
    state = (tl.zeros([BLOCK_M, BLOCK_D], tl.float32), tl.full([BLOCK_M], LOWEST, tl.float32),
             tl.zeros([BLOCK_M], tl.float32))
    state = attend(state, (q, query), keys, masked, end, rotation_of_k, dropout, scale_log2, IS_CAUSAL, HEAD_DIM, HALF,
                   BLOCK_N, True)
    if start is None:
        state = attend(state, (q, query), keys, begin, masked, rotation_of_k, dropout, scale_log2, IS_CAUSAL, HEAD_DIM,
                       HALF, BLOCK_N, False)
    acc, m_i, l_i = state

    l_i = tl.where(l_i == 0, 1.0, l_i)
    if cu_seqlens_ptr is not None:  # rows that belong to no document
        l_i = tl.where((sample < 0) | (sample >= n_samples), float("nan"), l_i)
    acc *= (kept_scale(dropout) / l_i)[:, None]
    store_rows(out_ptr + (row * n_heads + head) * HEAD_DIM, acc, first, n_queries,
               n_heads * HEAD_DIM, BLOCK_M, HEAD_DIM, BLOCK_D)
    offs_m = first + tl.arange(0, BLOCK_M)
    lse = (m_i * scale_log2 + tl.log2(l_i)) / LOG2E
    tl.store(lse_ptr + head * n_rows + row + offs_m, lse, mask=offs_m < n_queries)


@triton.jit
def attend(
    state, rows, keys, first, last, rotation, dropout, scale_log2, IS_CAUSAL: tl.constexpr, HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):
    """Add the keys first..last to the state: (acc [BLOCK_M, BLOCK_D], maximum m_i [BLOCK_M], sum l_i [BLOCK_M]).

    rows: (q, query) of the program. keys: (k_ptr, v_ptr, stride_k_t, stride_v_t, n_keys, start, at) of one sample and
    head, with `at` as in `load_keys`. rotation: as in `rotate`, or None for keys that are not to be rotated. dropout:
    from `dropout_of`, or None.
    """
    acc, m_i, l_i = state
    q, query = rows
    k_ptr, v_ptr, stride_k_t, stride_v_t, n_keys, start, at = keys
    offs_n = tl.arange(0, BLOCK_N)
    for n in range(first, last, BLOCK_N):
        k = load_keys(k_ptr, at, n, start, n_keys, stride_k_t, BLOCK_N, HEAD_DIM, q.shape[1], MASKED)
        if rotation is not None:
            k = rotate(k, rotation, n, n_keys, 1, HALF).to(k.dtype)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        if MASKED:
            s = tl.where(sees(query[:, None], (n + offs_n)[None, :], n_keys, start, IS_CAUSAL), s, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(s, 1))
        alpha = tl.exp2((m_i - m_new) * scale_log2)
        if s.dtype == q.dtype:  # float32, whose scores may have any size: their difference is exact
            p = tl.exp2((s - m_new[:, None]) * scale_log2)
        else:  # one fused operation
            p = tl.exp2(s * scale_log2 - (m_new * scale_log2)[:, None])
        l_i = l_i * alpha + tl.sum(p, 1)
        if dropout is not None:
            key, number, stream, threshold = dropout
            p = tl.where(keep_mask(key, query, n, number, stream, threshold, BLOCK_N), p, 0.0)
        v = load_keys(v_ptr, at, n, start, n_keys, stride_v_t, BLOCK_N, HEAD_DIM, q.shape[1], MASKED)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
        m_i = m_new
    return acc, m_i, l_i


@triton.jit
def load_keys(ptr, at, first, low, high, stride_t, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
              MASKED: tl.constexpr):
    """Load rows first.. of a head, [ROWS, BLOCK_D], as `load_rows` does, or from a descriptor [B, T, H, K] by TMA.

    at: (sample, head) in the descriptor, or None for a pointer. TMA loads 0 past the end of the sample and of the head,
    whether MASKED or not.
    """
    if at is None:
        x = load_rows(ptr, first, low, high, stride_t, ROWS, HEAD_DIM, BLOCK_D, MASKED)
    else:
        x = ptr.load([at[0], first, at[1], 0]).reshape(ROWS, BLOCK_D)
    return x
