"""Triton kernel of a linear layer with its epilogue, and the launcher.

    pre = x W^T + b        out = residual + drop(gelu_new(pre))        every part but the product is optional

Operands are loaded in their own dtype and accumulated in float32. pre is rounded to x's dtype before gelu_new, because
the backward computes gelu_new again from the saved pre. out is rounded once. The epilogue works on the columns of a
tile in halves or quarters if the accumulator and the outputs do not fit the registers together.

With "persistent" in the tile, that many programs a multiprocessor run, and each works on tiles in turn. A tile's first
loads then overlap with the previous epilogue, for up to 41 more registers a thread. It has not been timed yet, so no
table uses it. Warp specialisation, which would overlap the whole epilogue, does not compile under Triton 3.9 with
descriptors made on the host.

With "cublas" in the tuned table, cuBLAS computes the product and `epilogue_triton.py` the rest in one pass.

N rows, K inputs, M outputs, B samples.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from phi1.kernels.core.constants import FP_FUSION
from phi1.kernels.core.philox import Dropout, is_active
from phi1.kernels.core.tiles import TILES, tile
from phi1.kernels.gemm.matmul_triton import (
    check_rows,
    column_parts,
    grouped_tile,
    n_programs,
    one_unit_stride,
    own_tiles,
)
from phi1.kernels.gemm.tma_triton import describable, operand, tile_product
from phi1.kernels.pointwise.dropout_triton import dropped_tile, mask_arguments
from phi1.kernels.pointwise.epilogue_triton import launch_epilogue_forward
from phi1.kernels.pointwise.gelu_triton import gelu_new

TILES |= {
    ("linear", "forward"): [
        {"cublas": 1},
        *({"block_m": m, "block_n": n, "block_k": k, "group_m": 8, "parts": parts, "tma": tma,
           "num_warps": warps, "num_stages": stages} | persistent
          for persistent, shapes in (
              ({}, ((128, 256, 64, 2, 1, 8, 3), (128, 256, 64, 4, 1, 8, 4), (256, 128, 64, 2, 1, 8, 3),
                    (128, 128, 64, 1, 1, 8, 4), (128, 256, 64, 2, 0, 8, 3), (256, 128, 32, 2, 0, 8, 4),
                    (128, 256, 32, 2, 0, 8, 4), (128, 128, 64, 1, 0, 8, 3), (128, 128, 32, 1, 0, 4, 4),
                    (64, 128, 64, 1, 0, 4, 4), (64, 64, 64, 1, 0, 4, 4))),
              ({"persistent": 1}, ((128, 256, 64, 4, 1, 8, 3), (128, 256, 64, 2, 1, 8, 3), (128, 128, 64, 1, 1, 8, 4),
                                   (128, 128, 64, 1, 0, 8, 3), (128, 128, 32, 1, 0, 8, 4))))
          for m, n, k, parts, tma, warps, stages in shapes),
    ]
}


@triton.jit(do_not_specialize=["n_rows", "n_samples", "stream", "threshold"])
def linear_forward_kernel(
    x_ptr,  # [N, K] input, or its descriptor if TMA
    weight_ptr,  # [M, K], or its descriptor
    bias_ptr,  # [M], or None
    residual_ptr,  # [N, M], or None
    out_ptr,  # [N, M] contiguous output
    pre_ptr,  # [N, M] contiguous output, or None without gelu_new
    rng_ptr,  # [2] int64, or None if nothing is dropped
    sample_ids_ptr,  # [B] int64, or None
    cu_seqlens_ptr,  # [B + 1] int32 of packed rows, or None
    n_rows,
    n_outputs,
    n_inputs,
    stride_x_n,
    stride_x_k,
    stride_weight_m,
    stride_weight_k,
    stride_residual_n,
    n_samples,
    stream,
    threshold,
    scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr,
    PARTS: tl.constexpr,
    TMA: tl.constexpr,
    PERSISTENT: tl.constexpr,
):
    """One program per tile [BLOCK_M, BLOCK_N] of the output. If PERSISTENT, each program works on tiles in turn."""
    first, end, step = own_tiles(n_rows, n_outputs, BLOCK_M, BLOCK_N, PERSISTENT)
    for tile_id in tl.range(first, end, step, flatten=PERSISTENT):
        pid_m, pid_n = grouped_tile(tile_id, n_rows, n_outputs, BLOCK_M, BLOCK_N, GROUP_M)
        acc = tile_product(x_ptr, weight_ptr, pid_m, pid_n, n_rows, n_outputs, n_inputs, stride_x_n, stride_x_k,
                           stride_weight_m, stride_weight_k, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, TMA, False)
        parts = column_parts(acc, BLOCK_M, BLOCK_N, PARTS)
        for i in tl.static_range(PARTS):
            store_linear(parts[i], bias_ptr, residual_ptr, out_ptr, pre_ptr, rng_ptr, sample_ids_ptr, cu_seqlens_ptr,
                         pid_m, pid_n * BLOCK_N + i * (BLOCK_N // PARTS), n_rows, n_outputs, stride_residual_n,
                         n_samples, stream, threshold, scale)


@triton.jit
def store_linear(
    acc,  # [BLOCK_M, COLUMNS] float32, the product
    bias_ptr,  # [M], or None
    residual_ptr,  # [N, M], or None
    out_ptr,  # [N, M] contiguous output
    pre_ptr,  # [N, M] contiguous output, or None
    rng_ptr,  # [2] int64, or None
    sample_ids_ptr,  # [B] int64, or None
    cu_seqlens_ptr,  # [B + 1] int32, or None
    pid_m,
    first_column,
    n_rows,
    n_outputs,
    stride_residual_n,
    n_samples,
    stream,
    threshold,
    scale,
):
    """Apply the epilogue to a tile, or to some of its columns, and store the result."""
    first_row = pid_m.to(tl.int64) * acc.shape[0]
    offs_n, offs_m = tl.arange(0, acc.shape[0]), first_column + tl.arange(0, acc.shape[1])  # [BLOCK_M], [COLUMNS]
    mask_m = offs_m < n_outputs
    mask = (offs_n < n_rows - first_row)[:, None] & mask_m[None, :]  # [BLOCK_M, COLUMNS]
    first, offs = first_row * n_outputs, offs_n[:, None] * n_outputs + offs_m[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_m, mask=mask_m, other=0.0).to(tl.float32)[None, :]
    if pre_ptr is not None:
        pre = acc.to(pre_ptr.dtype.element_ty)
        tl.store(pre_ptr + first + offs, pre, mask=mask)
        acc = gelu_new(pre.to(tl.float32))
    if rng_ptr is not None:
        acc = dropped_tile(acc, rng_ptr, sample_ids_ptr, cu_seqlens_ptr, first_row + offs_n, first_column, n_rows,
                           n_samples, stream, threshold, scale)
    if residual_ptr is not None:
        residual_offs = offs_n[:, None] * stride_residual_n + offs_m[None, :]
        residual = tl.load(residual_ptr + first_row * stride_residual_n + residual_offs, mask=mask, other=0.0)
        acc += residual.to(tl.float32)
    tl.store(out_ptr + first + offs, acc.to(out_ptr.dtype.element_ty), mask=mask)


def launch_linear_forward(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None, gelu: bool,
    dropout: Dropout | None, cu_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (out [N, M], pre [N, M]) for x [N, K] and weight [M, K]. Without gelu pre is empty.

    cu_seqlens is for the dropout mask.
    """
    shape = (x.shape[0], weight.shape[0])
    t = tile("linear", "forward", x.device, dtype=str(x.dtype).removeprefix("torch."), rows=shape[0],
             outputs=shape[1], inputs=x.shape[1], gelu=gelu, dropout=is_active(dropout))
    if "cublas" in t:
        return _launch_product_and_epilogue(x, weight, bias, residual, gelu, dropout, cu_seqlens)
    out, pre = x.new_empty(shape), x.new_empty(shape if gelu else 0)
    if not out.numel():
        return out, pre
    x, weight = one_unit_stride(x), one_unit_stride(weight)
    residual = residual if residual is None or residual.stride(1) == 1 else residual.contiguous()
    check_rows("linear", t["block_m"], out, residual)
    tma = bool(t["tma"]) and describable(x, weight)
    linear_forward_kernel[(n_programs(t, *shape, x.device),)](
        operand(x, t, "block_m", tma), operand(weight, t, "block_n", tma),
        None if bias is None else bias.contiguous(), residual, out, pre if gelu else None,
        n_rows=shape[0], n_outputs=shape[1], n_inputs=x.shape[1], stride_x_n=x.stride(0), stride_x_k=x.stride(1),
        stride_weight_m=weight.stride(0), stride_weight_k=weight.stride(1),
        stride_residual_n=0 if residual is None else residual.stride(0), **mask_arguments(dropout, cu_seqlens),
        BLOCK_M=t["block_m"], BLOCK_N=t["block_n"], BLOCK_K=t["block_k"], GROUP_M=t["group_m"],
        EVEN_K=x.shape[1] % t["block_k"] == 0, PARTS=t["parts"], TMA=tma, PERSISTENT=bool(t.get("persistent")),
        num_warps=t["num_warps"], num_stages=t["num_stages"], enable_fp_fusion=FP_FUSION,
    )
    return out, pre


def _launch_product_and_epilogue(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None, gelu: bool,
    dropout: Dropout | None, cu_seqlens: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    product = torch.mm(x, weight.t()) if bias is None else torch.addmm(bias, x, weight.t())
    if gelu:
        return launch_epilogue_forward(product, residual, gelu, dropout, cu_seqlens=cu_seqlens), product
    if residual is not None or is_active(dropout):
        launch_epilogue_forward(product, residual, gelu, dropout, out=product, cu_seqlens=cu_seqlens)
    return product, product.new_empty(0)
