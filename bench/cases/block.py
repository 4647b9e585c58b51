"""One whole parallel block: phi1, transformers' layer, and compositions of the best parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from phi1.bench.harness.case import BOTH, Case, Function, Inputs, Prepare, Provider, family
from phi1.bench.harness.inputs import Draw, dropout_of, with_sample
from phi1.bench.harness.providers import MAX_AUTOTUNE, ours, part_of_reference, peer, plain, reference_of
from phi1.bench.peers.attention import BACKENDS, Attend, forced, sdpa
from phi1.bench.peers.hf_transformers import decoder_layer
from phi1.bench.peers.pointwise import liger_layer_norm, torch_rotary
from phi1.kernels import parallel_block, parallel_block_decode, parallel_block_prefill

NAMES = ("norm_weight", "norm_bias", "in_weight", "in_bias", "out_weight", "out_bias")
# Weights of 4 D^2 + 2 D F, read; their gradients, written. Between: x in and out; saved and read again are x, qkv, att
# and pre. Scores are half of T^2 a head.
WEIGHTS = "(4*D*D + 2*D*F)*e"
COSTS = {
    "forward": (f"2*N*D*e + {WEIGHTS}", "2*N*(4*D*D + 2*D*F) + 2*N*T*D"),
    "forward+backward": (f"3*{WEIGHTS} + (14*D + 2*F)*N*e", "6*N*(4*D*D + 2*D*F) + 7*N*T*D"),
}


def cases() -> list[Case]:
    """Every case of this unit."""
    found = _block(8, 2048, 2048, 8192, 32, quick=True) + _block(8, 2048, 2048, 8192, 32, p=0.1)
    found += _block(2, 8192, 2048, 8192, 32) + _block(8, 2048, 2048, 8192, 32, dtype="bfloat16")
    small = small_block()
    return [*found, *small, _prefill(found[0], 8), _prefill(small[0], 2),
            *_decode(1, 2048, 2048, 8192, 32, quick=True), *_decode(8, 512, 2048, 8192, 32),
            *_decode(1, 128, 256, 1024, 4, dtype="float32", device="cpu", quick=True)]


def small_block(p: float = 0.0) -> list[Case]:
    """The block at a CPU's shape. With dropout it is in no table."""
    return _block(2, 128, 256, 1024, 4, p=p, dtype="float32", device="cpu", quick=True)


def _prefill(forward: Case, batch: int) -> Case:
    """The forward that also writes keys and values; its peers write none."""
    def run(inputs: Inputs) -> torch.Tensor:
        return parallel_block_prefill(inputs["x"], *_given(inputs), n_heads=forward.shape["H"], batch=batch)[0]

    return replace(forward, name=forward.name.replace(forward.op, "parallel_block_prefill"),
                   op="parallel_block_prefill", bytes=f"{forward.bytes} + 2*N*D*e",
                   providers=(ours(run), *forward.providers[1:]))


def _given(inputs: Inputs, *more: str) -> list[Any]:
    return [inputs[name] for name in (*NAMES, "cos", "sin", *more)]


def _block(batch: int, tokens: int, width: int, inner: int, heads: int, *, p: float = 0.0, dtype: str = "float16",
           device: str = "cuda", quick: bool = False) -> list[Case]:
    shape = {"N": batch * tokens, "T": tokens, "D": width, "F": inner, "H": heads} | ({"dropout": p} if p else {})

    def inputs(draw: Draw) -> Inputs:
        return {"x": draw.normal(batch * tokens, width), **_parameters(draw, tokens, width, inner, heads),
                **draw.dropout(batch, p)}

    def block(inputs: Inputs, x: torch.Tensor, batch: int) -> torch.Tensor:
        dropouts: Any = tuple(dropout_of(inputs, p, kind) for kind in range(3))
        return parallel_block(x, *_given(inputs), n_heads=heads, batch=batch, dropouts=dropouts)

    def run(inputs: Inputs) -> torch.Tensor:
        return block(inputs, inputs["x"], batch)

    part = part_of_reference(lambda inputs, x: block(inputs, x, 1))

    def by_sample(inputs: Inputs) -> torch.Tensor:
        return torch.cat([part(with_sample(inputs, sample), x)
                          for sample, x in enumerate(inputs["x"].split(tokens))])

    return family("parallel_block", shape, dtype, device, inputs, COSTS, unit="block", leaves=("x", *NAMES),
                  providers=(ours(run), *_peers(batch, heads, p)), reference=by_sample, quick=quick)


def _parameters(draw: Draw, tokens: int, width: int, inner: int, heads: int) -> Inputs:
    cos, sin = draw.tables(tokens, width // heads // 2)
    return {"norm_weight": 1 + draw.normal(width, scale=0.1), "norm_bias": draw.normal(width, scale=0.1),
            "in_weight": draw.weight(3 * width + inner, width), "in_bias": draw.normal(3 * width + inner, scale=0.1),
            "out_weight": draw.weight(width, width + inner), "out_bias": draw.normal(2, width, scale=0.1),
            "cos": cos, "sin": sin}


def _decode(batch: int, tokens: int, width: int, inner: int, heads: int, *, dtype: str = "float16",
            device: str = "cuda", quick: bool = False) -> list[Case]:
    """One token of each sequence behind tokens - 1 cached ones; each call writes its own keys and values again."""
    def inputs(draw: Draw) -> Inputs:
        return {"x": draw.normal(batch, width), **_parameters(draw, tokens, width, inner, heads),
                "kv": draw.normal(2, batch, tokens, heads, width // heads)}

    def run(inputs: Inputs) -> torch.Tensor:
        return parallel_block_decode(inputs["x"], *_given(inputs, "kv"))

    return family("parallel_block_decode", {"N": batch, "T": tokens, "D": width, "F": inner, "H": heads}, dtype, device,
                  inputs, {"forward": (f"2*N*D*e + {WEIGHTS} + 2*N*T*D*e", "2*N*(4*D*D + 2*D*F) + 4*N*T*D")},
                  unit="block", leaves=("x", *NAMES, "kv"), providers=(ours(run), plain("torch", _composed_decode)),
                  quick=quick, reference=reference_of(run))


def _composed_decode(inputs: Inputs) -> torch.Tensor:
    """The same from parts: a merged projection each way around PyTorch's attention over the cache."""
    x, kv = inputs["x"], inputs["kv"]
    rows, width = x.shape
    h = F.layer_norm(x, (width,), inputs["norm_weight"], inputs["norm_bias"])
    merged = F.linear(h, inputs["in_weight"], inputs["in_bias"])
    positions = torch.full((rows,), kv.shape[2] - 1, device=x.device)
    qkv = merged[:, : 3 * width].unflatten(1, (3, *kv.shape[3:]))
    q, *new = torch_rotary(qkv, inputs["cos"], inputs["sin"], positions).unbind(1)
    with torch.no_grad():
        kv[:, :, -1] = torch.stack(new)
    keys, values = kv.transpose(2, 3)
    att = F.scaled_dot_product_attention(q[:, :, None], keys, values).reshape(rows, width)
    act = F.gelu(merged[:, 3 * width :], approximate="tanh")
    return F.linear(torch.cat((att, act), dim=1), inputs["out_weight"], inputs["out_bias"].sum(0)) + x


def _peers(batch: int, heads: int, p: float) -> tuple[Provider, ...]:
    same: dict[str, Any] = {"comparable": not p}
    best: dict[str, Any] = {"by_default": ("cuda",), **same}
    hf: dict[str, Any] = {"package": "transformers", **best}
    layer = partial(_compiled_layer, batch, heads, p)

    def composed(backend: str = "", liger: bool = False) -> Prepare:
        attend = forced(sdpa(True, p), backend) if backend else sdpa(True, p)
        return lambda case, device: _composed(attend, batch, heads, p, liger_layer_norm() if liger else F.layer_norm)

    flash, cudnn = BACKENDS["sdpa-flash"], BACKENDS["sdpa-cudnn"]
    return (
        Provider("torch", composed(), **same),
        Provider("torch+sdpa-flash", composed(flash), devices=("cuda",), **best),
        Provider("torch+sdpa-cudnn", composed(cudnn), devices=("cuda",), **best),
        Provider("liger+cudnn", composed(cudnn, liger=True), package="liger-kernel", devices=("cuda",), **best),
        peer("transformers", "transformers", lambda case: decoder_layer(case, batch, heads, p), BOTH, **same),
        Provider("transformers-compiled", layer("default"), **hf),
        Provider("transformers-max", layer(MAX_AUTOTUNE), slow=True, **hf),
        # PyTorch does not choose cuDNN's attention, which is the faster one on some GPUs.
        Provider("transformers-max+sdpa-cudnn", layer(MAX_AUTOTUNE, cudnn), devices=("cuda",), slow=True, **hf),
    )


def _compiled_layer(batch: int, heads: int, p: float, mode: str, backend: str = "") -> Prepare:
    def prepare(case: Case, device: torch.device) -> Function:
        layer = decoder_layer(case, batch, heads, p)
        # Within what is compiled: around it, torch.compile would take what it has compiled of the layer without it.
        return torch.compile(forced(layer, backend) if backend else layer, dynamic=False, mode=mode)

    return prepare


def _composed(attend: Attend, batch: int, heads: int, p: float, norm: Callable[..., torch.Tensor]) -> Function:
    """The block from parts, its projections merged as ours are: cuBLAS products and someone's attention and norm."""
    def run(inputs: Inputs) -> torch.Tensor:
        x = inputs["x"]
        rows, width = x.shape
        h = norm(x, (width,), inputs["norm_weight"], inputs["norm_bias"])
        merged = F.linear(h, inputs["in_weight"], inputs["in_bias"])
        positions = torch.arange(rows // batch, device=x.device).repeat(batch)
        qkv = merged[:, : 3 * width].unflatten(1, (3, heads, -1))
        qkv = torch_rotary(qkv, inputs["cos"], inputs["sin"], positions)
        att = attend(*qkv.unflatten(0, (batch, -1)).unbind(2)).reshape(rows, width)
        act = F.gelu(merged[:, 3 * width :], approximate="tanh")
        weight, bias = inputs["out_weight"], inputs["out_bias"]
        if not p:
            return F.linear(torch.cat((att, act), dim=1), weight, bias.sum(0)) + x
        dense, fc2 = F.linear(att, weight[:, :width], bias[0]), F.linear(act, weight[:, width:], bias[1])
        return F.dropout(dense, p) + F.dropout(fc2, p) + x

    return run
