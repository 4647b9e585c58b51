"""layer_norm, add_layer_norm and rotary: operations that memory bounds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from phi1.bench.harness.case import Case, Function, Inputs, Prepare, Provider, family
from phi1.bench.harness.inputs import Draw
from phi1.bench.harness.providers import compiled, ours, ours_prepared, peer, plain, reference_of
from phi1.bench.peers.pointwise import liger_layer_norm, liger_rope, quack_norm, torch_rotary
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
    found = [case for shape in norm for case in _norm(layer_norm, *shape)]
    found += [case for shape in (norm[0], norm[1], norm[-1]) for case in _norm(add_layer_norm, *shape)]
    for shape in ((16384, 32, 64, 32, "float16", "cuda"), (256, 4, 64, 32, "float32", "cpu")):
        found += _rotary(*shape)
    return found


def _norm(op: Callable[..., Any], rows: int, width: int, dtype: str, device: str) -> list[Case]:
    """layer_norm, or add_layer_norm, which liger and quack do not have."""
    adds = op is add_layer_norm
    residual = ("residual",) * adds

    def inputs(draw: Draw) -> Inputs:
        return {**{name: draw.normal(rows, width) for name in ("x", *residual)},
                "weight": 1 + draw.normal(width, scale=0.1), "bias": draw.normal(width)}

    def eager(inputs: Inputs) -> Any:
        h = inputs["x"] + inputs["residual"] if adds else inputs["x"]
        y = F.layer_norm(h, (width,), inputs["weight"], inputs["bias"])
        return (h, y) if adds else y

    def liger(case: Case) -> Function:
        norm = liger_layer_norm()
        return lambda inputs: norm(inputs["x"], (width,), inputs["weight"], inputs["bias"])

    def run(inputs: Inputs) -> Any:
        return op(**inputs)

    others = () if adds else (peer("liger", "liger-kernel", liger), peer("quack", "quack-kernels", quack_norm))
    return family("add_layer_norm" if adds else "layer_norm", {"N": rows, "D": width}, dtype, device, inputs,
                  ADD_NORM_COSTS if adds else NORM_COSTS, leaves=("x", *residual, "weight", "bias"),
                  reference=reference_of(run),
                  providers=(ours(run), plain("torch", eager), *compiled(eager), *others),
                  quick=dtype != "bfloat16" and rows in (16384, 512) and width != 2560)


def _rotary(rows: int, heads: int, size: int, rotary_dim: int, dtype: str, device: str) -> list[Case]:
    """rotary, and rotary_, which works in place."""
    def inputs(draw: Draw) -> Inputs:
        tokens = min(rows, 2048)
        cos, sin = draw.tables(tokens, rotary_dim)
        positions = torch.arange(rows, device=draw.device) % tokens
        return {"x": draw.normal(rows, 3, heads, size), "cos": cos, "sin": sin, "positions": positions}

    def run(inputs: Inputs) -> torch.Tensor:
        return rotary(**inputs)

    def eager(inputs: Inputs) -> torch.Tensor:
        return torch_rotary(**inputs)

    def eager_in_place(inputs: Inputs) -> torch.Tensor:
        x = inputs["x"]
        x[:, :2, :, :rotary_dim] = eager(inputs | {"x": x[:, :2, :, :rotary_dim]})
        return x

    def family_of(op: str, costs: Any, **fields: Any) -> list[Case]:
        return family(op, {"N": rows, "H": heads, "K": size, "R": rotary_dim}, dtype, device, inputs, costs,
                      leaves=("x",), quick=True, **fields)

    return [
        *family_of("rotary", ROTARY_COSTS, reference=reference_of(run),
                   providers=(ours(run), plain("torch", eager), *compiled(eager),
                              peer("liger", "liger-kernel", liger_rope))),
        *family_of("rotary_", IN_PLACE_COSTS, reference=reference_of(run),
                   providers=(ours_prepared(_on_a_copy(lambda inputs: rotary_(**inputs))),
                              Provider("torch", _on_a_copy(eager_in_place))),
                   asked=lambda function, inputs: function(inputs | {"x": inputs["x"].clone()})),
    ]


def _on_a_copy(function: Function) -> Prepare:
    """A preparation whose function writes into a copy of x, kept for each x: rotated at first, then further."""
    def prepare(case: Case, device: torch.device) -> Function:
        own: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

        def run(inputs: Inputs) -> torch.Tensor:
            x = inputs["x"]
            if x.data_ptr() not in own:
                own[x.data_ptr()] = x, x.clone()  # x too, or another tensor could get its address
            return function(inputs | {"x": own[x.data_ptr()][1]})

        return run

    return prepare
