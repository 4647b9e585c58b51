"""Random arguments for benchmark cases: standard normal unless it says otherwise, drawn from the case's generator."""

from __future__ import annotations

import torch


class Draw:
    """Draws tensors of one dtype on one device.

    Args:
        device: where they are made.
        generator: of that device; the same state gives the same values.
        dtype: name of a floating-point dtype.
    """

    def __init__(self, device: torch.device, generator: torch.Generator, dtype: str) -> None:
        self.device, self.generator, self.dtype = device, generator, getattr(torch, dtype)

    def normal(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        """A tensor of N(0, scale^2)."""
        values = torch.randn(shape, device=self.device, generator=self.generator, dtype=torch.float32)
        return (values * scale).to(self.dtype)

    def weight(self, rows: int, columns: int) -> torch.Tensor:
        """A matrix [rows, columns] whose products with standard normal rows are standard normal."""
        return self.normal(rows, columns, scale=columns**-0.5)

    def integers(self, high: int, *shape: int) -> torch.Tensor:
        """int64, from 0 to high - 1."""
        return torch.randint(high, shape, device=self.device, generator=self.generator)

    def tables(self, tokens: int, rotary_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [T, R/2] of rotary angles, float32."""
        frequency = 10000.0 ** (-torch.arange(rotary_dim // 2, device=self.device) * 2 / rotary_dim)
        angle = torch.outer(torch.arange(tokens, device=self.device), frequency)
        return angle.cos(), angle.sin()

    def rng(self) -> torch.Tensor:
        """(seed, step) of counter-based dropout, int64 [2]."""
        return torch.tensor([1234, 1], device=self.device)
