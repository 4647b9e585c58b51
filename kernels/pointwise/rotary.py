"""Rotary position embedding (Su et al., arXiv 2104.09864) on R dimensions of q and k; formulas in `_rotary.py`.

Computed in float32, rounded once. Saves nothing but the tables and positions: the backward is the inverse rotation.
`rotary_` works in place and has no backward, for an operator that writes into its input cannot have one.

N rows, T positions, H heads, K head size, R rotary dimension, S = 1 (q), 2 (q, k) or 3 (q, k, v).
"""

from __future__ import annotations

import torch

from phi1.kernels.core.backend import operator, reference_forced, use_triton
from phi1.kernels.core.checks import (
    check_flag,
    check_float,
    check_rank,
    check_tensors,
    check_writable,
    require,
)
from phi1.kernels.pointwise.rotary_eager import check_positions, check_tables, rotate_reference, rotate_rows_


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


def rotary_reference(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor, *, inverse: bool = False
) -> torch.Tensor:
    """`rotary` in plain differentiable PyTorch."""
    return torch.cat((rotate_reference(x[:, :2], cos.detach(), sin.detach(), positions, inverse), x[:, 2:]), dim=1)
