"""Partial rotary embedding: plain PyTorch, also inside of compositions, and liger."""

from __future__ import annotations

import torch

from phi1.bench.harness.case import Case, Function, Inputs


def torch_rotary(inputs: Inputs) -> torch.Tensor:
    """Rotate q and k of x [N, 3, H, K] in halves, in float32 as transformers does it; v stays as it is."""
    x, positions = inputs["x"], inputs["positions"]
    half = inputs["cos"].shape[1]
    cos, sin = (inputs[name][positions][:, None, None] for name in ("cos", "sin"))
    a, b = x[:, :2, :, :half].float(), x[:, :2, :, half : 2 * half].float()
    turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
    return torch.cat((torch.cat((turned, x[:, :2, :, 2 * half :]), dim=-1), x[:, 2:]), dim=1)


def liger_rope(case: Case) -> Function:
    """liger's rotary, which rotates as many leading dimensions of a head as cos and sin are wide."""
    from liger_kernel.ops.rope import LigerRopeFunction

    def run(inputs: Inputs) -> torch.Tensor:
        x, positions = inputs["x"], inputs["positions"]
        cos, sin = (torch.cat((table, table), dim=-1)[positions][None] for table in (inputs["cos"], inputs["sin"]))
        q, k = (x[None, :, i].transpose(1, 2) for i in (0, 1))  # [1, H, N, K]
        q, k = (y.transpose(1, 2)[0] for y in LigerRopeFunction.apply(q, k, cos, sin))
        return torch.stack((q, k, x[:, 2]), dim=1)

    return run
