"""Triton kernels of the parallel block's two merged projections, and their launchers.

    in_proj    [q | k | v | pre] = h W_in^T + b_in; q and k are rotated, act = gelu_new(pre)
    out_proj   y = x + [att | act] W_out^T + b_dense + b_fc2, both operands into one accumulator

Operands are loaded in their own dtype, by TMA if the tile says so, and accumulated in float32. Bias, rotation and
residual are float32, rounded once. pre is rounded before gelu_new: the backward computes act from the saved pre.

A tile of in_proj lies within q and k, within v, or within fc1, which decides its epilogue. The epilogues work on the
columns of a tile in halves or quarters if the accumulator and the outputs do not fit the registers together.

N rows, D width, H heads, K head size, F MLP width, T positions, R rotary dimension.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from phi1.kernels.core.constants import FP_FUSION
from phi1.kernels.core.tiles import TILES, tile
from phi1.kernels.gemm.matmul_triton import add_product, column_halves, grouped_tile, wrapped
from phi1.kernels.gemm.tma_triton import add_described_product, describable, operand
from phi1.kernels.pointwise.gelu_triton import gelu_new

_TILES = ((128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (256, 128, 64, 8, 3), (128, 128, 64, 8, 4), (128, 128, 64, 4, 4))
TILES |= {
    ("block", kernel): [{"cublas": 1}, *({"block_m": m, "block_n": n, "block_k": k, "group_m": 8,
                                          "parts": parts if n > 128 else 1, "tma": tma, "num_warps": warps,
                                          "num_stages": stages}
                                         for m, n, k, warps, stages in _TILES for tma in (0, 1))]
    for kernel, parts in (("in_proj", 2), ("out_proj", 4))
}


@triton.jit(do_not_specialize=["n_rows", "n_positions"])
def in_proj_kernel(
    h_ptr,  # [N, D], or its descriptor if TMA
    weight_ptr,  # [3D + F, D] rows q, k, v, fc1, or its descriptor if TMA
    bias_ptr,  # [3D + F]
    cos_ptr,  # [T, R/2] float32
    sin_ptr,  # [T, R/2] float32
    positions_ptr,  # [N] integer
    qkv_ptr,  # [N, 3, H, K] output, or None to compute only fc1
    pre_ptr,  # [N, F] output, or None
    act_ptr,  # [N, F] output, or None
    n_rows,
    n_positions,
    WIDTH: tl.constexpr,
    INNER: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PARTS: tl.constexpr,
    TMA: tl.constexpr,
):
    """One program per tile [BLOCK_M, BLOCK_N] of q and k, of v, or of fc1."""
    TILES_QK: tl.constexpr = (2 * WIDTH + BLOCK_N - 1) // BLOCK_N
    TILES_QKV: tl.constexpr = TILES_QK + (WIDTH + BLOCK_N - 1) // BLOCK_N
    LEFT_OUT: tl.constexpr = TILES_QKV if qkv_ptr is None else 0
    TILES: tl.constexpr = TILES_QKV + (INNER + BLOCK_N - 1) // BLOCK_N - LEFT_OUT
    pid_m, pid_n = grouped_tile(tl.program_id(0), n_rows, TILES * BLOCK_N, BLOCK_M, BLOCK_N, GROUP_M)
    pid_n += LEFT_OUT
    # A selection between constants lets the compiler know their divisors.
    padding = tl.where(pid_n < TILES_QK, 0, tl.where(pid_n < TILES_QKV, TILES_QK * BLOCK_N - 2 * WIDTH,
                                                     TILES_QKV * BLOCK_N - 3 * WIDTH))
    end = tl.where(pid_n < TILES_QK, 2 * WIDTH, tl.where(pid_n < TILES_QKV, 3 * WIDTH, 3 * WIDTH + INNER))
    first = pid_n * BLOCK_N - padding
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if TMA:
        acc = add_described_product(acc, h_ptr, weight_ptr, pid_m * BLOCK_M, first, 0, WIDTH, BLOCK_K)
    else:
        columns = tl.minimum(first + tl.arange(0, BLOCK_N), 3 * WIDTH + INNER - 1).to(tl.int64)  # [BLOCK_N]
        acc = add_product(acc, h_ptr, weight_ptr, wrapped(pid_m, BLOCK_M, n_rows), columns, WIDTH, WIDTH, 1, WIDTH, 1,
                          BLOCK_K, WIDTH % BLOCK_K == 0)
    offs_n = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    if PARTS == 2:
        left, right = column_halves(acc, BLOCK_M, BLOCK_N)
        store_projection(left, bias_ptr, cos_ptr, sin_ptr, positions_ptr, qkv_ptr, pre_ptr, act_ptr, offs_n, first, end,
                         n_rows, n_positions, WIDTH, INNER, HEAD_DIM, HALF)
        store_projection(right, bias_ptr, cos_ptr, sin_ptr, positions_ptr, qkv_ptr, pre_ptr, act_ptr, offs_n,
                         first + BLOCK_N // 2, end, n_rows, n_positions, WIDTH, INNER, HEAD_DIM, HALF)
    else:
        store_projection(acc, bias_ptr, cos_ptr, sin_ptr, positions_ptr, qkv_ptr, pre_ptr, act_ptr, offs_n, first, end,
                         n_rows, n_positions, WIDTH, INNER, HEAD_DIM, HALF)


@triton.jit
def store_projection(
    acc,  # [BLOCK_M, COLUMNS] float32, the product
    bias_ptr,  # [3D + F]
    cos_ptr,  # [T, R/2] float32
    sin_ptr,  # [T, R/2] float32
    positions_ptr,  # [N] integer
    qkv_ptr,  # [N, 3, H, K] output, or None
    pre_ptr,  # [N, F] output, or None
    act_ptr,  # [N, F] output, or None
    offs_n,  # [BLOCK_M] int64, the tile's rows
    first,  # the tile's first column in [q | k | v | pre]
    end,  # the end of the tile's part (q and k, v, or fc1) in [q | k | v | pre]
    n_rows,
    n_positions,
    WIDTH: tl.constexpr,
    INNER: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
):
    """Apply the epilogue to a tile, or to some of its columns, and store the result."""
    columns = first + tl.arange(0, acc.shape[1])  # [COLUMNS]
    mask_c = columns < end
    mask = (offs_n < n_rows)[:, None] & mask_c[None, :]  # [BLOCK_M, COLUMNS]
    acc += tl.load(bias_ptr + columns, mask=mask_c, other=0.0).to(tl.float32)[None, :]
    if first >= 3 * WIDTH:
        offs = offs_n[:, None] * INNER + (columns - 3 * WIDTH)[None, :]
        pre = acc.to(bias_ptr.dtype.element_ty)
        if pre_ptr is not None:
            tl.store(pre_ptr + offs, pre, mask=mask)
        if act_ptr is not None:
            tl.store(act_ptr + offs, gelu_new(pre.to(tl.float32)).to(act_ptr.dtype.element_ty), mask=mask)
    elif qkv_ptr is not None:
        if first < 2 * WIDTH:
            acc = rotate_heads(acc, cos_ptr, sin_ptr, positions_ptr, offs_n, n_rows, n_positions, HEAD_DIM, HALF)
        offs = offs_n[:, None] * (3 * WIDTH) + columns[None, :]
        tl.store(qkv_ptr + offs, acc.to(qkv_ptr.dtype.element_ty), mask=mask)


@triton.jit
def rotate_heads(
    x,  # [BLOCK_M, COLUMNS] float32, whole heads
    cos_ptr,  # [T, R/2] float32
    sin_ptr,  # [T, R/2] float32
    positions_ptr,  # [N] integer
    offs_n,  # [BLOCK_M] int64
    n_rows,
    n_positions,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
):
    """Return x with the first 2 HALF columns of each head rotated by the row's position.

    A position outside the tables gives NaN.
    """
    BLOCK_M: tl.constexpr = x.shape[0]
    HEADS: tl.constexpr = x.shape[1] // HEAD_DIM
    PAIRS: tl.constexpr = HEAD_DIM // (2 * HALF)
    position = tl.load(positions_ptr + offs_n, mask=offs_n < n_rows, other=0).to(tl.int64)
    known = ((position >= 0) & (position < n_positions))[:, None, None]
    # Only the first of PAIRS groups is rotated; the angle of the others is 0.
    turns = known & (tl.arange(0, PAIRS) == 0)[None, :, None]
    offs = position[:, None, None] * HALF + tl.arange(0, HALF)[None, None, :]
    c = tl.load(cos_ptr + offs, mask=turns, other=1.0)[:, None]  # [BLOCK_M, 1, PAIRS, HALF]
    s = tl.load(sin_ptr + offs, mask=turns, other=0.0)[:, None]
    c = tl.where(known[:, None], c, float("nan"))
    halves = tl.reshape(x, (BLOCK_M, HEADS, PAIRS, 2, HALF))
    a, b = tl.split(tl.permute(halves, (0, 1, 2, 4, 3)))
    turned = tl.permute(tl.join(a * c - b * s, b * c + a * s), (0, 1, 2, 4, 3))
    return tl.reshape(turned, (BLOCK_M, HEADS * HEAD_DIM))


@triton.jit(do_not_specialize=["n_rows"])
def out_proj_kernel(
    att_ptr,  # [N, D], or its descriptor if TMA
    act_ptr,  # [N, F], or its descriptor if TMA
    x_ptr,  # [N, D] residual
    weight_ptr,  # [D, D + F] columns dense, fc2, or its descriptor if TMA
    bias_ptr,  # [2, D]
    y_ptr,  # [N, D] output
    n_rows,
    WIDTH: tl.constexpr,
    INNER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PARTS: tl.constexpr,
    TMA: tl.constexpr,
):
    """One program per tile [BLOCK_M, BLOCK_N] of y."""
    pid_m, pid_n = grouped_tile(tl.program_id(0), n_rows, WIDTH, BLOCK_M, BLOCK_N, GROUP_M)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if TMA:
        row, col = pid_m * BLOCK_M, pid_n * BLOCK_N
        acc = add_described_product(acc, att_ptr, weight_ptr, row, col, 0, WIDTH, BLOCK_K)
        acc = add_described_product(acc, act_ptr, weight_ptr, row, col, WIDTH, INNER, BLOCK_K)
    else:
        rows = wrapped(pid_m, BLOCK_M, n_rows)
        columns = tl.minimum(pid_n * BLOCK_N + tl.arange(0, BLOCK_N), WIDTH - 1).to(tl.int64)  # [BLOCK_N]
        acc = add_product(acc, att_ptr, weight_ptr, rows, columns, WIDTH, WIDTH, 1, WIDTH + INNER, 1, BLOCK_K,
                          WIDTH % BLOCK_K == 0)
        acc = add_product(acc, act_ptr, weight_ptr + WIDTH, rows, columns, INNER, INNER, 1, WIDTH + INNER, 1, BLOCK_K,
                          INNER % BLOCK_K == 0)
    offs_n = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    if PARTS == 4:
        left, right = column_halves(acc, BLOCK_M, BLOCK_N)
        for half in tl.static_range(2):
            if half == 0:
                first, second = column_halves(left, BLOCK_M, BLOCK_N // 2)
            else:
                first, second = column_halves(right, BLOCK_M, BLOCK_N // 2)
            column = pid_n * BLOCK_N + half * (BLOCK_N // 2)
            store_residual(first, bias_ptr, x_ptr, y_ptr, offs_n, column, n_rows, WIDTH)
            store_residual(second, bias_ptr, x_ptr, y_ptr, offs_n, column + BLOCK_N // 4, n_rows, WIDTH)
    else:
        store_residual(acc, bias_ptr, x_ptr, y_ptr, offs_n, pid_n * BLOCK_N, n_rows, WIDTH)


@triton.jit
def store_residual(
    acc,  # [BLOCK_M, COLUMNS] float32, the product
    bias_ptr,  # [2, D]
    x_ptr,  # [N, D] residual
    y_ptr,  # [N, D] output
    offs_n,  # [BLOCK_M] int64, the tile's rows
    first_column,
    n_rows,
    WIDTH: tl.constexpr,
):
    """Apply the epilogue to a tile, or to some of its columns, and store the result."""
    columns = first_column + tl.arange(0, acc.shape[1])  # [COLUMNS]
    mask_c = columns < WIDTH
    mask = (offs_n < n_rows)[:, None] & mask_c[None, :]  # [BLOCK_M, COLUMNS]
    offs = offs_n[:, None] * WIDTH + columns[None, :]
    bias = tl.load(bias_ptr + columns, mask=mask_c, other=0.0).to(tl.float32)
    bias += tl.load(bias_ptr + WIDTH + columns, mask=mask_c, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + offs, (acc + bias[None, :] + x).to(y_ptr.dtype.element_ty), mask=mask)


def in_proj_tile(x: torch.Tensor, in_rows: int, head_size: int, half: int) -> dict[str, int] | None:
    """Return the tile of in_proj's kernel for x [N, D], or None if cuBLAS computes the product.

    q and k are then rotated afterwards. The kernel needs whole heads in a tile, and head_size and half must be powers
    of two.
    """
    t = _tile("in_proj", x, in_rows - 3 * x.shape[1])
    sizes = (head_size, half)
    if "cublas" in t or any(size & (size - 1) for size in sizes) or t["block_n"] // t["parts"] % head_size:
        return None
    return t


def launch_in_proj(
    h: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    n_heads: int, t: dict[str, int], *, qkv: bool = True, pre: bool = True, act: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (qkv [N, 3D] with q and k rotated, pre [N, F], act [N, F]) for contiguous h [N, D].

    Those not requested are empty.
    """
    n_rows, width = h.shape
    inner = weight.shape[0] - 3 * width
    cos, sin, positions = rotary
    q_k_v, before, after = (h.new_empty((n_rows, columns) if wanted else 0)
                            for columns, wanted in ((3 * width, qkv), (inner, pre), (inner, act)))
    tiles = (2 * width, width, inner) if qkv else (inner,)
    grid = triton.cdiv(n_rows, t["block_m"]) * sum(triton.cdiv(columns, t["block_n"]) for columns in tiles)
    weight, tma = weight.contiguous(), bool(t["tma"]) and describable(h, weight)
    if n_rows:
        in_proj_kernel[(grid,)](
            operand(h, t, "block_m", tma), operand(weight, t, "block_n", tma), bias.contiguous(), cos.contiguous(),
            sin.contiguous(), positions.contiguous(), q_k_v if qkv else None, before if pre else None,
            after if act else None, n_rows=n_rows, n_positions=cos.shape[0], WIDTH=width, INNER=inner,
            HEAD_DIM=width // n_heads, HALF=cos.shape[1], TMA=tma, **_launch_options(t),
        )
    return q_k_v, before, after


def launch_out_proj(
    att: torch.Tensor, act: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """Return y [N, D] for contiguous att [N, D], act [N, F] and x [N, D]."""
    n_rows, width = att.shape
    y, t = torch.empty_like(att), _tile("out_proj", att, act.shape[1])
    if "cublas" in t:
        torch.addmm(x + bias.sum(0), att, weight[:, :width].t(), out=y)
        return y.addmm_(act, weight[:, width:].t())
    weight = weight.contiguous()
    tma = bool(t["tma"]) and describable(att, act, weight)
    if n_rows:
        out_proj_kernel[(triton.cdiv(n_rows, t["block_m"]) * triton.cdiv(width, t["block_n"]),)](
            operand(att, t, "block_m", tma), operand(act, t, "block_m", tma), x.contiguous(),
            operand(weight, t, "block_n", tma), bias.contiguous(), y, n_rows=n_rows, WIDTH=width,
            INNER=act.shape[1], TMA=tma, **_launch_options(t),
        )
    return y


def _tile(kernel: str, x: torch.Tensor, inner: int) -> dict[str, int]:
    return tile("block", kernel, x.device, dtype=str(x.dtype).removeprefix("torch."), rows=x.shape[0],
                width=x.shape[1], inner=inner)


def _launch_options(t: dict[str, int]) -> dict[str, int | bool]:
    return {"BLOCK_M": t["block_m"], "BLOCK_N": t["block_n"], "BLOCK_K": t["block_k"], "GROUP_M": t["group_m"],
            "PARTS": t["parts"], "num_warps": t["num_warps"], "num_stages": t["num_stages"],
            "enable_fp_fusion": FP_FUSION}
