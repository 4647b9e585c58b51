"""layer_norm, add_layer_norm and rotary: operations that memory bounds."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from phi1.bench.harness.case import Case, Function, Inputs, Provider, family
from phi1.bench.harness.inputs import Draw
from phi1.bench.harness.providers import compiled, ours, peer, plain, reference_of
from phi1.bench.peers.rotary import liger_rope, torch_rotary
from phi1.kernels import add_layer_norm, layer_norm, rotary, rotary_

# Read x, write y; weight and bias. Then read x, dy and the statistics, write dx, dw and db.
NORM_COSTS = {
    "forward": ("2*N*D*e + 2*D*e", "8*N*D"),
    "backward": ("3*N*D*e + 3*D*e + 8*N", "14*N*D"),
    "forward+backward": ("5*N*D*e + 5*D*e + 16*N", "22*N*D"),
}
# Read x and residual, write their sum and y. Then read the sum and both gradients, write dx, which is also dresidual.
ADD_NORM_COSTS = {
    "forward": ("4*N*D*e + 2*D*e", "9*N*D"),
    "backward": ("4*N*D*e + 3*D*e + 8*N", "15*N*D"),
    "forward+backward": ("8*N*D*e + 5*D*e + 16*N", "24*N*D"),
}
# Read and write q, k and v; a row of cos and of sin, float32, and a position. The backward is the inverse rotation.
ROTARY_COSTS = {
    "forward": ("6*N*H*K*e + 4*N*R + 8*N", "6*N*H*R"),
    "forward+backward": ("12*N*H*K*e + 8*N*R + 16*N", "12*N*H*R"),
}
# Only the rotated part of q and k is read and written.
IN_PLACE_COSTS = {"forward": ("4*N*H*R*e + 4*N*R + 8*N", "6*N*H*R")}


def cases() -> list[Case]:
    """Every case of these operations."""
    norm = [(16384, 2048, "float16", "cuda"), (16384, 2048, "bfloat16", "cuda"), (16384, 2560, "float16", "cuda"),
            (2048, 2048, "float16", "cuda"), (512, 256, "float32", "cpu")]
    found = [case for shape in norm for case in _layer_norm(*shape)]
    found += [case for shape in (norm[0], norm[1], norm[-1]) for case in _add_layer_norm(*shape)]
    for shape in ((16384, 32, 64, 32, "float16", "cuda"), (256, 4, 64, 32, "float32", "cpu")):
        found += _rotary(*shape)
    return found


def _layer_norm(rows: int, width: int, dtype: str, device: str) -> list[Case]:
    def inputs(draw: Draw) -> Inputs:
        return {"x": draw.normal(rows, width), "weight": 1 + draw.normal(width, scale=0.1), "bias": draw.normal(width)}

    def run(inputs: Inputs) -> torch.Tensor:
        return layer_norm(inputs["x"], inputs["weight"], inputs["bias"])

    def eager(inputs: Inputs) -> torch.Tensor:
        return F.layer_norm(inputs["x"], (width,), inputs["weight"], inputs["bias"])

    return family("layer_norm", {"N": rows, "D": width}, dtype, device, inputs, NORM_COSTS,
                  leaves=("x", "weight", "bias"), reference=reference_of(run), kernels=("layer_norm_", "sum_partials"),
                  providers=(ours(run), plain("torch", eager), *compiled(eager),
                             peer("liger", "liger-kernel", _liger_norm), peer("quack", "quack-kernels", _quack_norm)),
                  quick=dtype != "bfloat16" and rows in (16384, 512) and width != 2560)


def _liger_norm(case: Case) -> Function:
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    return lambda inputs: LigerLayerNormFunction.apply(inputs["x"], inputs["weight"], inputs["bias"], 1e-5)


def _quack_norm(case: Case) -> Function:
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


def _add_layer_norm(rows: int, width: int, dtype: str, device: str) -> list[Case]:
    def inputs(draw: Draw) -> Inputs:
        return {"x": draw.normal(rows, width), "residual": draw.normal(rows, width),
                "weight": 1 + draw.normal(width, scale=0.1), "bias": draw.normal(width)}

    def run(inputs: Inputs) -> Any:
        return add_layer_norm(inputs["x"], inputs["residual"], inputs["weight"], inputs["bias"])

    def eager(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        h = inputs["x"] + inputs["residual"]
        return h, F.layer_norm(h, (width,), inputs["weight"], inputs["bias"])

    return family("add_layer_norm", {"N": rows, "D": width}, dtype, device, inputs, ADD_NORM_COSTS,
                  leaves=("x", "residual", "weight", "bias"), reference=reference_of(run),
                  providers=(ours(run), plain("torch", eager), *compiled(eager)),
                  kernels=("layer_norm_", "sum_partials"), quick=dtype != "bfloat16")


def _rotary(rows: int, heads: int, size: int, rotary_dim: int, dtype: str, device: str) -> list[Case]:
    """rotary, and rotary_, which works in place."""
    def inputs(draw: Draw) -> Inputs:
        tokens = min(rows, 2048)
        cos, sin = draw.tables(tokens, rotary_dim)
        positions = torch.arange(rows, device=draw.device) % tokens
        return {"x": draw.normal(rows, 3, heads, size), "cos": cos, "sin": sin, "positions": positions}

    def run(inputs: Inputs) -> torch.Tensor:
        return rotary(inputs["x"], inputs["cos"], inputs["sin"], inputs["positions"])

    def run_in_place(inputs: Inputs) -> torch.Tensor:
        return rotary_(inputs["x"], inputs["cos"], inputs["sin"], inputs["positions"])

    def eager_in_place(inputs: Inputs) -> torch.Tensor:
        x = inputs["x"]
        x[:, :2, :, :rotary_dim] = torch_rotary({**inputs, "x": x[:, :2, :, :rotary_dim]})
        return x

    def family_of(op: str, costs: Any, **fields: Any) -> list[Case]:
        return family(op, {"N": rows, "H": heads, "K": size, "R": rotary_dim}, dtype, device, inputs, costs,
                      leaves=("x",), kernels=("rotary",), quick=True, **fields)

    return [
        *family_of("rotary", ROTARY_COSTS, reference=reference_of(run),
                   providers=(ours(run), plain("torch", torch_rotary), *compiled(torch_rotary),
                              peer("liger", "liger-kernel", liger_rope))),
        *family_of("rotary_", IN_PLACE_COSTS, reference=reference_of(run),
                   providers=(Provider("phi1", _on_a_copy(run_in_place), package="phi1"),
                              Provider("torch", _on_a_copy(eager_in_place))),
                   asked=lambda function, inputs: function({**inputs, "x": inputs["x"].clone()})),
    ]


def _on_a_copy(function: Function) -> Any:
    """A preparation whose function writes into a copy of x, kept for each x: rotated at first, then further."""
    def prepare(case: Case, device: torch.device) -> Function:
        own: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

        def run(inputs: Inputs) -> torch.Tensor:
            x = inputs["x"]
            if x.data_ptr() not in own:
                own[x.data_ptr()] = x, x.clone()  # x too, or another tensor could get its address
            return function({**inputs, "x": own[x.data_ptr()][1]})

        return run

    return prepare
