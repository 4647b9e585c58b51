"""Layer norm and partial rotary embedding: plain PyTorch, liger, quack."""

from __future__ import annotations

from collections.abc import Callable

import torch

from phi1.bench.harness.case import Case, Function, Inputs


def torch_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Rotate q and k of x [N, 3, H, K] in halves, in float32 as transformers does it; v stays as it is."""
    half = cos.shape[1]
    cos, sin = (table[positions][:, None, None] for table in (cos, sin))
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


def liger_layer_norm() -> Callable[..., torch.Tensor]:
    """liger's layer norm, with the arguments of PyTorch's."""
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    return lambda x, shape, weight, bias: LigerLayerNormFunction.apply(x, weight, bias, 1e-5)


def quack_norm(case: Case) -> Function:
    """quack's two kernels behind one autograd function. Their float32 parameters are cast outside of the timing."""
    from quack.rmsnorm import layernorm_bwd, layernorm_fwd

    class QuackNorm(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight, bias, wide_weight, wide_bias):
            y, rstd, mean = layernorm_fwd(x, wide_weight, wide_bias, 1e-5, return_rstd=True, return_mean=True)
            ctx.save_for_backward(x, wide_weight, rstd, mean)
            return y

        @staticmethod
        def backward(ctx, dy):
            x, wide_weight, rstd, mean = ctx.saved_tensors
            dx, dw, db = layernorm_bwd(x, wide_weight, dy, rstd, mean)
            return dx, dw.to(x.dtype), db.to(x.dtype), None, None

    wide: dict[int, tuple[torch.Tensor, ...]] = {}

    def run(inputs: Inputs) -> torch.Tensor:
        weight, bias = inputs["weight"], inputs["bias"]
        if weight.data_ptr() not in wide:
            wide[weight.data_ptr()] = weight.detach().float(), bias.detach().float()
        return QuackNorm.apply(inputs["x"], weight, bias, *wide[weight.data_ptr()])

    return run
