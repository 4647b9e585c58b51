"""Random arguments for benchmark cases, drawn from the case's generator."""

from __future__ import annotations

from typing import Any

import torch

from phi1.kernels import Dropout


class Draw:
    """Draws tensors of one dtype on one device.

    Args:
        device: where they are made; on "meta" they have no values.
        seed: the same seed gives the same values.
        dtype: name of a floating-point dtype, unless integers alone are drawn.
    """

    def __init__(self, device: torch.device, seed: int, dtype: str) -> None:
        self.device, self.dtype = device, getattr(torch, dtype, None)
        self.generator = torch.Generator("cpu" if device.type == "meta" else device).manual_seed(1000 + seed)

    def normal(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        """Normal numbers of mean 0 and deviation `scale`."""
        if self.device.type == "meta":
            return torch.empty(shape, device="meta", dtype=self.dtype)
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

    def dropout(self, samples: int, p: float) -> dict[str, Any]:
        """The inputs that `dropout_of` reads: (seed, step) and the ids of the samples; none if p is 0."""
        return {"rng": torch.tensor([1234, 1], device=self.device),
                "sample_ids": torch.arange(samples, device=self.device)} if p else {}


def dropout_of(inputs: dict[str, Any], p: float, kind: int) -> Dropout | None:
    """The dropout of one kind; None if p is 0."""
    return Dropout(p, inputs["rng"], inputs["sample_ids"], layer=0, kind=kind) if p else None


def with_sample(inputs: dict[str, Any], number: int) -> dict[str, Any]:
    """The inputs with the dropout of one sample alone."""
    return inputs | {name: ids[number : number + 1] for name, ids in inputs.items() if name == "sample_ids"}
