"""Triton kernels of a linear layer's epilogue as a separate pass, forward and backward, and their launchers.

    out = residual + drop(gelu_new(x))           each part optional
    dpre = drop(dout) gelu_new'(pre)             act = gelu_new(pre)          db = sum over rows of dpre

gelu and dropout_add are this pass alone; linear runs it after a product of cuBLAS. Elements are loaded and stored in
their own dtype; arithmetic is float32 and rounded once. A pass is bound by memory, so the pass that reads pre also
writes act, which the weight gradient needs, and adds up db. Deterministic: each of P programs adds its rows in order,
in registers, and writes one partial row; a second kernel adds the P partial rows in order.

N rows, F columns, B samples, P partial sums.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from phi1.kernels.core.constants import FP_FUSION
from phi1.kernels.core.philox import Dropout
from phi1.kernels.core.sums_triton import column_sum
from phi1.kernels.core.tiles import TILES, tile
from phi1.kernels.pointwise.dropout_triton import dropped_tile, mask_arguments
from phi1.kernels.pointwise.gelu_triton import gelu_new, gelu_new_and_slope

# At phi-1's N = 16,384 and F = 8,192 the partial sums are 1 % of the backward's memory traffic.
MAX_PARTIALS = 128

TILES |= {
    ("epilogue", kernel): [
        {"rows": rows, "cols": cols, "num_warps": warps}
        for rows, cols, warps in ((1, 1024, 4), (1, 2048, 4), (1, 4096, 8), (2, 1024, 4), (4, 512, 4), (8, 256, 4),
                                  (8, 512, 4), (8, 512, 8), (16, 256, 8))]
    for kernel in ("forward", "backward")
}


@triton.jit(do_not_specialize=["n_rows", "n_samples", "stream", "threshold"])
def epilogue_forward_kernel(
    x_ptr,  # [N, F] input
    residual_ptr,  # [N, F], or None
    out_ptr,  # [N, F] output
    rng_ptr,  # [2] int64, or None if nothing is dropped
    sample_ids_ptr,  # [B] int64, or None
    cu_seqlens_ptr,  # [B + 1] int32 of packed rows, or None
    n_rows,
    n_cols,
    stride_x_n,
    stride_residual_n,
    stride_out_n,
    n_samples,
    stream,
    threshold,
    scale,
    GELU: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """One program per tile [ROWS, COLS]."""
    tiles_f = tl.cdiv(n_cols, COLS)
    pid_n, pid_f = tl.program_id(0) // tiles_f, tl.program_id(0) % tiles_f
    offs_n = pid_n.to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    offs_f = pid_f.to(tl.int64) * COLS + tl.arange(0, COLS)  # [COLS]
    mask = (offs_n < n_rows)[:, None] & (offs_f < n_cols)[None, :]  # [ROWS, COLS]
    out = tl.load(x_ptr + offs_n[:, None] * stride_x_n + offs_f[None, :], mask=mask, other=0.0).to(tl.float32)
    if GELU:
        out = gelu_new(out)
    if rng_ptr is not None:
        out = dropped_tile(out, rng_ptr, sample_ids_ptr, cu_seqlens_ptr, offs_n, pid_f * COLS, n_rows, n_samples,
                           stream, threshold, scale)
    if residual_ptr is not None:
        offs = offs_n[:, None] * stride_residual_n + offs_f[None, :]
        out += tl.load(residual_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + offs_n[:, None] * stride_out_n + offs_f[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["n_rows", "n_partials", "n_samples", "stream", "threshold"])
def epilogue_backward_kernel(
    dout_ptr,  # [N, F] gradient of the output
    pre_ptr,  # [N, F] input of gelu_new, or None without it
    dpre_ptr,  # [N, F] output, or None
    act_ptr,  # [N, F] output gelu_new(pre), or None
    db_partial_ptr,  # [P, F] float32 output, or None
    rng_ptr,  # [2] int64, or None if nothing is dropped
    sample_ids_ptr,  # [B] int64, or None
    cu_seqlens_ptr,  # [B + 1] int32 of packed rows, or None
    n_rows,
    n_cols,
    n_partials,
    stride_dout_n,
    stride_pre_n,
    stride_dpre_n,
    stride_act_n,
    n_samples,
    stream,
    threshold,
    scale,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """One program per partial row and COLS columns. It works on every P-th group of ROWS rows."""
    tiles_f = tl.cdiv(n_cols, COLS)
    pid_p, pid_f = tl.program_id(0) // tiles_f, tl.program_id(0) % tiles_f
    offs_f = pid_f.to(tl.int64) * COLS + tl.arange(0, COLS)  # [COLS]
    mask_f = offs_f < n_cols
    db = tl.zeros((ROWS, COLS), dtype=tl.float32)  # one sum a lane: no exchange between threads in the loop
    for first in range(pid_p * ROWS, n_rows, n_partials * ROWS):
        offs_n = tl.cast(first, tl.int64) + tl.arange(0, ROWS)  # [ROWS]
        mask = (offs_n < n_rows)[:, None] & mask_f[None, :]  # [ROWS, COLS]
        offs = offs_n[:, None] * stride_dout_n + offs_f[None, :]
        dpre = tl.load(dout_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        if rng_ptr is not None:
            dpre = dropped_tile(dpre, rng_ptr, sample_ids_ptr, cu_seqlens_ptr, offs_n, pid_f * COLS, n_rows, n_samples,
                                stream, threshold, scale)
        if pre_ptr is not None:
            offs = offs_n[:, None] * stride_pre_n + offs_f[None, :]
            act, slope = gelu_new_and_slope(tl.load(pre_ptr + offs, mask=mask, other=0.0).to(tl.float32))
            dpre *= slope
            if act_ptr is not None:
                offs = offs_n[:, None] * stride_act_n + offs_f[None, :]
                tl.store(act_ptr + offs, act.to(act_ptr.dtype.element_ty), mask=mask)
        if dpre_ptr is not None:
            offs = offs_n[:, None] * stride_dpre_n + offs_f[None, :]
            tl.store(dpre_ptr + offs, dpre.to(dpre_ptr.dtype.element_ty), mask=mask)
        if db_partial_ptr is not None:
            db += dpre
    if db_partial_ptr is not None:
        tl.store(db_partial_ptr + pid_p.to(tl.int64) * n_cols + offs_f, tl.sum(db, axis=0), mask=mask_f)


def launch_epilogue_forward(
    x: torch.Tensor, residual: torch.Tensor | None, gelu: bool, dropout: Dropout | None,
    out: torch.Tensor | None = None, cu_seqlens: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return residual + drop(gelu_new(x)) for x [N, F], written to `out` if given, which may be x.

    cu_seqlens is for the dropout mask.
    """
    out = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    mask = mask_arguments(dropout, cu_seqlens)
    x, residual, wide_out = _rows(mask["rng_ptr"] is None, _readable(x), _readable(residual), out)
    if out.numel():
        n_rows, n_cols = wide_out.shape
        t = tile("epilogue", "forward", out.device, rows=n_rows, dropout=mask["rng_ptr"] is not None)
        epilogue_forward_kernel[(triton.cdiv(n_rows, t["rows"]) * triton.cdiv(n_cols, t["cols"]),)](
            x, residual, wide_out, n_rows=n_rows, n_cols=n_cols, stride_x_n=x.stride(0),
            stride_residual_n=_stride(residual), stride_out_n=wide_out.stride(0), **mask, GELU=gelu,
            ROWS=t["rows"], COLS=t["cols"], num_warps=t["num_warps"], enable_fp_fusion=FP_FUSION,
        )
    return out


def launch_epilogue_backward(
    dout: torch.Tensor, pre: torch.Tensor | None, dropout: Dropout | None, *, dpre: torch.Tensor | None = None,
    act: torch.Tensor | None = None, bias: bool = False,
) -> torch.Tensor | None:
    """Fill dpre and act [N, F], if given, from dout and pre [N, F]. Return db [F] if `bias`, else None.

    The columns of dpre and act have stride 1. dpre may be dout. pre is None without gelu_new.
    """
    partial = launch_epilogue_backward_partial(dout, pre, dropout, dpre=dpre, act=act, bias=bias)
    if partial is None:
        return None
    db = dout.new_empty(dout.shape[1])
    column_sum(partial, db)
    return db


def launch_epilogue_backward_partial(
    dout: torch.Tensor, pre: torch.Tensor | None, dropout: Dropout | None, *, dpre: torch.Tensor | None = None,
    act: torch.Tensor | None = None, bias: bool = True,
) -> torch.Tensor | None:
    """Do the same as `launch_epilogue_backward`, but return db as partial sums [P, F] float32."""
    mask = mask_arguments(dropout)
    dout, pre, dpre, act = _rows(mask["rng_ptr"] is None and not bias, _readable(dout), _readable(pre), dpre, act)
    n_rows, n_cols = dout.shape
    t = tile("epilogue", "backward", dout.device, rows=n_rows, dropout=mask["rng_ptr"] is not None)
    n_partials = max(1, triton.cdiv(n_rows, t["rows"]))
    n_partials = min(MAX_PARTIALS, n_partials) if bias else n_partials
    partial = dout.new_empty((n_partials, n_cols), dtype=torch.float32) if bias else None
    if n_cols:
        epilogue_backward_kernel[(n_partials * triton.cdiv(n_cols, t["cols"]),)](
            dout, pre, dpre, act, partial, n_rows=n_rows, n_cols=n_cols, n_partials=n_partials,
            stride_dout_n=dout.stride(0), stride_pre_n=_stride(pre), stride_dpre_n=_stride(dpre),
            stride_act_n=_stride(act), **mask, ROWS=t["rows"], COLS=t["cols"], num_warps=t["num_warps"],
            enable_fp_fusion=FP_FUSION,
        )
    return partial


def _readable(x: torch.Tensor | None) -> torch.Tensor | None:
    """Return x [N, F] with columns of stride 1, a copy if needed."""
    return x if x is None or x.shape[1] == 1 or x.stride(1) == 1 else x.contiguous()


def _rows(flat: bool, *tensors: torch.Tensor | None) -> list[Any]:
    """Return the [N, F] tensors as the kernels read them: as one long row each if `flat` and all are contiguous."""
    if flat and all(x is None or x.is_contiguous() for x in tensors):
        return [x if x is None else x.view(1, -1) for x in tensors]
    return list(tensors)


def _stride(x: torch.Tensor | None) -> int:
    return 0 if x is None else x.stride(0)
