"""Dropout on a residual branch, by the counter-based masks of `_philox.py`; shared by the operations that add one.

N rows, D width.
"""

from __future__ import annotations

import torch

from phi1.kernels._philox import Dropout, dropout_scale, is_active, residual_keep


def dropped(x: torch.Tensor, dropout: Dropout | None, cu_seqlens: torch.Tensor | None = None) -> torch.Tensor:
    """x [N, D] with elements dropped and the rest scaled; x itself where nothing is dropped. Its own backward."""
    if dropout is None or not is_active(dropout):
        return x
    keep = residual_keep(dropout, x.shape[0], x.shape[1], cu_seqlens=cu_seqlens)
    return torch.where(keep, x * dropout_scale(dropout.p), torch.zeros((), dtype=x.dtype, device=x.device))
