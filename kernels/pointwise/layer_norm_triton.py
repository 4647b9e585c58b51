"""Triton kernels of layer_norm and add_layer_norm, forward and backward, with their launchers.

    h = x [+ residual];  y = (h - mean) * rstd * weight + bias;  rstd = 1 / sqrt(var + eps)        (arXiv 1607.06450)
    g = dy * weight;     dx = rstd * (g - mean(g) - x_hat * mean(g * x_hat)) [+ dresidual]
    dweight = sum over rows of dy * x_hat;  dbias = sum over rows of dy

Rows are loaded and stored in their own dtype; arithmetic and sums are float32; mean and rstd are saved as float32. With
a residual, h is rounded to its dtype before the statistics, so that the backward sees the same h.

The backward prefetches rows into shared memory. It is deterministic: each of P programs adds the dweight and dbias of
its rows in order, in registers, and writes one partial row; a second kernel adds the P partial rows in order. P depends
on the shape and the tile, not on the GPU.

N rows, D width, P partial sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from phi1.kernels.core.constants import FP_FUSION
from phi1.kernels.core.sums_triton import SUM_COLS, SUM_ROWS, store_sums
from phi1.kernels.core.tiles import TILES, tile

# At phi-1's N = 16,384 the partial sums are 5 % of the backward's memory traffic. 132 SMs hold 512 programs of 4 warps
# and up to 128 registers a thread at once, so there is no second wave.
MAX_PARTIALS = 512
TILES |= {
    ("layer_norm", "forward"): [{"rows": rows, "num_warps": warps} for rows in (1, 2, 4, 8) for warps in (4, 8)],
    ("layer_norm", "backward"): [
        {"rows": rows, "stages": stages, "num_warps": warps}
        for rows, warps in ((1, 4), (2, 4), (1, 8), (2, 8)) for stages in (1, 2, 3)],
}


@triton.jit(do_not_specialize=["n_rows"])
def layer_norm_forward_kernel(
    x_ptr,  # [N, D] input
    residual_ptr,  # [N, D] added to the input, or None
    weight_ptr,  # [D]
    bias_ptr,  # [D]
    h_ptr,  # [N, D] output: input + residual, or None
    y_ptr,  # [N, D] output
    mean_ptr,  # [N] float32 output, for the backward
    rstd_ptr,  # [N] float32 output, for the backward
    n_rows,
    eps,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program per ROWS whole rows."""
    offs_n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    offs_d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    # D is a constexpr, so the compiler proves that the mask is constant over 8 lanes: one 16-byte load, not eight of 2.
    mask_n, mask_d = offs_n < n_rows, offs_d < D
    offs = offs_n[:, None] * D + offs_d[None, :]  # [ROWS, BLOCK_D]
    mask = mask_n[:, None] & mask_d[None, :]
    weight = tl.load(weight_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)

    h = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        h += tl.load(residual_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        h_stored = h.to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + offs, h_stored, mask=mask)
        h = h_stored.to(tl.float32)

    mean = tl.sum(h, axis=1) / D  # [ROWS]
    centred = tl.where(mask_d[None, :], h - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / D + eps)
    y = centred * rstd[:, None] * weight[None, :] + bias[None, :]
    tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(mean_ptr + offs_n, mean, mask=mask_n)
    tl.store(rstd_ptr + offs_n, rstd, mask=mask_n)


@triton.jit(do_not_specialize=["n_rows", "n_partials"])
def layer_norm_backward_kernel(
    dy_ptr,  # [N, D] gradient of the output
    x_ptr,  # [N, D] h of the forward
    dresidual_ptr,  # [N, D] added to dx, or None
    weight_ptr,  # [D]
    mean_ptr,  # [N] float32
    rstd_ptr,  # [N] float32
    dx_ptr,  # [N, D] output
    dw_partial_ptr,  # [P, D] float32 output
    db_partial_ptr,  # [P, D] float32 output
    n_rows,
    n_partials,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program per partial row. It works on every P-th group of ROWS rows."""
    pid = tl.program_id(0)
    offs_d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    mask_d = offs_d < D
    weight = tl.load(weight_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    dw = tl.zeros([BLOCK_D], dtype=tl.float32)
    db = tl.zeros([BLOCK_D], dtype=tl.float32)
    # The loop is pipelined: the next rows are loaded into shared memory while these are worked on.
    for first in tl.range(pid * ROWS, n_rows, n_partials * ROWS, num_stages=STAGES):
        offs_n = first + tl.arange(0, ROWS)  # [ROWS]
        mask_n = offs_n < n_rows
        offs = offs_n.to(tl.int64)[:, None] * D + offs_d[None, :]  # [ROWS, BLOCK_D]
        mask = mask_n[:, None] & mask_d[None, :]
        x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + offs_n, mask=mask_n, other=0.0)
        rstd = tl.load(rstd_ptr + offs_n, mask=mask_n, other=0.0)

        # dy is 0 outside the mask, and it is a factor of every sum below.
        x_hat = (x - mean[:, None]) * rstd[:, None]
        g = dy * weight[None, :]
        mean_g = tl.sum(g, axis=1) / D  # [ROWS]
        mean_gx = tl.sum(g * x_hat, axis=1) / D
        dx = rstd[:, None] * (g - mean_g[:, None] - x_hat * mean_gx[:, None])
        if dresidual_ptr is not None:
            dx += tl.load(dresidual_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        dw += tl.sum(dy * x_hat, axis=0)
        db += tl.sum(dy, axis=0)
    offs_partial = pid.to(tl.int64) * D + offs_d
    tl.store(dw_partial_ptr + offs_partial, dw, mask=mask_d)
    tl.store(db_partial_ptr + offs_partial, db, mask=mask_d)


@triton.jit(do_not_specialize=["n_partials"])
def sum_partials_kernel(
    dw_partial_ptr,  # [P, D] float32
    db_partial_ptr,  # [P, D] float32
    dw_ptr,  # [D]
    db_ptr,  # [D]
    n_partials,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """One program per COLS columns of one gradient."""
    if tl.program_id(1) == 0:
        store_sums(dw_partial_ptr, dw_ptr, tl.program_id(0), n_partials, D, ROWS, COLS)
    else:
        store_sums(db_partial_ptr, db_ptr, tl.program_id(0), n_partials, D, ROWS, COLS)


def launch_layer_norm_forward(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (h, y, mean, rstd) for contiguous rows x [N, D]. Without a residual h is x itself."""
    n_rows, width = x.shape
    h = x if residual is None else torch.empty_like(x)
    y = torch.empty_like(x)
    mean = torch.empty(n_rows, dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    if n_rows:
        t = tile("layer_norm", "forward", x.device, width=width)
        layer_norm_forward_kernel[(triton.cdiv(n_rows, t["rows"]),)](
            x, residual, weight, bias, None if residual is None else h, y, mean, rstd,
            n_rows=n_rows, eps=eps, D=width, BLOCK_D=triton.next_power_of_2(width), ROWS=t["rows"],
            num_warps=t["num_warps"], enable_fp_fusion=FP_FUSION,
        )
    return h, y, mean, rstd


def launch_layer_norm_backward(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, mean: torch.Tensor, rstd: torch.Tensor,
    dresidual: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (dx, dweight, dbias) for contiguous rows [N, D]."""
    n_rows, width = x.shape
    t = tile("layer_norm", "backward", x.device, width=width)
    n_partials = max(1, min(MAX_PARTIALS, triton.cdiv(n_rows, t["rows"])))
    dx, dw, db = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)
    dw_partial = torch.empty(n_partials, width, dtype=torch.float32, device=x.device)
    db_partial = torch.empty_like(dw_partial)
    layer_norm_backward_kernel[(n_partials,)](
        dy, x, dresidual, weight, mean, rstd, dx, dw_partial, db_partial,
        n_rows=n_rows, n_partials=n_partials, D=width, BLOCK_D=triton.next_power_of_2(width), ROWS=t["rows"],
        STAGES=t["stages"], num_warps=t["num_warps"], enable_fp_fusion=FP_FUSION,
    )
    sum_partials_kernel[(triton.cdiv(width, SUM_COLS), 2)](
        dw_partial, db_partial, dw, db,
        n_partials=n_partials, D=width, ROWS=SUM_ROWS, COLS=SUM_COLS,
        num_warps=4, enable_fp_fusion=FP_FUSION,
    )
    return dx, dw, db
