"""Small inputs for every operation that has a backward: the table behind the tests of what holds for all operations.

D width, F MLP width, V vocabulary, H heads, K head size, R elements of a head that rotary turns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from kernel_checks import Operation, block_inputs, rotary_tables

from phi1 import kernels
from phi1.kernels import Dropout
from phi1.kernels.attention.attention import attention_reference
from phi1.kernels.attention.attention_qkv import attention_qkv_reference
from phi1.kernels.block.parallel_block import parallel_block_reference
from phi1.kernels.cross_entropy.linear_cross_entropy import linear_cross_entropy_reference
from phi1.kernels.gemm.linear import linear_reference
from phi1.kernels.gemm.mlp import mlp_reference
from phi1.kernels.pointwise.dropout import dropout_add_reference
from phi1.kernels.pointwise.gelu import gelu_reference
from phi1.kernels.pointwise.layer_norm import add_layer_norm_reference, layer_norm_reference
from phi1.kernels.pointwise.rotary import rotary_reference

D, F, V, H, K, R = 32, 48, 40, 2, 16, 8
BATCH = 2


@dataclass(frozen=True)
class Case:
    """One call of an operation.

    Args:
        operation: called with the tensors and the options as keywords, as the reference is.
        tensors: the arguments with a gradient; the dtype and the device of the first are those of the operation.
        options: the other arguments.
        roundings: of the tolerance rule.
    """

    operation: Operation
    reference: Operation
    tensors: dict[str, torch.Tensor]
    options: dict[str, Any]
    roundings: float


def case(name: str, device: str = "cpu", dtype: torch.dtype = torch.float32, rows: int = 6) -> Case:
    """The row of that name, drawn for so many rows, an even number; attention and the block have BATCH samples."""
    reference, shapes, options, roundings = _ROWS[name]
    if reference is parallel_block_reference:
        tensors = block_inputs((BATCH, rows // BATCH, D, H, F), dtype, device)
    else:
        generator = torch.Generator().manual_seed(0)
        tensors = {argument: (torch.randn(shape, generator=generator) / (D**0.5 if argument in ("weight", "w1", "w2")
                                                                         else 1)).to(device, dtype)
                   for argument, shape in shapes(rows).items()}
    operation = getattr(kernels, name.split(",")[0])
    if reference is linear_cross_entropy_reference:
        operation, reference = _rounded(operation), _rounded(reference)
    return Case(operation, reference, tensors, options(rows, device), roundings)


def _rounded(loss: Operation) -> Operation:
    """The loss in the dtype of x: its logits are rounded to that, and the tolerance rule counts such roundings."""
    return lambda **arguments: loss(**arguments).to(arguments["x"].dtype)


def _norm(rows: int) -> dict[str, tuple[int, ...]]:
    return {"x": (rows, D), "weight": (D,), "bias": (D,)}


def _add_norm(rows: int) -> dict[str, tuple[int, ...]]:
    return {"x": (rows, D), "residual": (rows, D), "weight": (D,), "bias": (D,)}


def _linear(rows: int) -> dict[str, tuple[int, ...]]:
    return {"x": (rows, D), "weight": (F, D), "bias": (F,), "residual": (rows, F)}


def _mlp(rows: int) -> dict[str, tuple[int, ...]]:
    return {"x": (rows, D), "w1": (F, D), "b1": (F,), "w2": (D, F), "b2": (D,)}


def _loss(rows: int) -> dict[str, tuple[int, ...]]:
    return {"x": (rows, D), "weight": (V, D), "bias": (V,)}


def _heads(rows: int) -> dict[str, tuple[int, ...]]:
    return dict.fromkeys("qkv", (BATCH, rows // BATCH, H, K))


def masks(device: str) -> tuple[Dropout, Dropout, Dropout]:
    """The three dropouts of a layer, for two samples."""
    rng, samples = torch.tensor([5, 7], device=device), torch.tensor([9, 4], device=device)
    first, second, third = (Dropout(0.3, rng, samples, layer=2, kind=kind) for kind in range(3))
    return first, second, third


def _tables(device: str) -> dict[str, torch.Tensor]:
    return dict(zip(("cos", "sin"), rotary_tables(R, device=device), strict=True))


def _none(rows: int, device: str) -> dict[str, Any]:
    return {}


def _dropped(rows: int, device: str) -> dict[str, Any]:
    return {"dropout": masks(device)[0]}


def _documents(rows: int, device: str) -> dict[str, Any]:
    return {"cu_seqlens": torch.tensor([0, rows // 3, rows], dtype=torch.int32, device=device)}


def _targets(rows: int, device: str) -> dict[str, Any]:
    return {"targets": (torch.arange(rows) * 7 % V).to(device)}


_ROWS: dict[str, tuple[Any, ...]] = {  # reference, shapes, options, roundings
    "layer_norm": (layer_norm_reference, _norm, _none, 2),
    "add_layer_norm": (add_layer_norm_reference, _add_norm, _none, 2),
    "rotary": (rotary_reference, lambda rows: {"x": (rows, 3, H, K)},
               lambda rows, device: _tables(device) | {"positions": (torch.arange(rows) * 37 % 150).to(device)}, 2),
    "gelu": (gelu_reference, lambda rows: {"x": (rows, F)}, _none, 2),
    "dropout_add": (dropout_add_reference, lambda rows: {"x": (rows, D), "residual": (rows, D)}, _dropped, 2),
    "linear": (linear_reference, _linear,
               lambda rows, device: {"activation": "gelu_new", "dropout": masks(device)[1]}, 2),
    "linear, plain": (linear_reference, _linear, _none, 2),
    "mlp": (mlp_reference, _mlp, _none, 2),
    "linear_cross_entropy": (linear_cross_entropy_reference, _loss, _targets, 8),
    "linear_cross_entropy, losses": (linear_cross_entropy_reference, _loss,
                                     lambda *a: _targets(*a) | {"reduction": "none"}, 8),
    "attention": (attention_reference, _heads, _none, 4),
    "attention, dropped": (attention_reference, _heads, _dropped, 4),
    "attention, documents": (attention_reference, _heads, _documents, 4),
    "attention_qkv": (attention_qkv_reference, lambda rows: {"qkv": (rows, 3, H, K)},
                      lambda rows, device: {"batch": BATCH, "rotary": tuple(_tables(device).values())}, 4),
    "attention_qkv, documents": (attention_qkv_reference, lambda rows: {"qkv": (rows, 3, H, K)}, _documents, 4),
    "parallel_block": (parallel_block_reference, None,
                       lambda rows, device: _tables(device) | {"n_heads": H, "batch": BATCH}, 8),
    "parallel_block, dropped": (parallel_block_reference, None, lambda rows, device: _tables(device) | {
        "n_heads": H, "batch": BATCH, "dropouts": masks(device)}, 8),
}
CASES = tuple(_ROWS)
