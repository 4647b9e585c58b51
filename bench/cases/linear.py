"""linear with its epilogues, mlp, gelu and dropout_add, at phi-1's projections. cuBLAS is torch's own product."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from phi1.bench.harness.case import Case, Function, Inputs, family
from phi1.bench.harness.inputs import Draw, dropout_of
from phi1.bench.harness.providers import compiled, ours, plain, reference_of
from phi1.kernels import dropout_add, gelu, linear, mlp

# x [N, K] W [M, K]. Read x, W and the residual, write y; then read dy, x and W (and the saved pre-activation), write dx
# and dW. The letter A is 1 where there is an activation, U is 1 where there is a residual.
FORWARD = ("(N*K + M*K + M + N*M*(1 + U))*e", "2*N*M*K")
BACKWARD = ("(2*N*K + 2*M*K + M + N*M*(1 + A))*e", "4*N*M*K")
LINEAR_COSTS = {"forward": FORWARD, "backward": BACKWARD,
                "forward+backward": (f"{FORWARD[0]} + {BACKWARD[0]} + A*N*M*e", "6*N*M*K")}
# x [N, D], F inside; gelu's input is saved for the backward.
MLP_COSTS = {"forward": ("(2*N*D + 2*D*F + D + F)*e", "4*N*D*F"),
             "forward+backward": ("(5*N*D + 6*D*F + 2*D + 2*F + 2*N*F)*e", "12*N*D*F")}
GELU_COSTS = {"forward": ("2*N*F*e", "10*N*F"), "forward+backward": ("5*N*F*e", "30*N*F")}
DROPOUT_COSTS = {"forward": ("3*N*D*e", "3*N*D"), "forward+backward": ("5*N*D*e", "5*N*D")}


def cases() -> list[Case]:
    """Every case of these operations."""
    found: list[Case] = []
    for dtype in ("float16", "bfloat16"):
        found += _linear(16384, 2048, 8192, dtype, activation="gelu_new", quick=dtype == "float16")
    found += _linear(16384, 2048, 14336, "float16") + _linear(16384, 8192, 2048, "float16", residual=True)
    found += _linear(16384, 10240, 2048, "float16", residual=True)
    found += _linear(16384, 8192, 2048, "float16", residual=True, p=0.1)
    found += _linear(256, 256, 1024, "float32", "cpu", activation="gelu_new", quick=True)
    found += _linear(256, 1024, 256, "float32", "cpu", residual=True)
    found += _mlp(16384, 2048, 8192, "float16", "cuda") + _mlp(256, 256, 1024, "float32", "cpu")
    found += _gelu(16384, 8192, "float16", "cuda") + _gelu(256, 1024, "float32", "cpu")
    return found + _dropout_add(8, 2048, 2048, "float16", "cuda") + _dropout_add(2, 128, 256, "float32", "cpu")


def _linear(rows: int, columns: int, outputs: int, dtype: str, device: str = "cuda", *, activation: str | None = None,
            residual: bool = False, p: float = 0.0, quick: bool = False) -> list[Case]:
    shape: dict[str, Any] = {"N": rows, "K": columns, "M": outputs, "A": int(activation is not None),
                             "U": int(residual)}
    shape |= {"dropout": p} if p else {}

    def inputs(draw: Draw) -> Inputs:
        return {"x": draw.normal(rows, columns), "weight": draw.weight(outputs, columns), "bias": draw.normal(outputs),
                "residual": draw.normal(rows, outputs) if residual else None, **draw.dropout(8, p)}

    def run(inputs: Inputs) -> torch.Tensor:
        return linear(inputs["x"], inputs["weight"], inputs["bias"], activation=activation,
                      residual=inputs["residual"], dropout=dropout_of(inputs, p, 2))

    def eager(inputs: Inputs) -> torch.Tensor:
        y = F.linear(inputs["x"], inputs["weight"], inputs["bias"])
        y = F.gelu(y, approximate="tanh") if activation else y
        y = F.dropout(y, p) if p else y
        return y if inputs["residual"] is None else y + inputs["residual"]

    costs = {name: cost for name, cost in LINEAR_COSTS.items() if name != "backward" or columns == 2048}
    return _family("linear", shape, dtype, device, inputs, costs, run, eager, ("x", "weight", "bias", "residual"), p,
                   quick)


def _family(op: str, shape: dict[str, Any], dtype: str, device: str, inputs: Callable[[Draw], Inputs],
            costs: dict[str, tuple[str, str]], run: Function, eager: Function, leaves: tuple[str, ...], p: float = 0.0,
            quick: bool = True) -> list[Case]:
    same = {"comparable": not p}  # PyTorch's dropout draws its own masks
    return family(op, shape, dtype, device, inputs, costs, leaves=leaves, reference=reference_of(run),
                  providers=(ours(run), plain("torch", eager, **same), *compiled(eager, **same)), quick=quick)


def _mlp(rows: int, width: int, inner: int, dtype: str, device: str) -> list[Case]:
    def inputs(draw: Draw) -> Inputs:
        return {"x": draw.normal(rows, width), "w1": draw.weight(inner, width), "b1": draw.normal(inner),
                "w2": draw.weight(width, inner), "b2": draw.normal(width)}

    def eager(inputs: Inputs) -> torch.Tensor:
        inside = F.gelu(F.linear(inputs["x"], inputs["w1"], inputs["b1"]), approximate="tanh")
        return F.linear(inside, inputs["w2"], inputs["b2"])

    return _family("mlp", {"N": rows, "D": width, "F": inner}, dtype, device, inputs, MLP_COSTS,
                   lambda inputs: mlp(**inputs), eager, ("x", "w1", "b1", "w2", "b2"))


def _gelu(rows: int, inner: int, dtype: str, device: str) -> list[Case]:
    return _family("gelu", {"N": rows, "F": inner}, dtype, device, lambda draw: {"x": draw.normal(rows, inner)},
                   GELU_COSTS, lambda inputs: gelu(inputs["x"]),
                   lambda inputs: F.gelu(inputs["x"], approximate="tanh"), ("x",))


def _dropout_add(batch: int, tokens: int, width: int, dtype: str, device: str) -> list[Case]:
    rows, p = batch * tokens, 0.1

    def inputs(draw: Draw) -> Inputs:
        return {"x": draw.normal(rows, width), "residual": draw.normal(rows, width), **draw.dropout(batch, p)}

    def run(inputs: Inputs) -> torch.Tensor:
        return dropout_add(inputs["x"], inputs["residual"], dropout_of(inputs, p, 2))

    return _family("dropout_add", {"N": rows, "D": width, "dropout": p}, dtype, device, inputs, DROPOUT_COSTS, run,
                   lambda inputs: inputs["residual"] + F.dropout(inputs["x"], p), ("x", "residual"), p)
