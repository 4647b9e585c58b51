"""Rotary position embedding on part of each head, NeoX style, shared by the operations that rotate.

With a = x[..., :R/2] and b = x[..., R/2:R] of a head, and the angle's cosine c and sine s at the row's position:

    a' = a c - b s        b' = b c + a s        dimensions R..K stay

The inverse, which is also the backward, has -s for s. Computed in float32, rounded once to x's dtype.

N rows, T positions, H heads, K head size, R rotary dimension, S of q, k, v.
"""

from __future__ import annotations

import torch

from phi1.kernels.core.backend import use_triton
from phi1.kernels.core.checks import check_device, check_range, check_rank, check_shape, require
from phi1.kernels.core.cpu_memory import empty
from phi1.kernels.core.philox import document_positions


def check_tables(op: str, cos: torch.Tensor, sin: torch.Tensor, x: torch.Tensor, head_size: int) -> None:
    """Raise unless cos and sin are float32 [T, R/2] on x's device, with R at most the head size."""
    check_rank(op, "cos", cos, "T, R/2")
    check_shape(op, "sin", sin, cos.shape, "cos's")
    for name, table in (("cos", cos), ("sin", sin)):
        require(table.dtype == torch.float32, op, f"{name} must be float32", str(table.dtype).removeprefix("torch."))
        check_device(op, name, table, "x", x)
    require(1 <= cos.shape[1] <= head_size // 2, op,
            f"cos must have between 1 and {head_size // 2} columns, half the rotary dimension", cos.shape[1])


def check_positions(op: str, positions: torch.Tensor, n_rows: int, table: torch.Tensor) -> None:
    """Raise unless positions is an integer [N] on the table's device, its values rows of the table."""
    require(positions.dtype in (torch.int32, torch.int64), op, "positions must be int32 or int64",
            str(positions.dtype).removeprefix("torch."))
    check_device(op, "positions", positions, "cos", table)
    check_shape(op, "positions", positions, (n_rows,), "one per row of x")
    check_range(op, "positions", positions, 0, table.shape[0], "the rows of cos")


def default_positions(
    n_rows: int,
    batch: int,
    cu_seqlens: torch.Tensor | None,
    seq_starts: torch.Tensor | None,
    device: torch.device,
    before: int = 0,
) -> torch.Tensor:
    """Position of each row [N]: within its document; else within its sequence, of which `before` tokens are seen
    already, from where that starts, at least 0."""
    if cu_seqlens is not None:
        return document_positions(cu_seqlens, n_rows)[1]
    index = torch.arange(before, before + n_rows // max(batch, 1), device=device).expand(batch, -1)
    if seq_starts is not None:
        index = (index - seq_starts[:, None]).clamp(min=0)
    return index.reshape(-1)


def rows_of_tables(
    cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(cos, sin) at each row's position, as `rotate_` takes them: [N, R], the sine negative in front."""
    c, s = cos.index_select(0, positions), sin.index_select(0, positions)  # a third of the time of cos[positions]
    return torch.cat((c, c), -1), torch.cat((-s, s), -1)


def rotate_rows_(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor, inverse: bool = False
) -> None:
    """Rotate q and k of x [N, S, H, K], any strides, in place, each row by its position. Nothing is checked."""
    if use_triton(x):
        from phi1.kernels.pointwise.rotary_triton import launch_rotary

        launch_rotary(x, x, cos, sin, positions, inverse)
    else:
        cos, sin = rows_of_tables(cos, sin, positions)
        rotate_(x[:, :2], cos[:, None, None], sin[:, None, None], inverse)


def rotate_(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, inverse: bool = False) -> None:
    """Rotate x [..., K] in place by cos and sin [..., R] that broadcast. Nothing is checked."""
    rotated = x[..., : cos.shape[-1]]
    # In two steps each way: PyTorch converts only contiguous elements fast.
    wide = rotated if x.dtype == torch.float32 else rotated.clone(memory_format=torch.contiguous_format).float()
    a, b = wide.chunk(2, dim=-1)
    swapped = torch.cat((b, a), dim=-1, out=empty(wide.shape, dtype=wide.dtype, device=x.device))
    wide.mul_(cos).addcmul_(swapped, sin, value=-1 if inverse else 1)
    if wide is not rotated:
        rotated.copy_(wide.to(x.dtype))


def rotate_reference(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor, inverse: bool = False
) -> torch.Tensor:
    """x [N, S, H, K] rotated, in plain differentiable PyTorch."""
    half = cos.shape[1]
    wide = torch.promote_types(x.dtype, torch.float32)
    c, s = (table[positions].to(wide)[:, None, None, :] for table in (cos, -sin if inverse else sin))
    a, b, rest = x[..., :half].to(wide), x[..., half : 2 * half].to(wide), x[..., 2 * half :]
    return torch.cat(((a * c - b * s).to(x.dtype), (b * c + a * s).to(x.dtype), rest), dim=-1)
