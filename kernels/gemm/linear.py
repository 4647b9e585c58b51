"""A linear layer with its epilogue: bias, gelu_new, dropout and the residual add.

    pre = x W^T + b        out = residual + drop(act(pre))

Products accumulate in float32 and are rounded to x's dtype. On GPUs cuBLAS computes the backward's products, after one
pass that makes their operands. Saved for the backward: x, W, pre if there is an activation, and the counters of the
dropout mask.

N rows, K inputs, M outputs.
"""

from __future__ import annotations

import torch

from phi1.kernels.core.backend import operator, reference_forced, use_triton
from phi1.kernels.core.checks import (
    check_alike,
    check_float,
    check_rank,
    check_shape,
    check_tensors,
    require,
)
from phi1.kernels.core.cpu_matmul import addmm, mm
from phi1.kernels.core.philox import Dropout, check_dropout, dropout_fields, dropout_from_fields, is_active
from phi1.kernels.pointwise.dropout import dropped
from phi1.kernels.pointwise.gelu import gelu_backward, gelu_forward, gelu_new

GELU_NEW = "gelu_new"


def linear_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    gelu: bool,
    dropout: Dropout | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (out [N, M], pre [N, M]). Without gelu pre is empty."""
    if use_triton(x):
        from phi1.kernels.gemm.linear_triton import launch_linear_forward

        return launch_linear_forward(x, weight, bias, residual, gelu, dropout)
    out = mm(x, weight.t()) if bias is None else addmm(bias, x, weight.t())
    pre = out if gelu else x.new_empty(0)
    if gelu:
        out = gelu_forward(pre)
    out = dropped(out, dropout)
    return (out if residual is None else out.add_(residual)), pre


def linear_backward(
    dout: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    pre: torch.Tensor,
    has_bias: bool,
    gelu: bool,
    dropout: Dropout | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of x, weight and bias (empty without one). The residual's gradient is dout."""
    if use_triton(x):
        dpre, db = _epilogue_backward(dout, pre if gelu else None, has_bias, dropout)
    else:
        dpre = dropped(dout.contiguous(), dropout)
        if gelu:
            dpre = gelu_backward(dpre, pre)
        db = dpre.sum(0) if has_bias else dpre.new_empty(0)
    return mm(dpre, weight), mm(dpre.t(), x), db


def _epilogue_backward(
    dout: torch.Tensor, pre: torch.Tensor | None, has_bias: bool, dropout: Dropout | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (dpre, db): the product's gradient, and its sums over rows (empty without a bias)."""
    from phi1.kernels.pointwise.epilogue_triton import launch_epilogue_backward

    same = pre is None and not is_active(dropout)
    dpre = dout if same else dout.new_empty(dout.shape)
    db = None
    if has_bias or not same:
        db = launch_epilogue_backward(dout, pre, dropout, dpre=None if same else dpre, bias=has_bias)
    return dpre, dout.new_empty(0) if db is None else db


@operator("phi1::linear")
def _linear_op(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    gelu: bool,
    p: float,
    rng: torch.Tensor | None,
    sample_ids: torch.Tensor | None,
    layer: int,
    kind: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    return linear_forward(x, weight, bias, residual, gelu, dropout_from_fields(p, rng, sample_ids, layer, kind))


@_linear_op.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, bias, residual, gelu: bool, *_):
    shape = (x.shape[0], weight.shape[0])
    return x.new_empty(shape), x.new_empty(shape if gelu else (0,))


@operator("phi1::linear_backward")
def _linear_backward_op(
    dout: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    pre: torch.Tensor,
    has_bias: bool,
    gelu: bool,
    p: float,
    rng: torch.Tensor | None,
    sample_ids: torch.Tensor | None,
    layer: int,
    kind: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dropout = dropout_from_fields(p, rng, sample_ids, layer, kind)
    return linear_backward(dout, x, weight, pre, has_bias, gelu, dropout)


@_linear_backward_op.register_fake
def _(dout: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, pre, has_bias: bool, *_):
    db = x.new_empty((weight.shape[0],) if has_bias else (0,))
    return x.new_empty(x.shape), weight.new_empty(weight.shape), db


def _setup(ctx, inputs, output) -> None:
    x, weight, bias, residual, gelu, p, rng, sample_ids, layer, kind = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # otherwise autograd allocates a gradient of zeros for pre
    ctx.save_for_backward(x, weight, output[1], rng, sample_ids)
    ctx.has_bias, ctx.has_residual, ctx.constants = bias is not None, residual is not None, (gelu, p, layer, kind)


def _autograd(ctx, dout, _):
    if dout is None:
        return (None,) * 10
    x, weight, pre, rng, sample_ids = ctx.saved_tensors
    gelu, p, layer, kind = ctx.constants
    dx, dw, db = torch.ops.phi1.linear_backward(dout, x, weight, pre, ctx.has_bias, gelu, p, rng, sample_ids, layer,
                                                kind)
    return (dx, dw, db if ctx.has_bias else None, dout if ctx.has_residual else None, *[None] * 6)


_linear_op.register_autograd(_autograd, setup_context=_setup)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: str | None = None,
    residual: torch.Tensor | None = None,
    dropout: Dropout | None = None,
) -> torch.Tensor:
    """Return residual + drop(activation(x W^T + b)). Bias, activation, dropout and residual are optional.

    Args:
        x: [N, K], float16, bfloat16 or float32.
        weight: [M, K], x's dtype.
        bias: [M], x's dtype, or None.
        activation: "gelu_new" or None.
        residual: [N, M], x's dtype, added last, or None.
        dropout: dropout before the residual add; None drops nothing.

    Returns:
        [N, M] in x's dtype, contiguous.

    Raises:
        TypeError: an argument is not a tensor, or has another dtype.
        ValueError: a shape, a device or the activation breaks its rule.
    """
    _check("linear", x, weight, bias, activation, residual, dropout)
    if reference_forced():
        return linear_reference(x, weight, bias, activation=activation, residual=residual, dropout=dropout)
    return torch.ops.phi1.linear(x, weight, bias, residual, activation == GELU_NEW, *dropout_fields(dropout))[0]


def _check(op, x, weight, bias, activation, residual, dropout) -> None:
    given = {name: y for name, y in (("bias", bias), ("residual", residual)) if y is not None}
    check_tensors(op, x=x, weight=weight, **given)
    check_float(op, "x", x)
    check_alike(op, "x", x, weight=weight, **given)
    check_rank(op, "x", x, "N, K")
    check_rank(op, "weight", weight, "M, K")
    outputs = weight.shape[0]
    check_shape(op, "weight", weight, (outputs, x.shape[1]), f"columns as many as x's {list(x.shape)}")
    if bias is not None:
        check_shape(op, "bias", bias, (outputs,), f"one per row of weight {list(weight.shape)}")
    if residual is not None:
        check_shape(op, "residual", residual, (x.shape[0], outputs), "the output's")
    require(activation in (None, GELU_NEW), op, f'activation must be None or "{GELU_NEW}"', repr(activation))
    check_dropout(op, dropout, x)


def linear_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: str | None = None,
    residual: torch.Tensor | None = None,
    dropout: Dropout | None = None,
) -> torch.Tensor:
    """Compute `linear` in plain differentiable PyTorch."""
    out = torch.nn.functional.linear(x, weight, bias)
    if activation == GELU_NEW:
        out = gelu_new(out)
    out = dropped(out, dropout)
    return out if residual is None else out + residual
