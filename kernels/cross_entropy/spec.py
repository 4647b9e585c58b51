"""What a call of the loss asks for besides its tensors, and how gradients are kept until the end of the backward."""

from __future__ import annotations

from dataclasses import dataclass

import torch

FLOAT16_SCALE = 1024.0


@dataclass(frozen=True)
class LossRule:
    """The arguments of the loss that are plain numbers."""

    ignore_index: int
    label_smoothing: float
    z_loss: float
    valid_vocab: int
    workspace_bytes: int


@dataclass(frozen=True)
class Needs:
    """Which gradients are wanted."""

    x: bool
    weight: bool
    bias: bool

    def __bool__(self) -> bool:
        return self.x or self.weight or self.bias


def scale_of(dtype: torch.dtype) -> float:
    """The factor on gradients until the end of the backward: float16 would flush them to 0 without it."""
    return FLOAT16_SCALE if dtype == torch.float16 else 1.0


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that unnormalised gradients are kept in: sums over many rows times 2^10 overflow float16."""
    return torch.float32 if dtype == torch.float16 else dtype
