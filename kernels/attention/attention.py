"""Scaled dot-product attention (Vaswani et al., arXiv 1706.03762) in tiles. `dispatch.py` has formulas and precision.

Saved for the backward: q, k, v, out and lse (float32 [H, N]). Deterministic.

B batch, Tq queries, Tk keys, H heads, K head size, N = B * Tq rows.
"""

from __future__ import annotations

import torch

from phi1.kernels.attention.dispatch import attention_backward, attention_forward
from phi1.kernels.attention.rules import attend_reference, check_packing, check_scale
from phi1.kernels.attention.spec import AttentionSpec
from phi1.kernels.core.backend import operator, reference_forced
from phi1.kernels.core.checks import (
    check_alike,
    check_flag,
    check_float,
    check_rank,
    check_shape,
    check_tensors,
    require,
    shape_of,
)
from phi1.kernels.core.philox import Dropout, check_dropout, dropout_fields, dropout_from_fields


@operator("phi1::attention")
def _attention_op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    seq_starts: torch.Tensor | None,
    causal: bool,
    scale: float,
    p: float,
    rng: torch.Tensor | None,
    sample_ids: torch.Tensor | None,
    layer: int,
    kind: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    dropout = dropout_from_fields(p, rng, sample_ids, layer, kind)
    return attention_forward(q, k, v, AttentionSpec(causal, scale, seq_starts, dropout=dropout), cu_seqlens)


@_attention_op.register_fake
def _(q: torch.Tensor, *_):
    batch, n_queries, n_heads = q.shape[:3]
    return q.new_empty(q.shape), q.new_empty((n_heads, batch * n_queries), dtype=torch.float32)


@operator("phi1::attention_backward")
def _attention_backward_op(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    seq_starts: torch.Tensor | None,
    causal: bool,
    scale: float,
    p: float,
    rng: torch.Tensor | None,
    sample_ids: torch.Tensor | None,
    layer: int,
    kind: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    spec = AttentionSpec(causal, scale, seq_starts, dropout=dropout_from_fields(p, rng, sample_ids, layer, kind))
    grads = (q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape))
    attention_backward(dout, q, k, v, out, lse, grads, spec, cu_seqlens)
    return grads


@_attention_backward_op.register_fake
def _(dout, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup(ctx, inputs, output) -> None:
    q, k, v, cu_seqlens, seq_starts, causal, scale, p, rng, sample_ids, layer, kind = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)  # otherwise autograd allocates a gradient of zeros for lse
    ctx.save_for_backward(q, k, v, out, lse, cu_seqlens, seq_starts, rng, sample_ids)
    ctx.constants = causal, scale, p, layer, kind


def _autograd(ctx, dout, _):
    if dout is None:
        return (None,) * 12
    *tensors, rng, sample_ids = ctx.saved_tensors
    causal, scale, p, layer, kind = ctx.constants
    grads = torch.ops.phi1.attention_backward(dout, *tensors, causal, scale, p, rng, sample_ids, layer, kind)
    return *grads, None, None, None, None, None, None, None, None, None


_attention_op.register_autograd(_autograd, setup_context=_setup)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    seq_starts: torch.Tensor | None = None,
    dropout: Dropout | None = None,
) -> torch.Tensor:
    """Return softmax(scale q k^T) v for each head.

    Args:
        q: [B, Tq, H, K], float16, bfloat16 or float32, any strides.
        k, v: [B, Tk, H, K], q's dtype. With a cache Tk > Tq, and the queries are the last Tq of the Tk tokens.
        causal: True lets a query see only the keys up to its own position. Tk must then be at least Tq.
        scale: the factor on q k^T, applied in float32; 1 / sqrt(K) by default.
        cu_seqlens: int32 [documents + 1], ascending from 0 to B * T: the first row of each packed document, then the
            number of rows. A query sees only its own document. Tq must equal Tk.
        seq_starts: int32 [B], the first real token of each row of a left-padded batch. No query sees a token before
            it, and queries before it give 0. Tk must be at least Tq.
        dropout: dropout of the probabilities. It has one sample id per sample, or per document with cu_seqlens.

    Returns:
        [B, Tq, H, K] in q's dtype, contiguous.

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: a shape, a device or a value breaks its rule. Values inside tensors are checked on CPU and under
            `check_values(True)`.

    Source: Vaswani et al., arXiv 1706.03762; tiles and lse as in Dao, "FlashAttention-2", arXiv 2307.08691.
    """
    scale = _check(q, k, v, causal, scale, cu_seqlens, seq_starts, dropout)
    if reference_forced():
        return attention_reference(q, k, v, causal=causal, scale=scale, cu_seqlens=cu_seqlens, seq_starts=seq_starts,
                                   dropout=dropout)
    return torch.ops.phi1.attention(q, k, v, cu_seqlens, seq_starts, causal, scale, *dropout_fields(dropout))[0]


def _check(q, k, v, causal, scale, cu_seqlens, seq_starts, dropout) -> float:
    op = "attention"
    check_tensors(op, q=q, k=k, v=v)
    check_flag(op, causal=causal)
    check_float(op, "q", q)
    check_alike(op, "q", q, k=k, v=v)
    check_rank(op, "q", q, "B, Tq, H, K")
    check_rank(op, "k", k, "B, Tk, H, K")
    batch, n_queries, n_heads, head_size = q.shape
    n_keys = k.shape[1]
    check_shape(op, "k", k, (batch, n_keys, n_heads, head_size), f"q's but for the tokens (q has {list(q.shape)})")
    check_shape(op, "v", v, k.shape, "k's")
    require(n_heads >= 1 and head_size >= 1, op, "q must have a head of at least one element", shape_of(q))
    require(n_keys >= n_queries or not causal, op, f"k must have at least q's {n_queries} tokens if causal", n_keys)
    require(n_keys >= 1 or n_queries == 0, op, "k must have at least one token", n_keys)
    require(n_keys >= n_queries or seq_starts is None, op,
            f"k must have at least q's {n_queries} tokens with seq_starts", n_keys)
    packed = cu_seqlens is not None
    require(not packed or n_queries == n_keys, op, f"k must have q's {n_queries} tokens with cu_seqlens", n_keys)
    check_packing(op, q, batch, batch * n_queries, n_keys, cu_seqlens, seq_starts)
    n_samples = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    check_dropout(op, dropout, q, n_samples, n_heads)
    return check_scale(op, scale, head_size)


def attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    seq_starts: torch.Tensor | None = None,
    dropout: Dropout | None = None,
) -> torch.Tensor:
    """Compute `attention` in plain differentiable PyTorch, with all scores in memory."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return attend_reference(q, k, v, causal=causal, scale=scale, cu_seqlens=cu_seqlens, seq_starts=seq_starts,
                            dropout=dropout)
