"""layer_norm, add_layer_norm and rotary: operations that memory bounds."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from phi1.bench.harness.case import Case, Function, Inputs, Provider, variants
from phi1.bench.harness.inputs import Draw
from phi1.bench.harness.providers import compiled, ours, peer, plain, reference_of
from phi1.bench.peers.rotary import torch_rotary
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
# Only what is rotated of q and k is read and written.
IN_PLACE_COSTS = {"forward": ("4*N*H*R*e + 4*N*R + 8*N", "6*N*H*R")}


def cases() -> list[Case]:
    """Every case of these operations."""
    norm = [(16384, 2048, "float16", "cuda"), (16384, 2048, "bfloat16", "cuda"), (16384, 2560, "float16", "cuda"),
            (2048, 2048, "float16", "cuda"), (512, 256, "float32", "cpu")]
    found = [case for shape in norm for case in _layer_norm(*shape)]
    found += [case for shape in (norm[0], norm[1], norm[-1]) for case in _add_layer_norm(*shape)]
    for shape in ((16384, 32, 64, 32, "float16", "cuda"), (256, 4, 64, 32, "float32", "cpu")):
        found += _rotary(*shape) + _rotary_in_place(*shape)
    return found


def _layer_norm(rows: int, width: int, dtype: str, device: str) -> list[Case]:
    def inputs(on: torch.device, generator: torch.Generator) -> Inputs:
        draw = Draw(on, generator, dtype)
        return {"x": draw.normal(rows, width), "weight": 1 + draw.normal(width, scale=0.1), "bias": draw.normal(width)}

    ours_function = _from("x", "weight", "bias", layer_norm)
    return variants(Case(
        name="", op="layer_norm", unit="kernel", direction="forward", shape={"N": rows, "D": width}, dtype=dtype,
        devices=(device,), bytes="0", flops="0", inputs=inputs, leaves=("x", "weight", "bias"),
        providers=(ours(ours_function), plain("torch", _torch_norm), *compiled(_torch_norm),
                   peer("liger", "liger-kernel", _liger_norm), peer("quack", "quack-kernels", _quack_norm)),
        reference=reference_of(ours_function), kernels=("layer_norm_", "sum_partials"),
        quick=dtype != "bfloat16" and rows in (16384, 512) and width != 2560,
    ), NORM_COSTS)


def _from(*names_and_op: Any) -> Function:
    *names, op = names_and_op
    return lambda inputs: op(*(inputs[name] for name in names))


def _torch_norm(inputs: Inputs) -> torch.Tensor:
    return F.layer_norm(inputs["x"], inputs["weight"].shape, inputs["weight"], inputs["bias"])


def _liger_norm(case: Case) -> Function:
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    return lambda inputs: LigerLayerNormFunction.apply(inputs["x"], inputs["weight"], inputs["bias"], 1e-5)


def _quack_norm(case: Case) -> Function:
    """Its two kernels behind one autograd function; it takes float32 parameters, which are cast outside the timing."""
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
    def inputs(on: torch.device, generator: torch.Generator) -> Inputs:
        draw = Draw(on, generator, dtype)
        return {"x": draw.normal(rows, width), "residual": draw.normal(rows, width),
                "weight": 1 + draw.normal(width, scale=0.1), "bias": draw.normal(width)}

    ours_function = _from("x", "residual", "weight", "bias", add_layer_norm)
    return variants(Case(
        name="", op="add_layer_norm", unit="kernel", direction="forward", shape={"N": rows, "D": width}, dtype=dtype,
        devices=(device,), bytes="0", flops="0", inputs=inputs, leaves=("x", "residual", "weight", "bias"),
        providers=(ours(ours_function), plain("torch", _torch_add_norm), *compiled(_torch_add_norm)),
        reference=reference_of(ours_function), kernels=("layer_norm_", "sum_partials"), quick=dtype != "bfloat16",
    ), ADD_NORM_COSTS)


def _torch_add_norm(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    h = inputs["x"] + inputs["residual"]
    return h, F.layer_norm(h, inputs["weight"].shape, inputs["weight"], inputs["bias"])


def _rotary(rows: int, heads: int, size: int, rotary_dim: int, dtype: str, device: str) -> list[Case]:
    ours_function = _from("x", "cos", "sin", "positions", rotary)
    liger: tuple[Provider, ...] = (peer("liger", "liger-kernel", _liger_rope),)
    return variants(Case(
        name="", op="rotary", unit="kernel", direction="forward",
        shape={"N": rows, "H": heads, "K": size, "R": rotary_dim}, dtype=dtype, devices=(device,), bytes="0", flops="0",
        inputs=_rotary_inputs(rows, heads, size, rotary_dim, dtype), leaves=("x",),
        providers=(ours(ours_function), plain("torch", torch_rotary), *compiled(torch_rotary), *liger),
        reference=reference_of(ours_function), kernels=("rotary",), quick=True,
    ), ROTARY_COSTS)


def _rotary_inputs(rows: int, heads: int, size: int, rotary_dim: int, dtype: str) -> Any:
    def inputs(on: torch.device, generator: torch.Generator) -> Inputs:
        draw = Draw(on, generator, dtype)
        tokens = min(rows, 2048)
        cos, sin = draw.tables(tokens, rotary_dim)
        positions = torch.arange(rows, device=on) % tokens
        return {"x": draw.normal(rows, 3, heads, size), "cos": cos, "sin": sin, "positions": positions}

    return inputs


def _rotary_in_place(rows: int, heads: int, size: int, rotary_dim: int, dtype: str, device: str) -> list[Case]:
    def theirs(inputs: Inputs) -> torch.Tensor:
        x, half = inputs["x"], inputs["cos"].shape[1]
        x[:, :2, :, : 2 * half] = torch_rotary({**inputs, "x": x[:, :2, :, : 2 * half]})
        return x

    in_place = (_on_a_copy(_from("x", "cos", "sin", "positions", rotary_)), _on_a_copy(theirs))
    return variants(Case(
        name="", op="rotary_", unit="kernel", direction="forward",
        shape={"N": rows, "H": heads, "K": size, "R": rotary_dim}, dtype=dtype, devices=(device,), bytes="0", flops="0",
        inputs=_rotary_inputs(rows, heads, size, rotary_dim, dtype), leaves=("x",),
        providers=(Provider("phi1", in_place[0], package="phi1"), Provider("torch", in_place[1])),
        reference=reference_of(_from("x", "cos", "sin", "positions", rotary)), kernels=("rotary",), quick=True,
        asked=lambda function, inputs: function({**inputs, "x": inputs["x"].clone()}),
    ), IN_PLACE_COSTS)


def _on_a_copy(function: Function) -> Any:
    """Writes into a copy of x that the provider keeps for each x: rotated once at first, then further."""
    def prepare(case: Case, device: torch.device) -> Function:
        own: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

        def run(inputs: Inputs) -> torch.Tensor:
            x = inputs["x"]
            if x.data_ptr() not in own:
                own[x.data_ptr()] = x, x.clone()  # x too, or another one might come to lie where it lay
            return function({**inputs, "x": own[x.data_ptr()][1]})

        return run

    return prepare


def _liger_rope(case: Case) -> Function:
    """It rotates as many leading dimensions of a head as cos and sin are wide."""
    from liger_kernel.ops.rope import LigerRopeFunction

    def run(inputs: Inputs) -> torch.Tensor:
        x, positions = inputs["x"], inputs["positions"]
        cos, sin = (torch.cat((table, table), dim=-1)[positions][None] for table in (inputs["cos"], inputs["sin"]))
        q, k = (x[None, :, i].transpose(1, 2) for i in (0, 1))  # [1, H, N, K]
        q, k = (y.transpose(1, 2)[0] for y in LigerRopeFunction.apply(q, k, cos, sin))
        return torch.stack((q, k, x[:, 2]), dim=1)

    return run
