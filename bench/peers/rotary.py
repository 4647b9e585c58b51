"""Partial rotary embedding in plain PyTorch, by itself and inside of compositions."""

from __future__ import annotations

import torch

from phi1.bench.harness.case import Inputs


def torch_rotary(inputs: Inputs) -> torch.Tensor:
    """Rotate q and k of x [N, 3, H, K] in halves, in float32 as transformers does it; v stays as it is."""
    x, positions = inputs["x"], inputs["positions"]
    half = inputs["cos"].shape[1]
    cos, sin = (inputs[name][positions][:, None, None] for name in ("cos", "sin"))
    a, b = x[:, :2, :, :half].float(), x[:, :2, :, half : 2 * half].float()
    turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
    return torch.cat((torch.cat((turned, x[:, :2, :, 2 * half :]), dim=-1), x[:, 2:]), dim=1)
