"""Arguments of the parallel block that its tests share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from kernel_checks import rotary_tables

from phi1.kernels import Dropout

SHAPE = (2, 17, 32, 2, 48, 8)  # B, T, D, H, F, R


def tables(device: str, rotary_size: int = SHAPE[-1], n_positions: int = 150) -> dict[str, torch.Tensor]:
    """cos and sin by name."""
    return dict(zip(("cos", "sin"), rotary_tables(rotary_size, n_positions, device), strict=True))


def options(device: str, **more: Any) -> dict[str, Any]:
    """The arguments of the block at SHAPE besides its tensors."""
    return {**tables(device), "n_heads": SHAPE[3], "batch": SHAPE[0], **more}


def ints(device: str, *values: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    """A vector of whole numbers."""
    return torch.tensor(values, dtype=dtype, device=device)


def drops(device: str, rates: Sequence[float], sample_ids: Sequence[int] | None = None) -> tuple[Dropout | None, ...]:
    """The dropouts of attention, dense and fc2 at these rates, None at 0."""
    rng = ints(device, 5, 7, dtype=torch.int64)
    ids = None if sample_ids is None else ints(device, *sample_ids, dtype=torch.int64)
    return tuple(Dropout(p, rng, ids, layer=3, kind=kind) if p else None for kind, p in enumerate(rates))
