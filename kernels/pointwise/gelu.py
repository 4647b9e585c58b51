"""gelu_new, the tanh form of GELU (Hendrycks and Gimpel, arXiv 1606.08415), as phi-1 uses it; formula in `_gelu.py`.

Computed in float32, rounded once. Saves x.
"""

from __future__ import annotations

import torch

from phi1.kernels.core.backend import operator, reference_forced
from phi1.kernels.core.checks import check_float, check_tensors
from phi1.kernels.pointwise.gelu_eager import gelu_backward, gelu_forward, gelu_new


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1] if x.dim() and x.numel() else 1)


@operator("phi1::gelu")
def _gelu_op(x: torch.Tensor) -> torch.Tensor:
    return gelu_forward(_rows(x)).view(x.shape)


@_gelu_op.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape)


@operator("phi1::gelu_backward")
def _gelu_backward_op(dy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return gelu_backward(_rows(dy), _rows(x)).view(x.shape)


@_gelu_backward_op.register_fake
def _(dy, x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape)


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _autograd(ctx, dy):
    return torch.ops.phi1.gelu_backward(dy, *ctx.saved_tensors)


_gelu_op.register_autograd(_autograd, setup_context=_setup)


def gelu(x: torch.Tensor) -> torch.Tensor:
    """gelu_new of each element.

    Args:
        x: any shape, float16, bfloat16 or float32.

    Returns:
        x's shape and dtype, contiguous.

    Raises:
        TypeError: x is not a tensor of such a dtype.

    Source: Hendrycks and Gimpel, "Gaussian error linear units", arXiv 1606.08415, the tanh approximation.
    """
    check_tensors("gelu", x=x)
    check_float("gelu", "x", x)
    if reference_forced():
        return gelu_reference(x)
    return torch.ops.phi1.gelu(x)


def gelu_reference(x: torch.Tensor) -> torch.Tensor:
    """`gelu` in plain differentiable PyTorch."""
    return gelu_new(x)
