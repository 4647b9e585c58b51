"""Triton kernel of rotary and its in-place variant, and the launcher. `rotary.py` has the formulas.

The two halves of a head's rotary dimensions are loaded as separate blocks, so that one thread holds both elements of a
pair. The rest of the head and v are copied. Elements are loaded and stored in x's dtype, rotated in float32 and rounded
once. A row whose position is outside the tables becomes NaN. The in-place variant reads and writes only rotated
elements.

N rows, T positions, H heads, K head size, R rotary dimension, S = 1 (q), 2 (q, k) or 3 (q, k, v).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from phi1.kernels.core.constants import FP_FUSION
from phi1.kernels.core.tiles import TILES, tile

TILES |= {
    ("rotary", "rotate"): [
        {"rows": rows, "heads": heads, "num_warps": warps}
        for rows, heads, warps in ((1, 32, 4), (2, 32, 4), (4, 32, 4), (4, 32, 8), (8, 32, 8), (4, 16, 4), (8, 8, 4))]
}


@triton.jit(do_not_specialize=["n_rows", "n_positions"])
def rotary_kernel(
    x_ptr,  # [N, S, H, K] input
    out_ptr,  # [N, S, H, K] output; x itself if IN_PLACE
    cos_ptr,  # [T, R/2] float32
    sin_ptr,  # [T, R/2] float32
    positions_ptr,  # [N] int32 or int64
    n_rows,
    n_positions,
    stride_x_n,
    stride_x_s,
    stride_x_h,
    stride_x_k,
    stride_out_n,
    stride_out_s,
    stride_out_h,
    stride_out_k,
    sign,
    N_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    IN_PLACE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """One program per ROWS rows and BLOCK_H heads of q, k or v."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    offs_n = rows[:, None, None]  # [ROWS, 1, 1]
    offs_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)[None, :, None]  # [1, BLOCK_H, 1]
    part = tl.program_id(2).to(tl.int64)
    heads = (offs_n < n_rows) & (offs_h < N_HEADS)
    x_ptrs = x_ptr + offs_n * stride_x_n + part * stride_x_s + offs_h.to(tl.int64) * stride_x_h
    out_ptrs = out_ptr + offs_n * stride_out_n + part * stride_out_s + offs_h.to(tl.int64) * stride_out_h

    offs_d = tl.arange(0, BLOCK_HALF)[None, None, :]
    mask = heads & (offs_d < HALF)  # [ROWS, BLOCK_H, BLOCK_HALF]
    a = tl.load(x_ptrs + offs_d * stride_x_k, mask=mask, other=0.0)
    b = tl.load(x_ptrs + (offs_d + HALF) * stride_x_k, mask=mask, other=0.0)
    if part < 2:
        position = tl.load(positions_ptr + rows, mask=rows < n_rows, other=0).to(tl.int64)[:, None, None]
        known = (position >= 0) & (position < n_positions) & (offs_d < HALF)  # [ROWS, 1, BLOCK_HALF]
        c = tl.load(cos_ptr + position * HALF + offs_d, mask=known, other=float("nan"))
        s = tl.load(sin_ptr + position * HALF + offs_d, mask=known, other=float("nan")) * sign
        wide_a, wide_b = a.to(tl.float32), b.to(tl.float32)
        a = (wide_a * c - wide_b * s).to(x_ptr.dtype.element_ty)
        b = (wide_b * c + wide_a * s).to(x_ptr.dtype.element_ty)
    tl.store(out_ptrs + offs_d * stride_out_k, a, mask=mask)
    tl.store(out_ptrs + (offs_d + HALF) * stride_out_k, b, mask=mask)
    if HEAD_DIM > 2 * HALF and not IN_PLACE:
        offs_d = 2 * HALF + tl.arange(0, BLOCK_REST)[None, None, :]
        mask = heads & (offs_d < HEAD_DIM)  # [ROWS, BLOCK_H, BLOCK_REST]
        rest = tl.load(x_ptrs + offs_d * stride_x_k, mask=mask, other=0.0)
        tl.store(out_ptrs + offs_d * stride_out_k, rest, mask=mask)


def launch_rotary(
    x: torch.Tensor, out: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor, inverse: bool
) -> None:
    """Fill out [N, S, H, K] with x rotated. Strides are free, and out may be x itself."""
    n_rows, parts, n_heads, head_dim = x.shape
    if not x.numel():
        return
    if x.stride(3) * head_dim >= 2**31:
        raise NotImplementedError("rotary: the Triton kernel takes elements of a head that are at most "
                                  f"{2**31 // head_dim} from the next; got {x.stride(3)}")
    in_place = out is x
    half = cos.shape[1]
    t = tile("rotary", "rotate", x.device, half=half)
    block_h = min(t["heads"], triton.next_power_of_2(n_heads))
    grid = (triton.cdiv(n_rows, t["rows"]), triton.cdiv(n_heads, block_h), min(parts, 2) if in_place else parts)
    rotary_kernel[grid](
        x, out, cos.contiguous(), sin.contiguous(), positions.contiguous(), n_rows=n_rows, n_positions=cos.shape[0],
        stride_x_n=x.stride(0), stride_x_s=x.stride(1), stride_x_h=x.stride(2), stride_x_k=x.stride(3),
        stride_out_n=out.stride(0), stride_out_s=out.stride(1), stride_out_h=out.stride(2), stride_out_k=out.stride(3),
        sign=-1.0 if inverse else 1.0, N_HEADS=n_heads, HEAD_DIM=head_dim, HALF=half,
        BLOCK_HALF=triton.next_power_of_2(half), BLOCK_REST=triton.next_power_of_2(max(1, head_dim - 2 * half)),
        IN_PLACE=in_place, ROWS=t["rows"], BLOCK_H=block_h, num_warps=t["num_warps"], enable_fp_fusion=FP_FUSION,
    )
