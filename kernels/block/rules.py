"""Argument rules of the operations on phi's parallel block.

N rows, D width, H heads, K head size, F MLP width, B batch, T positions, S tokens in the cache.
"""

from __future__ import annotations

import torch

from phi1.kernels.attention.rules import check_packing
from phi1.kernels.core.checks import (
    check_alike,
    check_float,
    check_rank,
    check_real,
    check_shape,
    check_tensors,
    check_whole,
    check_writable,
    require,
)
from phi1.kernels.core.philox import check_dropout
from phi1.kernels.pointwise.rotary import check_positions, check_tables, default_positions

NO_DROPOUT: tuple[None, None, None] = (None, None, None)
SHAPES = {  # of the parameters, from D and the 3D + F rows of in_weight
    "norm_weight": lambda width, rows: (width,),
    "norm_bias": lambda width, rows: (width,),
    "in_weight": lambda width, rows: (rows, width),
    "in_bias": lambda width, rows: (rows,),
    "out_weight": lambda width, rows: (width, rows - 2 * width),
    "out_bias": lambda width, rows: (2, width),
}


def check_block(op, x, parameters, cos, sin, n_heads, batch, cu_seqlens, seq_starts, positions, eps, dropouts
                ) -> tuple[int, torch.Tensor]:
    """Return (batch, positions), by default 1 and the positions within each sequence. Raise if a rule is broken."""
    _check_parameters(op, x, parameters, n_heads, eps)
    batch = _check_rows(op, x, batch, cu_seqlens, seq_starts, dropouts, n_heads)
    check_tensors(op, cos=cos, sin=sin)
    check_tables(op, cos, sin, x, x.shape[1] // n_heads)
    if positions is None:
        positions = default_positions(x.shape[0], batch, cu_seqlens, seq_starts, x.device)
    check_tensors(op, positions=positions)
    check_positions(op, positions, x.shape[0], cos)
    return batch, positions


def check_decode(op, x, parameters, cos, sin, kv, seq_starts, positions, eps) -> torch.Tensor:
    """Return the positions, by default those that follow the cached tokens. Raise if a rule is broken."""
    check_tensors(op, x=x, cos=cos, sin=sin, kv=kv)
    check_rank(op, "kv", kv, "2, B, S, H, K")
    n_heads, batch, length = kv.shape[3], kv.shape[1], kv.shape[2]
    _check_parameters(op, x, parameters, n_heads, eps)
    check_alike(op, "x", x, kv=kv)
    n_rows, width = x.shape
    check_shape(op, "kv", kv, (2, batch, length, n_heads, width // n_heads), f"keys and values of x's {width} columns")
    require(batch >= 1 and n_rows % batch == 0, op, f"kv's batch must divide the {n_rows} rows of x", batch)
    tokens = n_rows // batch
    require(length >= tokens, op, f"kv must have room for the {tokens} tokens of each sequence", length)
    check_writable(op, "kv", kv)
    check_without_gradients(op, x, kv, cos, sin, *parameters)
    check_packing(op, x, batch, n_rows, length, None, seq_starts)
    check_tables(op, cos, sin, x, width // n_heads)
    if positions is None:
        positions = default_positions(n_rows, batch, None, seq_starts, x.device, before=length - tokens)
    check_tensors(op, positions=positions)
    check_positions(op, positions, n_rows, cos)
    return positions


def wants_gradients(*tensors: torch.Tensor) -> bool:
    """True if autograd would record an operation on these tensors."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def check_without_gradients(op: str, *tensors: torch.Tensor) -> None:
    """Raise ValueError if a tensor requires a gradient, because the operation has no backward."""
    require(not wants_gradients(*tensors), op, "no argument may want a gradient: parallel_block has a backward",
            "one that does")


def _check_parameters(op, x, parameters, n_heads, eps) -> None:
    check_tensors(op, x=x, **parameters._asdict())
    check_float(op, "x", x)
    check_alike(op, "x", x, **parameters._asdict())
    check_rank(op, "x", x, "N, D")
    check_rank(op, "in_weight", parameters.in_weight, "3D + F, D")
    width, rows = x.shape[1], parameters.in_weight.shape[0]
    check_whole(op, n_heads=n_heads)
    check_real(op, eps=eps)
    require(n_heads >= 1 and width % n_heads == 0, op, f"n_heads must divide the {width} columns of x", n_heads)
    require(eps > 0, op, "eps must be greater than 0", eps)
    require(rows > 3 * width, op, f"in_weight must have more rows than 3 x the {width} columns of x", rows)
    why = f"for x {list(x.shape)} and in_weight {list(parameters.in_weight.shape)}"
    for name, shape in SHAPES.items():
        check_shape(op, name, getattr(parameters, name), shape(width, rows), why)


def _check_rows(op, x, batch, cu_seqlens, seq_starts, dropouts, n_heads) -> int:
    n_rows = x.shape[0]
    require(batch is None or cu_seqlens is None, op, "at most one of batch and cu_seqlens may be given", "both")
    batch = 1 if batch is None else batch
    check_whole(op, batch=batch)
    require(batch >= 1 and n_rows % batch == 0, op, f"batch must divide the {n_rows} rows of x", batch)
    check_packing(op, x, batch, n_rows, n_rows // batch, cu_seqlens, seq_starts)
    several = isinstance(dropouts, tuple | list)
    require(several and len(dropouts) == 3, op, "dropouts must be three: attention, dense, fc2",
            len(dropouts) if several else type(dropouts).__name__)
    n_samples = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    for i, dropout in enumerate(dropouts):
        check_dropout(op, dropout, x, n_samples, n_heads if i == 0 else 1, f"dropouts[{i}]")
    given = [d for d in dropouts if d is not None]
    require(all(d.rng is given[0].rng and d.sample_ids is given[0].sample_ids for d in given), op,
            "dropouts must share one rng and one sample_ids", "different tensors")
    return batch
