"""Rotary position embedding (Su et al., arXiv 2104.09864) on R dimensions of each head of q and k, NeoX style.

With a = x[..., :R/2] and b = x[..., R/2:R] of a head, and the angle's cosine c and sine s at the row's position:

    a' = a c - b s        b' = b c + a s        dimensions R..K stay

The inverse, which is also the backward, has -s for s. Computed in float32, rounded once to x's dtype. Saves nothing but
the tables and positions. `rotary_` works in place and has no backward: an operator that writes into its input cannot
have one.

N rows, T positions, H heads, K head size, R rotary dimension, S = 1 (q), 2 (q, k) or 3 (q, k, v).
"""

from __future__ import annotations

import torch

from phi1.kernels.core.backend import operator, reference_forced, use_triton
from phi1.kernels.core.checks import (
    check_device,
    check_flag,
    check_float,
    check_range,
    check_rank,
    check_shape,
    check_tensors,
    check_writable,
    require,
)
from phi1.kernels.core.cpu_memory import empty
from phi1.kernels.core.philox import document_positions


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


def rotary_forward(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor, inverse: bool
) -> torch.Tensor:
    """x [N, S, H, K] with q and k rotated, contiguous. Nothing is checked."""
    if use_triton(x):
        from phi1.kernels.pointwise.rotary_triton import launch_rotary

        out = x.new_empty(x.shape)
        launch_rotary(x, out, cos, sin, positions, inverse)
        return out
    out = x.clone(memory_format=torch.contiguous_format)
    rotate_rows_(out, cos, sin, positions, inverse)
    return out


@operator("phi1::rotary")
def _rotary_op(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor, inverse: bool
) -> torch.Tensor:
    return rotary_forward(x, cos, sin, positions, inverse)


@_rotary_op.register_fake
def _(x: torch.Tensor, cos, sin, positions, inverse) -> torch.Tensor:
    return x.new_empty(x.shape)


def _setup(ctx, inputs, output) -> None:
    _, cos, sin, positions, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin, positions)


def _autograd(ctx, dy):
    return torch.ops.phi1.rotary(dy, *ctx.saved_tensors, not ctx.inverse), None, None, None, None


_rotary_op.register_autograd(_autograd, setup_context=_setup)


@operator("phi1::rotary_", mutates=("x",))
def _rotary_in_place_op(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor, inverse: bool
) -> None:
    rotate_rows_(x, cos, sin, positions, inverse)


@_rotary_in_place_op.register_fake
def _(x, cos, sin, positions, inverse) -> None:
    return None


def rotary(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor, *, inverse: bool = False
) -> torch.Tensor:
    """Rotate q and k by their positions.

    Args:
        x: [N, S, H, K], float16, bfloat16 or float32; S is 1 for q or k, 2 for both, 3 for q, k and v, which stays.
        cos: [T, R/2] float32, cosine of position times frequency; R at most K. A constant: it gets no gradient.
        sin: as cos.
        positions: [N] int32 or int64, at least 0 and less than T. Checked on CPU and under `check_values(True)`.
        inverse: rotate back.

    Returns:
        [N, S, H, K] in x's dtype, contiguous.

    Raises:
        TypeError: an argument is of another type, or x not of a floating-point dtype.
        ValueError: a shape, a device, a table's dtype or a position breaks its rule.

    Source: Su et al., "RoFormer", arXiv 2104.09864; halves paired as in GPT-NeoX.
    """
    _check("rotary", x, cos, sin, positions, inverse)
    if reference_forced():
        return rotary_reference(x, cos, sin, positions, inverse=inverse)
    return torch.ops.phi1.rotary(x, cos, sin, positions, inverse)


def rotary_(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor, *, inverse: bool = False
) -> torch.Tensor:
    """`rotary` in place, for decoding: it has no backward, and reads and writes nothing but what is rotated.

    Args:
        x: as for `rotary`; any strides, for example columns of a projection. It must not require a gradient, and no two
            of its elements may share memory.
        cos, sin, positions, inverse: as for `rotary`.

    Returns:
        x.

    Raises:
        TypeError: as `rotary`.
        ValueError: as `rotary`; x requires a gradient, or is expanded.
    """
    _check("rotary_", x, cos, sin, positions, inverse)
    require(not x.requires_grad, "rotary_", "x must not require a gradient: `rotary` has a backward", "one that does")
    check_writable("rotary_", "x", x)
    if reference_forced():
        return x.copy_(rotary_reference(x, cos, sin, positions, inverse=inverse))
    torch.ops.phi1.rotary_(x, cos, sin, positions, inverse)
    return x


def _check(
    op: str, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor, inverse: bool
) -> None:
    check_tensors(op, x=x, cos=cos, sin=sin, positions=positions)
    check_flag(op, inverse=inverse)
    check_float(op, "x", x)
    check_rank(op, "x", x, "N, S, H, K")
    require(x.shape[1] in (1, 2, 3), op, "x.shape[1] must be 1, 2 or 3: q, or q and k, or q, k and v", x.shape[1])
    check_tables(op, cos, sin, x, x.shape[3])
    check_positions(op, positions, x.shape[0], cos)


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


def rotary_reference(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor, *, inverse: bool = False
) -> torch.Tensor:
    """`rotary` in plain differentiable PyTorch."""
    return torch.cat((rotate_reference(x[:, :2], cos.detach(), sin.detach(), positions, inverse), x[:, 2:]), dim=1)


def rotate_reference(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor, inverse: bool = False
) -> torch.Tensor:
    """x [N, S, H, K] rotated, in plain differentiable PyTorch."""
    half = cos.shape[1]
    wide = torch.promote_types(x.dtype, torch.float32)
    c, s = (table[positions].to(wide)[:, None, None, :] for table in (cos, -sin if inverse else sin))
    a, b, rest = x[..., :half].to(wide), x[..., half : 2 * half].to(wide), x[..., 2 * half :]
    return torch.cat(((a * c - b * s).to(x.dtype), (b * c + a * s).to(x.dtype), rest), dim=-1)
