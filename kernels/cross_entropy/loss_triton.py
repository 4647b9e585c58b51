"""Triton kernels of linear_cross_entropy between PyTorch's products, and the launcher that loops over chunks.

`dispatch.py` has the formulas. A chunk's logits are one buffer in x's dtype. One kernel computes each row's loss and
replaces the row by dl. Its first pass over the row keeps a running maximum and sum for each lane; its second pass reads
the row from the L2 cache. The products add up dW in float32 (cuBLAS with beta = 1), so each chunk reads and writes dW
once. Nothing waits for the device.

Rows are loaded and stored in their own dtype; arithmetic and sums are float32. Deterministic: no two programs write the
same address, and chunks run one after the other.

N rows, D width, V vocabulary (VOCAB of it valid), C rows of a chunk. STRIDE is the row stride of the logits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from phi1.kernels.core.constants import FP_FUSION
from phi1.kernels.core.constants_triton import LOG2E, LOWEST
from phi1.kernels.core.sums_triton import sum_rows
from phi1.kernels.core.tiles import TILES, tile
from phi1.kernels.cross_entropy.spec import LossRule, Needs, gradient_dtype, scale_of

# Row strides are padded to 128 columns, so every row starts 16-byte aligned for any V, and column_sums needs no mask.
COLUMN_MULTIPLE = 128
# The product for dX of 2048 rows is 128 tiles of 128 x 256 at D = 2048: one wave of an H100's 132 SMs.
WAVE_ROWS, TILE_ROWS = 2048, 128

TILES |= {
    ("linear_cross_entropy", "rows"): [
        {"block": block, "num_warps": warps}
        for block, warps in ((2048, 8), (4096, 8), (4096, 16), (8192, 8), (8192, 16), (8192, 32), (16384, 32))],
    ("linear_cross_entropy", "column_sums"): [
        {"rows": rows, "num_warps": warps} for rows in (32, 64, 128) for warps in (4, 8)],
    ("linear_cross_entropy", "scale"): [
        {"block": block, "num_warps": warps} for block, warps in ((2048, 4), (4096, 4), (4096, 8), (8192, 8))],
}


@triton.jit
def load_logits(logits_ptr, bias_ptr, offs_v, VOCAB: tl.constexpr, COLUMNS: tl.constexpr, STRIDE: tl.constexpr):
    """Return logits [BLOCK_V] of one row in float32 with the bias added, -inf outside the valid vocabulary.

    logits_ptr: [STRIDE], one row. bias_ptr: [COLUMNS], or None. offs_v: [BLOCK_V].
    """
    logits = tl.load(logits_ptr + offs_v, mask=offs_v < STRIDE, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        logits += tl.load(bias_ptr + offs_v, mask=offs_v < COLUMNS, other=0.0).to(tl.float32)
    return tl.where(offs_v < VOCAB, logits, -float("inf"))


@triton.jit
def row_sums(
    logits_ptr, bias_ptr, VOCAB: tl.constexpr, COLUMNS: tl.constexpr, STRIDE: tl.constexpr, MEAN: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Return (maximum, sum of exp(l - maximum), mean of l if MEAN, else 0) of one row.

    logits_ptr: [STRIDE], one row. bias_ptr: [COLUMNS], or None.
    """
    # Each lane has its own maximum and sum, so the loop has no barrier. The larger of l and the maximum has exponential
    # 1, so one exponential is enough for both.
    high = tl.full([BLOCK_V], LOWEST, dtype=tl.float32)
    total = tl.zeros([BLOCK_V], dtype=tl.float32)
    plain = tl.zeros([BLOCK_V], dtype=tl.float32)
    for first in range(0, STRIDE, BLOCK_V):
        offs_v = first + tl.arange(0, BLOCK_V)  # [BLOCK_V]
        logits = load_logits(logits_ptr, bias_ptr, offs_v, VOCAB, COLUMNS, STRIDE)
        smaller = tl.exp2(-tl.abs(logits - high) * LOG2E)
        total = tl.where(logits > high, total * smaller + 1.0, total + smaller)
        high = tl.maximum(high, logits)
        if MEAN:
            plain += tl.where(offs_v < VOCAB, logits, 0.0)
    highest = tl.max(high, axis=0)
    return highest, tl.sum(total * tl.exp2((high - highest) * LOG2E), axis=0), tl.sum(plain, axis=0) / VOCAB


@triton.jit
def loss_rows_kernel(
    logits_ptr,  # [C, STRIDE] logits without their bias, replaced by dl if GRADIENTS
    bias_ptr,  # [COLUMNS], or None
    targets_ptr,  # [C] int64
    row_weights_ptr,  # [C] float32 factors of dl, or None
    losses_ptr,  # [C] float32 output
    lse_ptr,  # [C] float32 output
    ignore_index,
    label_smoothing,
    z_loss,
    VOCAB: tl.constexpr,
    COLUMNS: tl.constexpr,
    STRIDE: tl.constexpr,
    SCALE: tl.constexpr,
    SMOOTHS: tl.constexpr,
    GRADIENTS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One program per row."""
    pid_n = tl.program_id(0)
    logits_ptr += pid_n.to(tl.int64) * STRIDE
    target = tl.load(targets_ptr + pid_n)
    counted = target != ignore_index
    known = (target >= 0) & (target < VOCAB)
    own = tl.load(logits_ptr + target, mask=known, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        own += tl.load(bias_ptr + target, mask=known, other=0.0).to(tl.float32)

    high, total, mean = row_sums(logits_ptr, bias_ptr, VOCAB, COLUMNS, STRIDE, SMOOTHS, BLOCK_V)
    lse = high + tl.log(total)
    loss = lse - own + label_smoothing * (own - mean) + z_loss * lse * lse
    tl.store(losses_ptr + pid_n, tl.where(counted, tl.where(known, loss, float("nan")), 0.0))
    tl.store(lse_ptr + pid_n, lse)

    if GRADIENTS:
        unit = tl.where(counted, tl.where(known, SCALE, float("nan")), 0.0)
        if row_weights_ptr is not None:
            unit *= tl.load(row_weights_ptr + pid_n)
        factor = unit * (1.0 + 2.0 * z_loss * lse) / total
        uniform = unit * label_smoothing / VOCAB
        for first in range(0, STRIDE, BLOCK_V):
            offs_v = first + tl.arange(0, BLOCK_V)  # [BLOCK_V]
            logits = load_logits(logits_ptr, bias_ptr, offs_v, VOCAB, COLUMNS, STRIDE)
            dl = tl.exp2((logits - high) * LOG2E) * factor - uniform
            dl -= tl.where(offs_v == target, unit * (1.0 - label_smoothing), 0.0)
            # dl is also stored outside the valid vocabulary, because the products read it there.
            dl = tl.where(offs_v < VOCAB, dl, 0.0)
            tl.store(logits_ptr + offs_v, dl.to(logits_ptr.dtype.element_ty), mask=offs_v < STRIDE)


@triton.jit(do_not_specialize=["n_rows"])
def column_sums_kernel(
    dlogits_ptr,  # [C, STRIDE] dl
    sums_ptr,  # [V] float32 input and output
    n_rows,
    VOCAB: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One program per BLOCK_V columns, over all rows of the chunk."""
    offs_v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)  # [BLOCK_V], less than STRIDE
    sums = sum_rows(dlogits_ptr, offs_v, None, n_rows, STRIDE, BLOCK_C)
    mask_v = offs_v < VOCAB
    before = tl.load(sums_ptr + offs_v, mask=mask_v, other=0.0)
    tl.store(sums_ptr + offs_v, before + sums, mask=mask_v)


@triton.jit
def scale_kernel(
    gradient_ptr,  # [n] input
    factor_ptr,  # [] float32
    scaled_ptr,  # [n] output
    n,
    BLOCK: tl.constexpr,
):
    """One program per BLOCK elements."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    mask = offs < n
    gradient = tl.load(gradient_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    scaled = gradient * tl.load(factor_ptr)
    tl.store(scaled_ptr + offs, scaled.to(scaled_ptr.dtype.element_ty), mask=mask)


def chunk_rows(n_rows: int, row_bytes: int, workspace_bytes: int) -> int:
    """Return C: all rows if the workspace holds their logits, else the most it holds in whole waves or tiles."""
    most = max(1, workspace_bytes // row_bytes)
    if n_rows <= most:
        return n_rows
    unit = next((unit for unit in (WAVE_ROWS, TILE_ROWS) if most >= unit), 1)
    return most // unit * unit


def launch_losses_and_gradients(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor, rule: LossRule,
    needs: Needs, row_weights: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute `dispatch.losses_and_gradients` with the kernels."""
    n_rows, vocab = x.shape[0], weight.shape[0]
    x, weight, targets = x.contiguous(), weight.contiguous(), targets.contiguous()
    bias = None if bias is None else bias.contiguous()
    columns = min(vocab, _rounded_up(rule.valid_vocab))  # rounded up to whole tiles of the products
    stride = _rounded_up(columns)
    rows = chunk_rows(n_rows, stride * x.dtype.itemsize, rule.workspace_bytes)
    logits = x.new_empty((rows, stride))
    losses = x.new_empty((n_rows,), dtype=torch.float32)
    lse = torch.empty_like(losses)
    kept = gradient_dtype(x.dtype)
    dx = x.new_empty(x.shape if needs.x else (0,), dtype=kept)
    dw = x.new_empty(weight.shape if needs.weight else (0,), dtype=kept if rows == n_rows else torch.float32)
    dw[columns if n_rows else 0 :] = 0
    db = x.new_zeros((vocab if needs.bias else 0,), dtype=torch.float32)
    for first in range(0, n_rows, max(1, rows)):
        chunk = slice(first, min(first + rows, n_rows))
        part = logits[: chunk.stop - first]
        product = part[:, :columns]
        torch.mm(x[chunk], weight[:columns].t(), out=product)
        weights = None if row_weights is None else row_weights[chunk]
        launch_loss_rows(part, bias, targets[chunk], weights, losses[chunk], lse[chunk], rule, columns, bool(needs))
        if needs.bias:
            launch_column_sums(part, db, rule.valid_vocab)
        if needs.x:
            _multiply(product, weight[:columns], dx[chunk], add=False)
        if needs.weight:
            _multiply(product.t(), x[chunk], dw[:columns], add=first > 0)
    return losses, lse, dx, dw.to(kept), db


def launch_loss_rows(
    logits: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor, row_weights: torch.Tensor | None,
    losses: torch.Tensor, lse: torch.Tensor, rule: LossRule, columns: int, gradients: bool,
) -> None:
    """Fill losses and lse [C] from logits [C, stride], and replace the logits by dl if `gradients`."""
    t = tile("linear_cross_entropy", "rows", logits.device, vocab=rule.valid_vocab, itemsize=logits.dtype.itemsize)
    loss_rows_kernel[(logits.shape[0],)](
        logits, bias, targets, row_weights, losses, lse,
        ignore_index=rule.ignore_index, label_smoothing=rule.label_smoothing, z_loss=rule.z_loss,
        VOCAB=rule.valid_vocab, COLUMNS=columns, STRIDE=logits.stride(0), SCALE=scale_of(logits.dtype),
        SMOOTHS=rule.label_smoothing > 0, GRADIENTS=gradients, BLOCK_V=t["block"],
        num_warps=t["num_warps"], enable_fp_fusion=FP_FUSION,
    )


def launch_column_sums(dlogits: torch.Tensor, sums: torch.Tensor, valid_vocab: int) -> None:
    """Add the sums over the rows of dlogits [C, stride] to sums [V]."""
    t = tile("linear_cross_entropy", "column_sums", dlogits.device)
    column_sums_kernel[(triton.cdiv(valid_vocab, COLUMN_MULTIPLE),)](
        dlogits, sums, n_rows=dlogits.shape[0], VOCAB=valid_vocab, STRIDE=dlogits.stride(0), BLOCK_C=t["rows"],
        BLOCK_V=COLUMN_MULTIPLE, num_warps=t["num_warps"], enable_fp_fusion=FP_FUSION,
    )


def launch_scale(gradient: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return gradient * factor in another dtype, multiplied in float32. factor is one float32."""
    gradient = gradient.contiguous()
    scaled = torch.empty_like(gradient, dtype=dtype)
    if gradient.numel():
        t = tile("linear_cross_entropy", "scale", gradient.device)
        scale_kernel[(triton.cdiv(gradient.numel(), t["block"]),)](
            gradient, factor, scaled, n=gradient.numel(), BLOCK=t["block"], num_warps=t["num_warps"],
            enable_fp_fusion=FP_FUSION,
        )
    return scaled


def _multiply(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, add: bool) -> None:
    """Compute out = a b, or out += a b. out has the dtype of a and b, or is float32; sums are float32."""
    if a.dtype != out.dtype and not a.is_cuda:
        a, b = a.float(), b.float()  # on CPUs PyTorch's products have no float32 output for 16-bit operands
    if a.dtype == out.dtype:
        _ = torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
    elif add:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def _rounded_up(columns: int) -> int:
    return triton.cdiv(columns, COLUMN_MULTIPLE) * COLUMN_MULTIPLE
