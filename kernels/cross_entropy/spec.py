"""The options of the loss that both backends take, and the form in which gradients are kept until the backward ends."""

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
    """The gradients that are needed."""

    x: bool
    weight: bool
    bias: bool

    def __bool__(self) -> bool:
        return self.x or self.weight or self.bias


def scale_of(dtype: torch.dtype) -> float:
    """Return the factor on gradients until the backward ends. Without it float16 would flush them to 0."""
    return FLOAT16_SCALE if dtype == torch.float16 else 1.0


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of unnormalised gradients: float32 for float16, which sums of many rows times 2^10 overflow."""
    return torch.float32 if dtype == torch.float16 else dtype
