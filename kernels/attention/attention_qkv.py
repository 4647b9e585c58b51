"""Attention on packed q, k and v, fused with the rotary embedding. `dispatch.py` and `rotary.py` have the formulas.

A tile of q or k is rotated in float32 when it is read, and its gradient is rotated back when it is written. Saved for
the backward: qkv as given, out and lse (float32 [H, N]). Deterministic.

B batch, T tokens, N = B * T rows, H heads, K head size, R rotary dimension.
"""

from __future__ import annotations

import torch

from phi1.kernels.attention.dispatch import attention_backward, attention_forward
from phi1.kernels.attention.rules import attend_reference, check_packing, check_scale
from phi1.kernels.attention.spec import AttentionSpec
from phi1.kernels.core.backend import operator, reference_forced
from phi1.kernels.core.checks import (
    check_flag,
    check_float,
    check_rank,
    check_tensors,
    check_whole,
    require,
    shape_of,
)
from phi1.kernels.core.philox import Dropout, check_dropout, dropout_fields, dropout_from_fields
from phi1.kernels.pointwise.rotary import (
    check_positions,
    check_tables,
    default_positions,
    rotate_reference,
)


def _by_sample(qkv: torch.Tensor, batch: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return q, k and v [B, T, H, K] as views of qkv [N, 3, H, K]."""
    q, k, v = qkv.unflatten(0, (batch, qkv.shape[0] // max(batch, 1))).unbind(2)
    return q, k, v


@operator("phi1::attention_qkv")
def _attention_qkv_op(
    qkv: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    positions: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    seq_starts: torch.Tensor | None,
    batch: int,
    causal: bool,
    scale: float,
    rotary_applied: bool,
    p: float,
    rng: torch.Tensor | None,
    sample_ids: torch.Tensor | None,
    layer: int,
    kind: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    rotary = None if cos is None or sin is None or positions is None else (cos, sin, positions)
    dropout = dropout_from_fields(p, rng, sample_ids, layer, kind)
    spec = AttentionSpec(causal, scale, seq_starts, rotary, dropout, rotary_applied)
    out, lse = attention_forward(*_by_sample(qkv, batch), spec, cu_seqlens)
    return out.view(qkv.shape[0], qkv.shape[2] * qkv.shape[3]), lse


@_attention_qkv_op.register_fake
def _(qkv: torch.Tensor, *_):
    n_rows, n_heads, head_size = qkv.shape[0], qkv.shape[2], qkv.shape[3]
    return qkv.new_empty((n_rows, n_heads * head_size)), qkv.new_empty((n_heads, n_rows), dtype=torch.float32)


@operator("phi1::attention_qkv_backward")
def _attention_qkv_backward_op(
    dout: torch.Tensor,
    qkv: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    positions: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    seq_starts: torch.Tensor | None,
    batch: int,
    causal: bool,
    scale: float,
    rotary_applied: bool,
    p: float,
    rng: torch.Tensor | None,
    sample_ids: torch.Tensor | None,
    layer: int,
    kind: int,
) -> torch.Tensor:
    rotary = None if cos is None or sin is None or positions is None else (cos, sin, positions)
    dropout = dropout_from_fields(p, rng, sample_ids, layer, kind)
    spec = AttentionSpec(causal, scale, seq_starts, rotary, dropout, rotary_applied)
    dqkv = qkv.new_empty(qkv.shape)
    q, k, v = _by_sample(qkv, batch)
    grads = _by_sample(dqkv, batch)
    attention_backward(dout.reshape(q.shape), q, k, v, out.view(q.shape), lse, grads, spec, cu_seqlens)
    return dqkv


@_attention_qkv_backward_op.register_fake
def _(dout, qkv: torch.Tensor, *_):
    return qkv.new_empty(qkv.shape)


def _setup(ctx, inputs, output) -> None:
    qkv, cos, sin, positions, cu_seqlens, seq_starts, *constants, p, rng, sample_ids, layer, kind = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)  # otherwise autograd allocates a gradient of zeros for lse
    ctx.save_for_backward(qkv, out, lse, cos, sin, positions, cu_seqlens, seq_starts, rng, sample_ids)
    ctx.constants = *constants, p, layer, kind


def _autograd(ctx, dout, _):
    if dout is None:
        return (None,) * 15
    *tensors, rng, sample_ids = ctx.saved_tensors
    *constants, layer, kind = ctx.constants
    dqkv = torch.ops.phi1.attention_qkv_backward(dout, *tensors, *constants, rng, sample_ids, layer, kind)
    return dqkv, *[None] * 14


_attention_qkv_op.register_autograd(_autograd, setup_context=_setup)


def attention_qkv(
    qkv: torch.Tensor,
    *,
    batch: int | None = None,
    cu_seqlens: torch.Tensor | None = None,
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
    positions: torch.Tensor | None = None,
    rotary_applied: bool = False,
    causal: bool = True,
    scale: float | None = None,
    seq_starts: torch.Tensor | None = None,
    dropout: Dropout | None = None,
) -> torch.Tensor:
    """Return self-attention on the packed output of one projection, which is read in place.

    Args:
        qkv: [N, 3, H, K], q, k and v of each row; float16, bfloat16 or float32, any strides.
        batch: B; the rows are B sequences of N / B tokens each. 1 by default. Not together with cu_seqlens.
        cu_seqlens: int32 [documents + 1], ascending from 0 to N; the rows are packed documents.
        rotary: (cos, sin) tables [T, R/2] float32, by which q and k are rotated first, or None. They get no gradient.
        positions: int32 or int64 [N], for rotary. By default each row's index in its document, or in its sequence
            counted from seq_starts, at least 0.
        rotary_applied: True if q and k are already rotated by these tables. The forward then rotates nothing, and the
            gradient is that of qkv before its rotation.
        causal, scale, seq_starts, dropout: as for `attention`.

    Returns:
        [N, H * K] in qkv's dtype, contiguous.

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: a shape, a device or a value breaks its rule. Values inside tensors are checked on CPU and under
            `check_values(True)`.

    Source: as for `attention` and `rotary`.
    """
    check_flag("attention_qkv", causal=causal, rotary_applied=rotary_applied)
    batch, scale = _check(qkv, batch, cu_seqlens, scale, seq_starts, dropout)
    positions = _positions(qkv, batch, rotary, rotary_applied, positions, cu_seqlens, seq_starts)
    if reference_forced():
        return attention_qkv_reference(qkv, batch=batch, cu_seqlens=cu_seqlens, rotary=rotary, positions=positions,
                                       rotary_applied=rotary_applied, causal=causal, scale=scale,
                                       seq_starts=seq_starts, dropout=dropout)
    cos, sin = (None, None) if rotary is None else rotary
    return torch.ops.phi1.attention_qkv(qkv, cos, sin, positions, cu_seqlens, seq_starts, batch, causal, scale,
                                        rotary_applied, *dropout_fields(dropout))[0]


def _check(qkv, batch, cu_seqlens, scale, seq_starts, dropout) -> tuple[int, float]:
    op = "attention_qkv"
    check_tensors(op, qkv=qkv)
    check_float(op, "qkv", qkv)
    check_rank(op, "qkv", qkv, "N, 3, H, K")
    n_rows, three, n_heads, head_size = qkv.shape
    require(three == 3, op, "qkv.shape[1] must be 3: q, k and v", three)
    require(n_heads >= 1 and head_size >= 1, op, "qkv must have a head of at least one element", shape_of(qkv))
    require(batch is None or cu_seqlens is None, op, "at most one of batch and cu_seqlens may be given", "both")
    batch = 1 if batch is None else batch
    check_whole(op, batch=batch)
    require(batch >= 1 and n_rows % batch == 0, op, f"batch must divide the {n_rows} rows of qkv", batch)
    check_packing(op, qkv, batch, n_rows, n_rows // batch, cu_seqlens, seq_starts)
    n_samples = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    check_dropout(op, dropout, qkv, n_samples, n_heads)
    return batch, check_scale(op, scale, head_size)


def _positions(qkv, batch, rotary, rotary_applied, positions, cu_seqlens, seq_starts) -> torch.Tensor | None:
    op = "attention_qkv"
    if rotary is None:
        require(not rotary_applied, op, "rotary_applied needs rotary, to rotate the gradient back by", "no rotary")
        require(positions is None, op, "positions may be given only with rotary", "no rotary")
        return None
    require(isinstance(rotary, tuple | list) and len(rotary) == 2, op, "rotary must be a pair, cos and sin",
            type(rotary).__name__)
    check_tensors(op, cos=rotary[0], sin=rotary[1])
    check_tables(op, rotary[0], rotary[1], qkv, qkv.shape[3])
    if positions is None:
        positions = default_positions(qkv.shape[0], batch, cu_seqlens, seq_starts, qkv.device)
    check_tensors(op, positions=positions)
    check_positions(op, positions, qkv.shape[0], rotary[0])
    return positions


def attention_qkv_reference(
    qkv: torch.Tensor,
    *,
    batch: int | None = None,
    cu_seqlens: torch.Tensor | None = None,
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
    positions: torch.Tensor | None = None,
    rotary_applied: bool = False,
    causal: bool = True,
    scale: float | None = None,
    seq_starts: torch.Tensor | None = None,
    dropout: Dropout | None = None,
) -> torch.Tensor:
    """`attention_qkv` in plain differentiable PyTorch, with all scores in memory."""
    batch = batch or 1
    if rotary is not None:
        cos, sin = (table.detach() for table in rotary)
        if positions is None:
            positions = default_positions(qkv.shape[0], batch, cu_seqlens, seq_starts, qkv.device)
        rotated = torch.cat((rotate_reference(qkv[:, :2], cos, sin, positions), qkv[:, 2:]), dim=1)
        # With rotary_applied: the values given, under the derivative of the rotation.
        qkv = qkv.detach() + (rotated - rotated.detach()) if rotary_applied else rotated
    scale = qkv.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = _by_sample(qkv, batch)
    out = attend_reference(q, k, v, causal=causal, scale=scale, cu_seqlens=cu_seqlens, seq_starts=seq_starts,
                           dropout=dropout)
    return out.reshape(qkv.shape[0], qkv.shape[2] * qkv.shape[3])
