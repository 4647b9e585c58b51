"""Triton kernel of the backward through an MLP's second layer and its gelu_new, and the launcher.

    dact = dout W2        dpre = dact gelu_new'(pre)        act = gelu_new(pre)        db1 = sum over rows of dpre

dact stays in the float32 accumulator and is never written. The gradient of W2 needs act, and this kernel writes it
because it reads pre anyway. Deterministic: each row of tiles writes one partial row of db1, and a second kernel adds
the partial rows in order. The epilogue works on a tile's columns in quarters. Tiles may be persistent, as in linear.

With "cublas" in the tuned table, cuBLAS computes the product and `epilogue_triton.py` the rest in one pass.

N rows, D width, F MLP width, P rows of tiles.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from phi1.kernels.core.constants import FP_FUSION
from phi1.kernels.core.sums_triton import column_sum
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
from phi1.kernels.pointwise.epilogue_triton import launch_epilogue_backward_partial
from phi1.kernels.pointwise.gelu_triton import gelu_new_and_slope

TILES |= {
    ("mlp", "dgelu"): [
        {"cublas": 1},
        *({"block_m": m, "block_n": n, "block_k": k, "group_m": 8, "tma": tma, "num_warps": warps,
           "num_stages": stages} | persistent
          for persistent, shapes in (
              ({}, ((128, 256, 64, 1, 8, 3), (128, 256, 64, 1, 8, 4), (256, 128, 64, 1, 8, 3), (128, 128, 64, 1, 8, 4),
                    (128, 256, 64, 0, 8, 3), (256, 128, 32, 0, 8, 4), (128, 128, 64, 0, 8, 3), (128, 128, 64, 0, 4, 4),
                    (128, 128, 32, 0, 4, 4), (64, 128, 64, 0, 4, 4))),
              ({"persistent": 1}, ((128, 128, 64, 1, 8, 4), (128, 256, 64, 1, 8, 3), (128, 128, 64, 0, 8, 3))))
          for m, n, k, tma, warps, stages in shapes),
    ]
}


@triton.jit(do_not_specialize=["n_rows"])
def dgelu_kernel(
    dout_ptr,  # [N, D], or its descriptor if TMA
    weight_ptr,  # [D, F], or its descriptor
    pre_ptr,  # [N, F] input of gelu_new
    dpre_ptr,  # [N, F] output
    act_ptr,  # [N, F] output
    db_partial_ptr,  # [P, F] float32 output
    n_rows,
    n_cols,
    n_inner,
    stride_dout_n,
    stride_dout_d,
    stride_weight_d,
    stride_weight_f,
    stride_pre_n,
    stride_dpre_n,
    stride_act_n,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr,
    TMA: tl.constexpr,
    PERSISTENT: tl.constexpr,
):
    """One program per tile [BLOCK_M, BLOCK_N] of dpre. If PERSISTENT, each program works on tiles in turn."""
    first, end, step = own_tiles(n_rows, n_cols, BLOCK_M, BLOCK_N, PERSISTENT)
    for tile_id in tl.range(first, end, step, flatten=PERSISTENT):
        pid_m, pid_n = grouped_tile(tile_id, n_rows, n_cols, BLOCK_M, BLOCK_N, GROUP_M)
        dact = tile_product(dout_ptr, weight_ptr, pid_m, pid_n, n_rows, n_cols, n_inner, stride_dout_n, stride_dout_d,
                            stride_weight_f, stride_weight_d, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, TMA, True)
        quarters = column_parts(dact, BLOCK_M, BLOCK_N, 4)
        for i in tl.static_range(4):
            store_dgelu(quarters[i], pre_ptr, dpre_ptr, act_ptr, db_partial_ptr, pid_m,
                        pid_n * BLOCK_N + i * (BLOCK_N // 4), n_rows, n_cols, stride_pre_n, stride_dpre_n,
                        stride_act_n)


@triton.jit
def store_dgelu(
    dact,  # [BLOCK_M, COLUMNS] float32
    pre_ptr,  # [N, F]
    dpre_ptr,  # [N, F] output
    act_ptr,  # [N, F] output
    db_partial_ptr,  # [P, F] float32 output
    pid_m,
    first_column,
    n_rows,
    n_cols,
    stride_pre_n,
    stride_dpre_n,
    stride_act_n,
):
    """Apply the epilogue to a quarter of a tile's columns, and store the result."""
    first_row = pid_m.to(tl.int64) * dact.shape[0]
    offs_n, offs_f = tl.arange(0, dact.shape[0]), first_column + tl.arange(0, dact.shape[1])  # [BLOCK_M], [COLUMNS]
    mask_n, mask_f = offs_n < n_rows - first_row, offs_f < n_cols
    mask = mask_n[:, None] & mask_f[None, :]  # [BLOCK_M, COLUMNS]
    pre_ptrs = pre_ptr + first_row * stride_pre_n + (offs_n[:, None] * stride_pre_n + offs_f[None, :])
    act, slope = gelu_new_and_slope(tl.load(pre_ptrs, mask=mask, other=0.0).to(tl.float32))
    act_ptrs = act_ptr + first_row * stride_act_n + (offs_n[:, None] * stride_act_n + offs_f[None, :])
    tl.store(act_ptrs, act.to(act_ptr.dtype.element_ty), mask=mask)
    dpre = tl.where(mask_n[:, None], dact * slope, 0.0)  # rows past the end hold other rows' values
    dpre_ptrs = dpre_ptr + first_row * stride_dpre_n + (offs_n[:, None] * stride_dpre_n + offs_f[None, :])
    tl.store(dpre_ptrs, dpre.to(dpre_ptr.dtype.element_ty), mask=mask)
    tl.store(db_partial_ptr + pid_m.to(tl.int64) * n_cols + offs_f, tl.sum(dpre, axis=0), mask=mask_f)


def launch_dgelu(
    dout: torch.Tensor, weight: torch.Tensor, pre: torch.Tensor, dpre: torch.Tensor, act: torch.Tensor
) -> torch.Tensor:
    """Fill dpre and act [N, F] from dout [N, D], weight [D, F] and pre [N, F], and return db1 [F].

    The columns of pre, dpre and act have stride 1.
    """
    db = pre.new_empty(pre.shape[1])
    column_sum(launch_dgelu_partial(dout, weight, pre, dpre, act), db)
    return db


def launch_dgelu_partial(
    dout: torch.Tensor, weight: torch.Tensor, pre: torch.Tensor, dpre: torch.Tensor, act: torch.Tensor
) -> torch.Tensor:
    """Do the same as `launch_dgelu`, but return db1 as partial sums [P, F] float32."""
    n_rows, n_cols = pre.shape
    dout, weight = one_unit_stride(dout), one_unit_stride(weight)
    described = describable(dout, weight)
    t = tile("mlp", "dgelu", pre.device, dtype=str(pre.dtype).removeprefix("torch."), rows=n_rows, width=dout.shape[1],
             inner=n_cols, described=described)
    if "cublas" in t:
        partial = launch_epilogue_backward_partial(torch.mm(dout, weight), pre, None, dpre=dpre, act=act)
        assert partial is not None
        return partial
    partial = pre.new_empty((triton.cdiv(n_rows, t["block_m"]), n_cols), dtype=torch.float32)
    check_rows("mlp", t["block_m"], pre, dpre, act)
    tma = bool(t["tma"]) and described
    if pre.numel():
        dgelu_kernel[(n_programs(t, n_rows, n_cols, pre.device),)](
            operand(dout, t, "block_m", tma), operand(weight, t, "block_k", tma, "block_n"), pre, dpre, act, partial,
            n_rows=n_rows, n_cols=n_cols, n_inner=dout.shape[1],
            stride_dout_n=dout.stride(0), stride_dout_d=dout.stride(1), stride_weight_d=weight.stride(0),
            stride_weight_f=weight.stride(1), stride_pre_n=pre.stride(0), stride_dpre_n=dpre.stride(0),
            stride_act_n=act.stride(0), BLOCK_M=t["block_m"], BLOCK_N=t["block_n"], BLOCK_K=t["block_k"],
            GROUP_M=t["group_m"], EVEN_K=dout.shape[1] % t["block_k"] == 0, TMA=tma,
            PERSISTENT=bool(t.get("persistent")), num_warps=t["num_warps"], num_stages=t["num_stages"],
            enable_fp_fusion=FP_FUSION,
        )
    return partial
