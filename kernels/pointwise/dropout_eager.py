"""Dropout on a residual branch and the residual add, by the counter-based masks of `_philox.py`, on plain tensors.

N rows, D width.
"""

from __future__ import annotations

import torch

from phi1.kernels.core.backend import use_triton
from phi1.kernels.core.philox import Dropout, dropout_scale, is_active, residual_keep


def dropped(x: torch.Tensor, dropout: Dropout | None, cu_seqlens: torch.Tensor | None = None) -> torch.Tensor:
    """x [N, D] with elements dropped and the rest scaled; x itself where nothing is dropped. Its own backward."""
    if dropout is None or not is_active(dropout):
        return x
    keep = residual_keep(dropout, x.shape[0], x.shape[1], cu_seqlens=cu_seqlens)
    return torch.where(keep, x * dropout_scale(dropout.p), torch.zeros((), dtype=x.dtype, device=x.device))


def dropout_add_forward(x: torch.Tensor, residual: torch.Tensor, dropout: Dropout | None) -> torch.Tensor:
    """residual + drop(x) of x [N, D], contiguous. Nothing is checked."""
    if use_triton(x):
        from phi1.kernels.pointwise.epilogue_triton import launch_forward

        return launch_forward(x, residual, False, dropout)
    return (residual + dropped(x, dropout)).contiguous()


def dropout_backward(dout: torch.Tensor, dropout: Dropout | None) -> torch.Tensor:
    """The gradient of x [N, D], contiguous and no view of dout. Nothing is checked."""
    if use_triton(dout):
        from phi1.kernels.pointwise.epilogue_triton import launch_backward

        dx = dout.new_empty(dout.shape)
        launch_backward(dout, None, dropout, dpre=dx)
        return dx
    dx = dropped(dout.contiguous(), dropout)
    return dx if is_active(dropout) else dx.clone()
