"""Layer normalisation forward and backward without autograd or checks: the Triton kernels, or PyTorch.

For `layer_norm.py`, and for operations that normalise inside. N rows, D width.
"""

from __future__ import annotations

import torch

from phi1.kernels.core.backend import use_triton
from phi1.kernels.core.cpu_memory import empty

MAX_WIDTH = 8192  # of the kernels, which keep a row in registers


def layer_norm_forward(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y, mean [N], rstd [N]) of x [..., D]."""
    rows = _rows(x)
    if use_triton(x):
        from phi1.kernels.pointwise.layer_norm_triton import launch_forward

        _, y, mean, rstd = launch_forward(rows, None, weight.contiguous(), bias.contiguous(), eps)
    else:
        y, mean, rstd = _torch_forward(rows, weight, bias, eps)
    return y.view(x.shape), mean, rstd


def add_layer_norm_forward(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(x + residual, y, mean [N], rstd [N]) of x [..., D]."""
    if use_triton(x):
        from phi1.kernels.pointwise.layer_norm_triton import launch_forward

        h, y, mean, rstd = launch_forward(_rows(x), _rows(residual), weight.contiguous(), bias.contiguous(), eps)
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
        from phi1.kernels.pointwise.layer_norm_triton import launch_backward

        dx, dw, db = launch_backward(_rows(dy), _rows(x), weight.contiguous(), mean, rstd, residual_rows)
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
