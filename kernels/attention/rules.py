"""The argument rules and the reference that attention's public operations share.

B batch, Tq queries, Tk keys, H heads, K head size, N rows.
"""

from __future__ import annotations

import torch

from phi1.kernels.core.checks import (
    check_device,
    check_range,
    check_rank,
    check_real,
    check_shape,
    check_tensors,
    require,
    values_checked,
)
from phi1.kernels.core.philox import (
    Dropout,
    attention_keep,
    document_positions,
    dropout_scale,
    is_active,
    packed_attention_keep,
)


def check_scale(op: str, scale: float | None, head_size: int) -> float:
    """Return the scale on q k^T, 1 / sqrt(K) by default. Raise unless it is a finite number above 0."""
    if scale is None:
        return head_size**-0.5
    check_real(op, scale=scale)
    require(scale > 0, op, "scale must be greater than 0", scale)
    return float(scale)


def check_packing(op: str, x: torch.Tensor, n_samples: int, n_rows: int, n_keys: int, cu_seqlens: torch.Tensor | None,
                  seq_starts: torch.Tensor | None) -> None:
    """Raise unless cu_seqlens, if given, splits n_rows rows into documents, and seq_starts [B], if given, is valid.

    At most one of the two may be given. seq_starts holds positions in rows of n_keys.
    """
    both = cu_seqlens is not None and seq_starts is not None
    require(not both, op, "at most one of cu_seqlens and seq_starts may be given", "both")
    if cu_seqlens is not None:
        check_cu_seqlens(op, cu_seqlens, n_rows, x)
    if seq_starts is not None:
        check_tensors(op, seq_starts=seq_starts)
        _check_integer(op, "seq_starts", seq_starts, x)
        check_shape(op, "seq_starts", seq_starts, (n_samples,), "one per sample")
        check_range(op, "seq_starts", seq_starts, 0, n_keys + 1, "positions in a row")


def check_cu_seqlens(op: str, cu_seqlens: torch.Tensor, n_rows: int, x: torch.Tensor) -> None:
    """Raise unless cu_seqlens is an integer [documents + 1] on x's device, ascending from 0 to n_rows."""
    check_tensors(op, cu_seqlens=cu_seqlens)
    _check_integer(op, "cu_seqlens", cu_seqlens, x)
    check_rank(op, "cu_seqlens", cu_seqlens, "documents + 1")
    require(cu_seqlens.shape[0] >= 1, op, "cu_seqlens must have at least one entry", tuple(cu_seqlens.shape))
    if values_checked(cu_seqlens):
        ends = cu_seqlens.tolist()
        require(ends[0] == 0 and ends[-1] == n_rows and ends == sorted(ends), op,
                f"cu_seqlens must ascend from 0 to the number of rows, {n_rows}", _abbreviated(ends))


def _abbreviated(values: list[int]) -> str:
    return str(values) if len(values) <= 8 else f"[{', '.join(map(str, values[:4]))}, ..., {values[-1]}]"


def _check_integer(op: str, name: str, value: torch.Tensor, x: torch.Tensor) -> None:
    require(value.dtype in (torch.int32, torch.int64), op, f"{name} must be int32 or int64",
            str(value.dtype).removeprefix("torch."))
    check_device(op, name, value, "x", x)


def attend_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool,
    scale: float,
    cu_seqlens: torch.Tensor | None,
    seq_starts: torch.Tensor | None,
    dropout: Dropout | None,
) -> torch.Tensor:
    """Return the attention of q [B, Tq, H, K] to k, v [B, Tk, H, K] in plain differentiable PyTorch.

    All scores are in memory.
    """
    if cu_seqlens is not None:
        shape = q.shape
        q, k, v = (x.flatten(0, 1)[None] for x in (q, k, v))
        return _attend(q, k, v, _visible(q, k, causal, cu_seqlens, None), scale, dropout, cu_seqlens).view(shape)
    return _attend(q, k, v, _visible(q, k, causal, None, seq_starts), scale, dropout, None)


def _visible(q: torch.Tensor, k: torch.Tensor, causal: bool, cu_seqlens: torch.Tensor | None,
             seq_starts: torch.Tensor | None) -> torch.Tensor:
    """Return bool [1 or B, 1, Tq, Tk], True where the query sees the key."""
    n_queries, n_keys = q.shape[1], k.shape[1]
    key = torch.arange(n_keys, device=q.device)
    query = torch.arange(n_keys - n_queries, n_keys, device=q.device)[:, None]
    seen = query >= key if causal else torch.ones((n_queries, n_keys), dtype=torch.bool, device=q.device)
    if cu_seqlens is not None:
        document, _ = document_positions(cu_seqlens, n_keys)
        seen = seen & (document[:, None] == document)
    if seq_starts is not None:
        start = seq_starts.view(-1, 1, 1, 1)
        return seen & (key >= start) & (query >= start)
    return seen[None, None]


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor, scale: float,
            dropout: Dropout | None, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("bqhk,bthk->bhqt", q.to(wide), k.to(wide)) * scale
    blind = ~visible.any(-1, keepdim=True)
    p = scores.masked_fill(~visible & ~blind, -torch.inf).softmax(-1).masked_fill(blind, 0)
    if dropout is not None and is_active(dropout):
        batch, n_heads, n_queries, n_keys = p.shape
        if cu_seqlens is None:
            keep = attention_keep(dropout, samples=range(batch), heads=range(n_heads),
                                  queries=range(n_keys - n_queries, n_keys), keys=range(n_keys))
        else:
            keep = packed_attention_keep(dropout, cu_seqlens, n_heads, n_keys)[None]
        p = p * keep * dropout_scale(dropout.p)
    # Probabilities have v's dtype in their product with v, as in every fused kernel.
    return torch.einsum("bhqt,bthk->bqhk", p.to(q.dtype), v)
