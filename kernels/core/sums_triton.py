"""Sums over the rows of a matrix in Triton kernels: the last step of every gradient of a bias or of a norm's weight.

One program has all rows of its columns. Each of its lanes adds its rows in ascending order, in float32, and the lanes
are added in one order, so that the sums repeat bit for bit.

P rows of partial sums, F columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from phi1.kernels.core.constants import FP_FUSION

SUM_ROWS, SUM_COLS = 64, 32  # of a tile of partial sums


@triton.jit
def sum_rows(
    x_ptr,  # [n_rows, stride_x_n]
    offs_f,  # [COLS] columns
    mask_f,  # [COLS], or None if the columns lie within the rows
    n_rows,
    stride_x_n,
    ROWS: tl.constexpr,
):
    """Return the sums of some columns, [COLS] float32."""
    total = tl.zeros((ROWS, offs_f.shape[0]), dtype=tl.float32)
    for first in range(0, n_rows, ROWS):
        offs_n = first + tl.arange(0, ROWS)  # [ROWS]
        mask = (offs_n < n_rows)[:, None]
        if mask_f is not None:
            mask = mask & mask_f[None, :]
        offs = offs_n.to(tl.int64)[:, None] * stride_x_n + offs_f[None, :]  # [ROWS, COLS]
        total += tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    return tl.sum(total, axis=0)


@triton.jit
def store_sums(
    partial_ptr,  # [n_partials, n_cols] float32
    out_ptr,  # [n_cols] output
    block,
    n_partials,
    n_cols,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Store the sums of the COLS columns of one block."""
    offs_f = block * COLS + tl.arange(0, COLS)  # [COLS]
    mask_f = offs_f < n_cols
    sums = sum_rows(partial_ptr, offs_f, mask_f, n_partials, n_cols, ROWS)
    tl.store(out_ptr + offs_f, sums.to(out_ptr.dtype.element_ty), mask=mask_f)


@triton.jit(do_not_specialize=["n_partials"])
def column_sum_kernel(
    partial_ptr,  # [P, F] float32 input
    out_ptr,  # [F] output
    n_partials,
    n_cols,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """One program per COLS columns."""
    store_sums(partial_ptr, out_ptr, tl.program_id(0), n_partials, n_cols, ROWS, COLS)


def column_sum(partial: torch.Tensor, out: torch.Tensor) -> None:
    """Fill out [F] with the sums over the rows of partial [P, F] float32."""
    n_partials, n_cols = partial.shape
    if n_cols:
        column_sum_kernel[(triton.cdiv(n_cols, SUM_COLS),)](
            partial, out, n_partials=n_partials, n_cols=n_cols, ROWS=SUM_ROWS, COLS=SUM_COLS, num_warps=4,
            enable_fp_fusion=FP_FUSION,
        )
