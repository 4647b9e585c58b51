"""Triton kernels of the parallel block's bias gradients, and their launchers.

One launch computes the partial sums over rows that no other kernel computes, and one adds up all partial sums. With
dropout on the branches, one pass over dy computes the gradient of each branch and its partial sums. Elements are loaded
and stored in their own dtype; sums are float32.

Deterministic: each of P programs adds its rows in order, in registers, and writes one partial row. The partial rows are
added in order. P depends on the shape and the tile, not on the GPU.

N rows, D width, F MLP width, P partial sums, B samples.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from phi1.kernels.core.constants import FP_FUSION
from phi1.kernels.core.philox import Dropout, dropout_scale, is_active, threshold
from phi1.kernels.core.sums_triton import SUM_COLS, SUM_ROWS, store_sums
from phi1.kernels.pointwise.dropout_triton import dropped_tile, mask_arguments, mask_stream

# At phi-1's N = 16,384, 128 rows of partial sums are 1 % of the bytes read.
MAX_PARTIALS, ROWS, COLS = 128, 8, 256
BRANCH_ROWS = 4  # with two masks: 80 registers a thread on sm_90; 8 rows take 116 and leave a third fewer warps


@triton.jit(do_not_specialize=["n_rows", "n_partials"])
def bias_partials_kernel(
    dqkv_ptr,  # [N, 3D] input
    dy_ptr,  # [N, D] input, or None
    dqkv_partial_ptr,  # [P, 3D] float32 output
    dy_partial_ptr,  # [P, D] float32 output, or None
    n_rows,
    n_partials,
    stride_dqkv_n,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """One program per partial row and COLS columns of dqkv or of dy. It works on every P-th group of ROWS rows."""
    TILES_QKV: tl.constexpr = (3 * WIDTH + COLS - 1) // COLS
    if dy_ptr is None:
        pid_p, pid_f = tl.program_id(0) // TILES_QKV, tl.program_id(0) % TILES_QKV
        add_rows(dqkv_ptr, dqkv_partial_ptr, pid_p, pid_f, n_rows, n_partials, stride_dqkv_n, 3 * WIDTH, ROWS, COLS)
    else:
        TILES: tl.constexpr = TILES_QKV + (WIDTH + COLS - 1) // COLS
        pid_p, pid_f = tl.program_id(0) // TILES, tl.program_id(0) % TILES
        if pid_f < TILES_QKV:
            add_rows(dqkv_ptr, dqkv_partial_ptr, pid_p, pid_f, n_rows, n_partials, stride_dqkv_n, 3 * WIDTH, ROWS, COLS)
        else:
            add_rows(dy_ptr, dy_partial_ptr, pid_p, pid_f - TILES_QKV, n_rows, n_partials, WIDTH, WIDTH, ROWS, COLS)


@triton.jit
def add_rows(
    x_ptr,  # [N, N_COLS] input
    partial_ptr,  # [P, N_COLS] float32 output
    pid_p,
    pid_f,
    n_rows,
    n_partials,
    stride_x_n,
    N_COLS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Store one partial row's sums of COLS columns of x."""
    offs_f = pid_f * COLS + tl.arange(0, COLS)  # [COLS]
    mask_f = offs_f < N_COLS
    total = tl.zeros((ROWS, COLS), dtype=tl.float32)  # one sum a lane: no exchange between threads in the loop
    for first in range(pid_p * ROWS, n_rows, n_partials * ROWS):
        offs_n = tl.cast(first, tl.int64) + tl.arange(0, ROWS)  # [ROWS]
        mask = (offs_n < n_rows)[:, None] & mask_f[None, :]
        total += tl.load(x_ptr + offs_n[:, None] * stride_x_n + offs_f[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(partial_ptr + pid_p.to(tl.int64) * N_COLS + offs_f, tl.sum(total, axis=0), mask=mask_f)


@triton.jit(do_not_specialize=["n_rows", "n_partials", "n_samples", "dense_stream", "dense_threshold",
                               "fc2_stream", "fc2_threshold"])
def branch_gradients_kernel(
    dy_ptr,  # [N, D] input
    dense_ptr,  # [N, D] output, gradient of the dense branch
    fc2_ptr,  # [N, D] output, gradient of the fc2 branch
    dense_partial_ptr,  # [P, D] float32 output
    fc2_partial_ptr,  # [P, D] float32 output
    rng_ptr,  # [2] int64
    sample_ids_ptr,  # [B] int64, or None
    cu_seqlens_ptr,  # [B + 1] int32 of packed rows, or None
    n_rows,
    n_partials,
    n_samples,
    dense_stream,
    dense_threshold,
    dense_scale,
    fc2_stream,
    fc2_threshold,
    fc2_scale,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """One program per partial row and COLS columns of dy. It works on every P-th group of ROWS rows."""
    TILES: tl.constexpr = (WIDTH + COLS - 1) // COLS
    pid_p, pid_f = tl.program_id(0) // TILES, tl.program_id(0) % TILES
    offs_f = pid_f * COLS + tl.arange(0, COLS)  # [COLS]
    mask_f = offs_f < WIDTH
    dense_sum = tl.zeros((ROWS, COLS), dtype=tl.float32)  # one sum a lane: no exchange between threads in the loop
    fc2_sum = tl.zeros((ROWS, COLS), dtype=tl.float32)
    for first in range(pid_p * ROWS, n_rows, n_partials * ROWS):
        offs_n = tl.cast(first, tl.int64) + tl.arange(0, ROWS)  # [ROWS]
        mask = (offs_n < n_rows)[:, None] & mask_f[None, :]
        offs = offs_n[:, None] * WIDTH + offs_f[None, :]  # [ROWS, COLS]
        dy = tl.load(dy_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        dense = dropped_tile(dy, rng_ptr, sample_ids_ptr, cu_seqlens_ptr, offs_n, pid_f * COLS, n_rows, n_samples,
                             dense_stream, dense_threshold, dense_scale)
        tl.store(dense_ptr + offs, dense.to(dense_ptr.dtype.element_ty), mask=mask)
        dense_sum += dense
        fc2 = dropped_tile(dy, rng_ptr, sample_ids_ptr, cu_seqlens_ptr, offs_n, pid_f * COLS, n_rows, n_samples,
                           fc2_stream, fc2_threshold, fc2_scale)
        tl.store(fc2_ptr + offs, fc2.to(fc2_ptr.dtype.element_ty), mask=mask)
        fc2_sum += fc2
    offs = pid_p.to(tl.int64) * WIDTH + offs_f
    tl.store(dense_partial_ptr + offs, tl.sum(dense_sum, axis=0), mask=mask_f)
    tl.store(fc2_partial_ptr + offs, tl.sum(fc2_sum, axis=0), mask=mask_f)


@triton.jit(do_not_specialize=["n_dqkv", "n_dpre", "n_dense", "n_fc2"])
def bias_sums_kernel(
    dqkv_partial_ptr,  # [Pq, 3D] float32
    dpre_partial_ptr,  # [Pf, F] float32
    dense_partial_ptr,  # [Pd, D] float32
    fc2_partial_ptr,  # [P2, D] float32
    in_ptr,  # [3D + F] output, gradient of in_bias
    out_ptr,  # [2, D] output, gradient of out_bias
    n_dqkv,
    n_dpre,
    n_dense,
    n_fc2,
    WIDTH: tl.constexpr,
    INNER: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """One program per COLS columns of a gradient."""
    QKV: tl.constexpr = (3 * WIDTH + COLS - 1) // COLS
    FC1: tl.constexpr = QKV + (INNER + COLS - 1) // COLS
    DENSE: tl.constexpr = FC1 + (WIDTH + COLS - 1) // COLS
    pid = tl.program_id(0)
    if pid < QKV:
        store_sums(dqkv_partial_ptr, in_ptr, pid, n_dqkv, 3 * WIDTH, ROWS, COLS)
    elif pid < FC1:
        store_sums(dpre_partial_ptr, in_ptr + 3 * WIDTH, pid - QKV, n_dpre, INNER, ROWS, COLS)
    elif pid < DENSE:
        store_sums(dense_partial_ptr, out_ptr, pid - FC1, n_dense, WIDTH, ROWS, COLS)
    else:
        store_sums(fc2_partial_ptr, out_ptr + WIDTH, pid - DENSE, n_fc2, WIDTH, ROWS, COLS)


def launch_bias_partials(dqkv: torch.Tensor, dy: torch.Tensor | None) -> list[torch.Tensor]:
    """Return partial sums over the rows of dqkv [N, 3D], with columns of stride 1, and of contiguous dy [N, D]."""
    n_rows, width = dqkv.shape[0], dqkv.shape[1] // 3
    n_partials = max(1, min(MAX_PARTIALS, triton.cdiv(n_rows, ROWS)))
    partials = [dqkv.new_empty((n_partials, x.shape[1]), dtype=torch.float32) for x in (dqkv, dy) if x is not None]
    columns = [partial.shape[1] for partial in partials]
    bias_partials_kernel[(n_partials * sum(triton.cdiv(n, COLS) for n in columns),)](
        dqkv, dy, partials[0], None if dy is None else partials[1], n_rows=n_rows, n_partials=n_partials,
        stride_dqkv_n=dqkv.stride(0), WIDTH=width, ROWS=ROWS, COLS=COLS, num_warps=4, enable_fp_fusion=FP_FUSION,
    )
    return partials


def launch_branch_gradients(
    dy: torch.Tensor, dense: Dropout | None, fc2: Dropout | None, cu_seqlens: torch.Tensor | None
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return (gradients of the dense and the fc2 branch, their partial sums over rows) for contiguous dy [N, D].

    At least one branch has dropout. The mask of a branch without dropout keeps every element.
    """
    (n_rows, width), branches = dy.shape, (dense, fc2)
    n_partials = max(1, min(MAX_PARTIALS, triton.cdiv(n_rows, BRANCH_ROWS)))
    dropped = [torch.empty_like(dy) for _ in branches]
    partials = [dy.new_empty((n_partials, width), dtype=torch.float32) for _ in branches]
    active = next(branch for branch in branches if is_active(branch))
    shared = {name: value for name, value in mask_arguments(active, cu_seqlens).items()
              if name not in ("stream", "threshold", "scale")}
    own = {f"{name}_{field}": value for name, branch in zip(("dense", "fc2"), branches, strict=True)
           for field, value in _mask_of(branch).items()}
    branch_gradients_kernel[(n_partials * triton.cdiv(width, COLS),)](
        dy, *dropped, *partials, n_rows=n_rows, n_partials=n_partials, **shared, **own, WIDTH=width, ROWS=BRANCH_ROWS,
        COLS=COLS, num_warps=4, enable_fp_fusion=FP_FUSION,
    )
    return dropped, partials


def _mask_of(branch: Dropout | None) -> dict[str, float]:
    if branch is None:
        return {"stream": 0, "threshold": 0, "scale": 1.0}
    return {"stream": mask_stream(branch), "threshold": threshold(branch.p), "scale": dropout_scale(branch.p)}


def launch_bias_sums(
    dqkv: torch.Tensor, dpre: torch.Tensor, branches: Sequence[torch.Tensor], like: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of in_bias [3D + F] and out_bias [2, D] in like's dtype, from partial sums.

    branches: the partial sums of dense and fc2.
    """
    (dense, fc2), inner = branches, dpre.shape[1]
    width = dense.shape[1]
    db_in, db_out = like.new_empty(3 * width + inner), like.new_empty((2, width))
    bias_sums_kernel[(sum(triton.cdiv(n, SUM_COLS) for n in (3 * width, inner, width, width)),)](
        dqkv, dpre, dense, fc2, db_in, db_out, n_dqkv=dqkv.shape[0], n_dpre=dpre.shape[0], n_dense=dense.shape[0],
        n_fc2=fc2.shape[0], WIDTH=width, INNER=inner, ROWS=SUM_ROWS, COLS=SUM_COLS, num_warps=4,
        enable_fp_fusion=FP_FUSION,
    )
    return db_in, db_out
