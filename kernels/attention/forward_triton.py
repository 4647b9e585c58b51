"""The Triton kernel of attention's forward pass (FlashAttention-2, arXiv 2307.08691). `dispatch.py` has the formulas.

q, k, v and out are loaded and stored in their own dtype, and both products have operands of that dtype. Sums, maxima
and exponentials are float32. The softmax is in base 2 and the scale is part of its exponent, so scores of float16 q and
k as large as 300 stay finite. Tiles whose keys every query of the program sees come first and need no mask.

k and v are loaded by TMA, from descriptors made on the host, if the tile says so and the layout allows it. A
warp-specialised program computes with two groups of 4 warps and loads with a third group. It has one loop, which is
masked throughout, and reads q through a descriptor made in the kernel. This is the only form that both Triton 3.6.0 and
3.9.0 compile for sm_90 (168 registers, nothing spilled, `setmaxnreg` in the PTX). Other forms fail in
`NVGPUWarpSpecialization`:
- two loops, in 3.9.0: "expected non-null blocks"
- q by a descriptor of the host, in 3.9.0: "descriptor block and tensor must have the same number of elements"
- q by pointers, and therefore rotated q, in 3.9.0: "unsupported load type for producer commit"
- dropout, in 3.6.0
- a branch around the loop, which packed documents need, in both
A branch inside the loop turns the specialisation off without an error. With 64 queries both groups compute all queries.

B samples, Tq queries, Tk keys, N rows, T positions, H heads, K head size, R rotary dimension.
"""

from __future__ import annotations

import triton
import triton.language as tl

from phi1.kernels.attention.device_triton import (
    LOG2E,
    LOWEST,
    first_token,
    keys_of_queries,
    load_rows,
    mask_scale,
    masks_of,
    program_rows,
    rotate,
    sees,
    store_rows,
)
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
    WARP_SPECIALIZE: tl.constexpr,
):
    """One program per BLOCK_M queries of one head."""
    HAS_STARTS: tl.constexpr = seq_starts_ptr is not None
    head, first, sample, origin, row, n_queries, n_keys = program_rows(
        cu_seqlens_ptr, n_queries, n_keys, n_heads, n_blocks, n_samples, BLOCK_M, True)
    if cu_seqlens_ptr is not None:  # noqa: SIM102  a batch must have no branch here, or warp specialisation fails
        if first >= n_queries:
            return
    if positions_ptr is not None:
        positions_ptr += row
    rotation = (cos_ptr, sin_ptr, positions_ptr, n_positions)
    masks = masks_of(rng_ptr, sample_ids_ptr, sample, n_samples, head, stream, threshold)
    start = first_token(seq_starts_ptr, sample, n_keys)
    query = first + n_keys - n_queries + tl.arange(0, BLOCK_M)  # [BLOCK_M], positions in the sample
    begin, whole, end = keys_of_queries(first, start, n_queries, n_keys, IS_CAUSAL, BLOCK_M, BLOCK_N)
    q_ptr += origin * stride_q_b + head * stride_q_h
    if WARP_SPECIALIZE:
        q_desc = tl.make_tensor_descriptor(q_ptr, [n_queries, HEAD_DIM], [stride_q_t, 1], [BLOCK_M, BLOCK_D])
        q = q_desc.load([first, 0])
    else:
        q = load_rows(q_ptr, first, 0, n_queries, stride_q_t, BLOCK_M, HEAD_DIM, BLOCK_D, True)
    if ROTATE_Q:
        q = rotate(q, rotation, first, n_queries, 1, HALF).to(q.dtype)
    if not TMA:
        k_ptr += origin * stride_k_b + head * stride_k_h
        v_ptr += origin * stride_v_b + head * stride_v_h
    m = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if not (HAS_STARTS or WARP_SPECIALIZE):
        acc, m, total = attend(
            acc, m, total, q, query, k_ptr, v_ptr, begin, whole, sample, head, start, n_keys, rotation, masks,
            stride_k_t, stride_v_t, scale_log2, IS_CAUSAL, HAS_STARTS, rng_ptr is not None, ROTATE_K, HALF, HEAD_DIM,
            BLOCK_D, BLOCK_N, False, TMA, WARP_SPECIALIZE)
        begin = whole
    acc, m, total = attend(
        acc, m, total, q, query, k_ptr, v_ptr, begin, end, sample, head, start, n_keys, rotation, masks,
        stride_k_t, stride_v_t, scale_log2, IS_CAUSAL, HAS_STARTS, rng_ptr is not None, ROTATE_K, HALF, HEAD_DIM,
        BLOCK_D, BLOCK_N, True, TMA, WARP_SPECIALIZE)

    total = tl.where(total == 0, 1.0, total)
    if cu_seqlens_ptr is not None:  # rows that belong to no document
        total = tl.where((sample < 0) | (sample >= n_samples), float("nan"), total)
    acc *= (mask_scale(rng_ptr, threshold) / total)[:, None]
    store_rows(out_ptr + (row * n_heads + head) * HEAD_DIM, acc, first, n_queries,
               n_heads * HEAD_DIM, BLOCK_M, HEAD_DIM, BLOCK_D)
    offs_m = first + tl.arange(0, BLOCK_M)
    lse = (m + tl.log2(total)) / LOG2E
    tl.store(lse_ptr + head * n_rows + row + offs_m, lse, mask=offs_m < n_queries)


@triton.jit
def attend(
    acc, m, total, q, query, k_ptr, v_ptr, first, last, sample, head, start, n_keys, rotation, masks, stride_k_t,
    stride_v_t, scale_log2, IS_CAUSAL: tl.constexpr, HAS_STARTS: tl.constexpr, DROPOUT: tl.constexpr,
    ROTATE_K: tl.constexpr, HALF: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr, TMA: tl.constexpr, WARP_SPECIALIZE: tl.constexpr,
):
    """Add the keys first..last to the output acc [BLOCK_M, BLOCK_D], the maximum m and the sum total [BLOCK_M].

    k_ptr, v_ptr: [Tk, H, K] of one sample and head, or descriptors [B, Tk, H, K] if TMA.
    """
    offs_n = tl.arange(0, BLOCK_N)
    key, number, stream, threshold = masks
    for n in tl.range(first, last, BLOCK_N, warp_specialize=WARP_SPECIALIZE, flatten=False):
        k = load_keys(k_ptr, sample, head, n, start, n_keys, stride_k_t, BLOCK_N, HEAD_DIM, BLOCK_D, MASKED, TMA)
        if ROTATE_K:
            k = rotate(k, rotation, n, n_keys, 1, HALF).to(k.dtype)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        if MASKED:
            seen = sees(query[:, None], (n + offs_n)[None, :], n_keys, start, IS_CAUSAL, HAS_STARTS)
            s = tl.where(seen, s, float("-inf"))
        highest = tl.maximum(m, tl.max(s, 1) * scale_log2)
        p = tl.exp2(s * scale_log2 - highest[:, None])
        fade = tl.exp2(m - highest)
        total = total * fade + tl.sum(p, 1)
        if DROPOUT:
            p = tl.where(keep_mask(key, query, n, number, stream, threshold, BLOCK_N), p, 0.0)
        v = load_keys(v_ptr, sample, head, n, start, n_keys, stride_v_t, BLOCK_N, HEAD_DIM, BLOCK_D, MASKED, TMA)
        acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
        m = highest
    return acc, m, total


@triton.jit
def load_keys(ptr, sample, head, first, low, high, stride_t, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr,
              BLOCK_D: tl.constexpr, MASKED: tl.constexpr, TMA: tl.constexpr):
    """Load rows first.. of a head, [ROWS, BLOCK_D], as `load_rows` does, or by TMA from a descriptor [B, T, H, K].

    TMA loads 0 past the end of the sample and of the head, whether MASKED or not.
    """
    if TMA:
        x = ptr.load([sample, first, head.to(tl.int32), 0]).reshape(ROWS, BLOCK_D)
    else:
        x = load_rows(ptr, first, low, high, stride_t, ROWS, HEAD_DIM, BLOCK_D, MASKED)
    return x
