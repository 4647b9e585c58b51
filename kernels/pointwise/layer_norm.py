"""Layer normalisation over the last axis, alone and after a residual add (Ba et al., arXiv 1607.06450).

    y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias

Any dtype is computed in float32, and mean and rstd are saved for the backward as float32. The formulas of the backward
are in `layer_norm_triton.py`. Gradients are deterministic.

N rows, D width.
"""

from __future__ import annotations

import torch

from phi1.kernels.core.backend import operator, reference_forced, use_triton
from phi1.kernels.core.checks import check_alike, check_float, check_real, check_shape, check_tensors, require, shape_of
from phi1.kernels.core.cpu_memory import empty

MAX_WIDTH = 8192  # of the kernels, which keep a row in registers


def layer_norm_forward(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y, mean [N], rstd [N]) of x [..., D]."""
    rows = _rows(x)
    if use_triton(x):
        from phi1.kernels.pointwise.layer_norm_triton import launch_layer_norm_forward

        _, y, mean, rstd = launch_layer_norm_forward(rows, None, weight.contiguous(), bias.contiguous(), eps)
    else:
        y, mean, rstd = _torch_forward(rows, weight, bias, eps)
    return y.view(x.shape), mean, rstd


def add_layer_norm_forward(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(x + residual, y, mean [N], rstd [N]) of x [..., D]."""
    if use_triton(x):
        from phi1.kernels.pointwise.layer_norm_triton import launch_layer_norm_forward

        h, y, mean, rstd = launch_layer_norm_forward(_rows(x), _rows(residual), weight.contiguous(), bias.contiguous(),
                                                     eps)
    else:
        h = _rows(x) + _rows(residual)
        y, mean, rstd = _torch_forward(h, weight, bias, eps)
    return h.view(x.shape), y.view(x.shape), mean, rstd


def layer_norm_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    residual_grad: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dx, dweight, dbias), where dx already holds `residual_grad` if that is given.

    x [..., D] is what was normalised; mean and rstd [N] are what the forward saved.
    """
    residual_rows = None if residual_grad is None else _rows(residual_grad)
    if use_triton(x):
        from phi1.kernels.pointwise.layer_norm_triton import launch_layer_norm_backward

        dx, dw, db = launch_layer_norm_backward(_rows(dy), _rows(x), weight.contiguous(), mean, rstd, residual_rows)
    else:
        dx, dw, db = _torch_backward(_rows(dy), _rows(x), weight, mean, rstd)
        if residual_rows is not None:
            dx += residual_rows
    return dx.view(x.shape), dw, db


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1]).contiguous()


def _torch_forward(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    # The CPU kernel takes 16-bit rows with float32 parameters, and then returns float32 statistics.
    rows = x if x.is_cpu else x.float()
    y, mean, rstd = torch.native_layer_norm(rows, (x.shape[-1],), weight.float(), bias.float(), eps)
    return y.to(x.dtype), mean.view(-1), rstd.view(-1)


def _torch_backward(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, mean: torch.Tensor, rstd: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    # On bfloat16 rows the CPU kernel sums dweight and dbias in bfloat16: 7 % wrong over 2048 rows. Widening the rows
    # costs no time there, for the float32 kernel is faster by as much.
    wide = weight.float()
    dy_wide, x_wide = (empty(t.shape, dtype=torch.float32, device=x.device).copy_(t) for t in (dy, x))
    dx, dw, db = torch.ops.aten.native_layer_norm_backward(
        dy_wide, x_wide, (x.shape[-1],), mean.view(-1, 1), rstd.view(-1, 1), wide, wide, (True, True, True)
    )
    dx = dx if x.dtype == torch.float32 else empty(x.shape, dtype=x.dtype, device=x.device).copy_(dx)
    return dx, dw.to(weight.dtype), db.to(weight.dtype)


@operator("phi1::layer_norm")
def _layer_norm_op(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return layer_norm_forward(x, weight, bias, eps)


@_layer_norm_op.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float):
    return x.new_empty(x.shape), *_fake_statistics(x)


@operator("phi1::add_layer_norm")
def _add_layer_norm_op(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return add_layer_norm_forward(x, residual, weight, bias, eps)


@_add_layer_norm_op.register_fake
def _(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float):
    return x.new_empty(x.shape), x.new_empty(x.shape), *_fake_statistics(x)


@operator("phi1::layer_norm_backward")
def _layer_norm_backward_op(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    residual_grad: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return layer_norm_backward(dy, x, weight, mean, rstd, residual_grad)


@_layer_norm_backward_op.register_fake
def _(dy, x: torch.Tensor, weight: torch.Tensor, mean, rstd, residual_grad):
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape)


def _fake_statistics(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    n_rows = x.shape[:-1].numel()
    mean = x.new_empty((n_rows,), dtype=torch.float32)
    return mean, torch.empty_like(mean)


def _layer_norm_setup(ctx, inputs, output) -> None:
    x, weight, _, _ = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)  # or autograd fills zeros for the statistics
    ctx.save_for_backward(x, weight, mean, rstd)


def _layer_norm_autograd(ctx, dy, *_):
    if dy is None:
        return (None,) * 4
    return *torch.ops.phi1.layer_norm_backward(dy, *ctx.saved_tensors, None), None


def _add_layer_norm_setup(ctx, inputs, output) -> None:
    h, _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)  # or autograd fills zeros for the statistics
    ctx.save_for_backward(h, inputs[2], mean, rstd)


def _add_layer_norm_autograd(ctx, dh, dy, *_):
    if dy is None:  # the normalised output had no part in the loss
        return dh, dh, None, None, None
    dx, dw, db = torch.ops.phi1.layer_norm_backward(dy, *ctx.saved_tensors, dh)
    return dx, dx, dw, db, None


_layer_norm_op.register_autograd(_layer_norm_autograd, setup_context=_layer_norm_setup)
_add_layer_norm_op.register_autograd(_add_layer_norm_autograd, setup_context=_add_layer_norm_setup)


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    """Normalise the last axis of x to mean 0 and variance 1, then scale and shift it.

    Args:
        x: [..., D], float16, bfloat16 or float32; D at most 8192 where the Triton kernel runs.
        weight: [D], x's dtype.
        bias: [D], x's dtype.
        eps: added to the variance, in the square of x's unit.

    Returns:
        [..., D] in x's dtype, contiguous.

    Raises:
        TypeError: an argument is not a tensor, or of another dtype.
        ValueError: a shape, a device or eps breaks its rule.
        NotImplementedError: D is more than 8192 where the Triton kernel runs.

    Source: Ba, Kiros and Hinton, "Layer normalization", arXiv 1607.06450.
    """
    _check("layer_norm", x, weight, bias, eps)
    if reference_forced():
        return layer_norm_reference(x, weight, bias, eps)
    return torch.ops.phi1.layer_norm(x, weight, bias, eps)[0]


def add_layer_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float = 1e-5
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add a residual, and normalise the sum as `layer_norm` does, in one pass over memory.

    Args:
        x: [..., D], float16, bfloat16 or float32.
        residual: x's shape and dtype.
        weight, bias, eps: as for `layer_norm`.

    Returns:
        x + residual, and its normalisation; both [..., D] in x's dtype, contiguous. The sum is rounded to that dtype
        before it is normalised.

    Raises:
        As `layer_norm`; also for a residual of another shape, dtype or device.
    """
    check_tensors("add_layer_norm", x=x, residual=residual)
    _check("add_layer_norm", x, weight, bias, eps)
    check_alike("add_layer_norm", "x", x, residual=residual)
    check_shape("add_layer_norm", "residual", residual, x.shape, "x's")
    if reference_forced():
        return add_layer_norm_reference(x, residual, weight, bias, eps)
    h, y, _, _ = torch.ops.phi1.add_layer_norm(x, residual, weight, bias, eps)
    return h, y


def _check(op: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> None:
    check_tensors(op, x=x, weight=weight, bias=bias)
    check_float(op, "x", x)
    check_alike(op, "x", x, weight=weight, bias=bias)
    require(x.dim() >= 1 and x.shape[-1] >= 1, op, "x must have a last axis of at least 1", shape_of(x))
    for name, parameter in (("weight", weight), ("bias", bias)):
        check_shape(op, name, parameter, x.shape[-1:], f"the last axis of x {shape_of(x)}")
    check_real(op, eps=eps)
    require(eps > 0, op, "eps must be greater than 0", eps)
    if x.shape[-1] > MAX_WIDTH and use_triton(x):
        raise NotImplementedError(f"{op}: the Triton kernel keeps a row in registers, so the last axis of x must be at "
                                  f"most {MAX_WIDTH}; got {x.shape[-1]}; backend('reference') takes any")


def layer_norm_reference(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float = 1e-5
) -> torch.Tensor:
    """`layer_norm` in plain differentiable PyTorch."""
    wide = torch.promote_types(x.dtype, torch.float32)
    centred = x.to(wide) - x.to(wide).mean(dim=-1, keepdim=True)
    rstd = torch.rsqrt(centred.square().mean(dim=-1, keepdim=True) + eps)
    return (centred * rstd * weight.to(wide) + bias.to(wide)).to(x.dtype)


def add_layer_norm_reference(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float = 1e-5
) -> tuple[torch.Tensor, torch.Tensor]:
    """`add_layer_norm` in plain differentiable PyTorch."""
    h = x + residual
    return h, layer_norm_reference(h, weight, bias, eps)
