"""A linear layer with its epilogue, forward and backward without autograd or checks: the Triton kernels, or PyTorch.

The products of the backward are cuBLAS's on GPUs; what stands before them is one pass. N rows, K inputs, M outputs.
"""

from __future__ import annotations

import torch

from phi1.kernels.core.backend import use_triton
from phi1.kernels.core.cpu_matmul import addmm, mm
from phi1.kernels.core.philox import Dropout, is_active
from phi1.kernels.pointwise.dropout_eager import dropped
from phi1.kernels.pointwise.gelu_eager import gelu_backward, gelu_forward


def linear_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    gelu: bool,
    dropout: Dropout | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [N, M], pre [N, M] with gelu, else empty)."""
    if use_triton(x):
        from phi1.kernels.gemm.linear_triton import launch_forward

        return launch_forward(x, weight, bias, residual, gelu, dropout)
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
    """Gradients of x, weight and bias (empty without one); the residual's is dout."""
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
    """(dpre, db): the gradient at the product, and its sum over rows (empty without a bias)."""
    from phi1.kernels.pointwise.epilogue_triton import launch_backward

    same = pre is None and not is_active(dropout)
    dpre = dout if same else dout.new_empty(dout.shape)
    db = None
    if has_bias or not same:
        db = launch_backward(dout, pre, dropout, dpre=None if same else dpre, bias=has_bias)
    return dpre, dout.new_empty(0) if db is None else db
