"""Dropout of a residual branch and the residual add, in one operation. `core/philox.py` specifies the masks.

    out = residual + keep x / (1 - p)          with p in steps of 1/65536

The backward needs only the counters of the mask.

N rows, D width.
"""

from __future__ import annotations

import torch

from phi1.kernels.core.backend import operator, reference_forced, use_triton
from phi1.kernels.core.checks import check_alike, check_float, check_rank, check_shape, check_tensors
from phi1.kernels.core.philox import (
    Dropout,
    check_dropout,
    dropout_fields,
    dropout_from_fields,
    dropout_scale,
    is_active,
    residual_keep,
)


def dropped(x: torch.Tensor, dropout: Dropout | None, cu_seqlens: torch.Tensor | None = None) -> torch.Tensor:
    """Return x [N, D] with elements dropped and the rest scaled, or x itself if nothing is dropped.

    The same function of dout is its gradient.
    """
    if dropout is None or not is_active(dropout):
        return x
    keep = residual_keep(dropout, x.shape[0], x.shape[1], cu_seqlens=cu_seqlens)
    return torch.where(keep, x * dropout_scale(dropout.p), torch.zeros((), dtype=x.dtype, device=x.device))


def dropout_add_forward(x: torch.Tensor, residual: torch.Tensor, dropout: Dropout | None) -> torch.Tensor:
    """Return residual + drop(x) for x [N, D], contiguous. Arguments are not checked."""
    if use_triton(x):
        from phi1.kernels.pointwise.epilogue_triton import launch_epilogue_forward

        return launch_epilogue_forward(x, residual, False, dropout)
    return (residual + dropped(x, dropout)).contiguous()


def dropout_backward(dout: torch.Tensor, dropout: Dropout | None) -> torch.Tensor:
    """Return the gradient of x [N, D], contiguous and not a view of dout. Arguments are not checked."""
    if use_triton(dout):
        from phi1.kernels.pointwise.epilogue_triton import launch_epilogue_backward

        dx = dout.new_empty(dout.shape)
        launch_epilogue_backward(dout, None, dropout, dpre=dx)
        return dx
    dx = dropped(dout.contiguous(), dropout)
    return dx if is_active(dropout) else dx.clone()


@operator("phi1::dropout_add")
def _dropout_add_op(
    x: torch.Tensor,
    residual: torch.Tensor,
    p: float,
    rng: torch.Tensor | None,
    sample_ids: torch.Tensor | None,
    layer: int,
    kind: int,
) -> torch.Tensor:
    return dropout_add_forward(x, residual, dropout_from_fields(p, rng, sample_ids, layer, kind))


@_dropout_add_op.register_fake
def _(x: torch.Tensor, residual, *_) -> torch.Tensor:
    return x.new_empty(x.shape)


@operator("phi1::dropout_add_backward")
def _dropout_add_backward_op(
    dout: torch.Tensor,
    p: float,
    rng: torch.Tensor | None,
    sample_ids: torch.Tensor | None,
    layer: int,
    kind: int,
) -> torch.Tensor:
    return dropout_backward(dout, dropout_from_fields(p, rng, sample_ids, layer, kind))


@_dropout_add_backward_op.register_fake
def _(dout: torch.Tensor, *_) -> torch.Tensor:
    return dout.new_empty(dout.shape)


def _setup(ctx, inputs, output) -> None:
    _, _, p, rng, sample_ids, layer, kind = inputs
    ctx.save_for_backward(rng, sample_ids)
    ctx.constants = p, layer, kind


def _autograd(ctx, dout):
    p, layer, kind = ctx.constants
    dx = torch.ops.phi1.dropout_add_backward(dout, p, *ctx.saved_tensors, layer, kind)
    return dx, dout, None, None, None, None, None


_dropout_add_op.register_autograd(_autograd, setup_context=_setup)


def dropout_add(x: torch.Tensor, residual: torch.Tensor, dropout: Dropout | None) -> torch.Tensor:
    """Return residual + drop(x).

    Args:
        x: [N, D], float16, bfloat16 or float32.
        residual: [N, D], x's dtype.
        dropout: the dropout of x; None drops nothing. The number of sample ids, if given, must divide N.

    Returns:
        [N, D] in x's dtype, contiguous.

    Raises:
        TypeError: an argument is not a tensor or a Dropout, or has another dtype.
        ValueError: a shape or a device breaks its rule.

    Source: Srivastava et al., "Dropout", JMLR 2014.
    """
    check_tensors("dropout_add", x=x, residual=residual)
    check_float("dropout_add", "x", x)
    check_alike("dropout_add", "x", x, residual=residual)
    check_rank("dropout_add", "x", x, "N, D")
    check_shape("dropout_add", "residual", residual, x.shape, "x's")
    check_dropout("dropout_add", dropout, x)
    if reference_forced():
        return dropout_add_reference(x, residual, dropout)
    return torch.ops.phi1.dropout_add(x, residual, *dropout_fields(dropout))


def dropout_add_reference(x: torch.Tensor, residual: torch.Tensor, dropout: Dropout | None) -> torch.Tensor:
    """Compute `dropout_add` in plain differentiable PyTorch."""
    return residual + dropped(x, dropout)
