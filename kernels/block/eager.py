"""The parallel block behind its norm, on plain tensors: the Triton kernels, or PyTorch; formulas in `block.py`.

N rows, D width, H heads, K head size, F MLP width, B batch, R rotary dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from phi1.kernels.attention.dispatch import attention_backward, attention_forward
from phi1.kernels.attention.spec import AttentionSpec
from phi1.kernels.core.backend import use_triton
from phi1.kernels.core.cpu_matmul import addmm, mm
from phi1.kernels.core.cpu_memory import empty
from phi1.kernels.core.philox import Dropout, dropout_from_fields
from phi1.kernels.gemm.linear import linear_forward
from phi1.kernels.pointwise.dropout import dropped
from phi1.kernels.pointwise.gelu import gelu_backward, gelu_forward
from phi1.kernels.pointwise.rotary import rotate_, rotate_rows_, rows_of_tables


@dataclass(frozen=True)
class Layout:
    """How rows form sequences, how they attend, and what is dropped on the branches."""

    n_heads: int
    batch: int
    cu_seqlens: torch.Tensor | None
    scheme: AttentionSpec
    dense_dropout: Dropout | None
    fc2_dropout: Dropout | None

    @property
    def drops(self) -> bool:
        """Whether a branch drops anything."""
        return self.dense_dropout is not None or self.fc2_dropout is not None

    def scheme_of(self, qkv: torch.Tensor) -> AttentionSpec:
        """How attention takes qkv, whose axes say which forward saved it: [N, 3D], or [N, 3, D] with q and k rotated.
        """
        return replace(self.scheme, rotary_applied=qkv.dim() == 3)

    def by_sample(self, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[N, 3D] or [N, 3, D] -> q, k, v [B, T, H, K], views."""
        qkv = qkv.flatten(1)
        n_rows, columns = qkv.shape
        shape = (self.batch, n_rows // self.batch, 3, self.n_heads, columns // (3 * self.n_heads))
        q, k, v = qkv.unflatten(1, shape[2:]).unflatten(0, shape[:2]).unbind(2)
        return q, k, v


def layout_of(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor, cu_seqlens: torch.Tensor | None,
    seq_starts: torch.Tensor | None, rng: torch.Tensor | None, sample_ids: torch.Tensor | None, n_heads: int,
    batch: int, ps: Sequence[float], layers: Sequence[int], kinds: Sequence[int],
) -> Layout:
    """The layout that an operator's flat arguments describe."""
    attention, dense, fc2 = (
        dropout_from_fields(p, rng if p else None, sample_ids, layer, kind)
        for p, layer, kind in zip(ps, layers, kinds, strict=True)
    )
    scheme = AttentionSpec(True, (x.shape[1] // n_heads) ** -0.5, seq_starts, (cos, sin, positions), attention)
    return Layout(n_heads, batch, cu_seqlens, scheme, dense, fc2)


def branches_forward(
    h: torch.Tensor,
    x: torch.Tensor,
    in_weight: torch.Tensor,
    in_bias: torch.Tensor,
    out_weight: torch.Tensor,
    out_bias: torch.Tensor,
    layout: Layout,
    keeps_pre: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(x', qkv, pre [N, F], att [N, D], lse [H, N]) of the normalised h and the residual x, both [N, D].

    qkv is [N, 3D]; of the Triton kernels [N, 3, D] with q and k rotated. `branches_backward` takes either, whichever
    backend it runs on. pre is empty unless it is kept.
    """
    if use_triton(h):
        from phi1.kernels.block.launch_triton import launch_block_forward

        return launch_block_forward(h, x, in_weight, in_bias, out_weight, out_bias, layout, keeps_pre)
    qkv, att, lse = _attended(h, in_weight, in_bias, layout)
    pre = _pre(h, in_weight, in_bias)
    y = _output(att, pre, x, out_weight, out_bias, layout)
    return y, qkv, pre if keeps_pre else pre.new_empty(0), att, lse


def branches_again(
    h: torch.Tensor,
    in_weight: torch.Tensor,
    in_bias: torch.Tensor,
    qkv: torch.Tensor,
    att: torch.Tensor,
    lse: torch.Tensor,
    layout: Layout,
    recompute: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(qkv, pre, att, lse) for the backward, with the forward's bits: pre is computed again, in "block" all four."""
    if use_triton(h):
        from phi1.kernels.block.launch_triton import launch_block_again

        return launch_block_again(h, in_weight, in_bias, qkv, att, lse, layout, recompute)
    if recompute == "block":
        qkv, att, lse = _attended(h, in_weight, in_bias, layout)
    return qkv, _pre(h, in_weight, in_bias), att, lse


def branches_decode(
    h: torch.Tensor, x: torch.Tensor, in_weight: torch.Tensor, in_bias: torch.Tensor, out_weight: torch.Tensor,
    out_bias: torch.Tensor, kv: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    seq_starts: torch.Tensor | None,
) -> torch.Tensor:
    """x' [N, D]; the rotated keys and the values of h's tokens are written to the last places of kv [2, B, S, H, K]."""
    width, (_, batch, length, n_heads, head_size) = x.shape[1], kv.shape
    projected = linear_forward(h, in_weight, in_bias, None, False, None)[0]
    pre = projected[:, 3 * width :]
    qkv = projected[:, : 3 * width].unflatten(1, (3, n_heads, head_size))
    rotate_rows_(qkv, *rotary)
    q, k, v = qkv.unflatten(0, (batch, -1)).unbind(2)
    keys, values = kv.unbind(0)
    keys[:, length - k.shape[1] :].copy_(k)
    values[:, length - v.shape[1] :].copy_(v)
    att = attention_forward(q, keys, values, AttentionSpec(True, head_size**-0.5, seq_starts))[0]
    joined = _room_for_both(att.view(x.shape), pre)
    gelu_forward(pre, out=joined[:, width:])
    return linear_forward(joined, out_weight, out_bias[0] + out_bias[1], x, False, None)[0]


def rotate_keys(qkv: torch.Tensor, layout: Layout) -> None:
    """Rotate k in the forward's qkv, in place, unless it is; what q then is, is left open."""
    assert layout.scheme.rotary is not None
    if not layout.scheme_of(qkv).rotary_applied:
        cos, sin = rows_of_tables(*layout.scheme.rotary)
        rotate_(qkv.unflatten(1, (3, layout.n_heads, -1))[:, 1:2], cos[:, None, None], sin[:, None, None])


def _attended(
    h: torch.Tensor, in_weight: torch.Tensor, in_bias: torch.Tensor, layout: Layout
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(qkv [N, 3D], att [N, D], lse [H, N])."""
    n_qkv = 3 * h.shape[1]
    qkv = _addmm(in_bias[:n_qkv], h, in_weight[:n_qkv].t())
    att, lse = attention_forward(*layout.by_sample(qkv), layout.scheme, layout.cu_seqlens)
    return qkv, att.view(h.shape), lse


def _pre(h: torch.Tensor, in_weight: torch.Tensor, in_bias: torch.Tensor) -> torch.Tensor:
    n_qkv = 3 * h.shape[1]
    return _addmm(in_bias[n_qkv:], h, in_weight[n_qkv:].t())


def _output(
    att: torch.Tensor, pre: torch.Tensor, x: torch.Tensor, out_weight: torch.Tensor, out_bias: torch.Tensor,
    layout: Layout,
) -> torch.Tensor:
    """x' [N, D]."""
    width = att.shape[1]
    if not layout.drops:
        # One product and one rounding: copying att beside act costs less than a second product.
        joined = _room_for_both(att, pre)
        gelu_forward(pre, out=joined[:, width:])
        y = torch.add(x, out_bias.sum(0), out=empty(x.shape, dtype=x.dtype, device=x.device))
        return addmm(y, joined, out_weight.t(), out=y)
    dense_weight, fc2_weight = out_weight.t().split_with_sizes([width, pre.shape[1]])
    y = dropped(addmm(out_bias[0], att, dense_weight), layout.dense_dropout, layout.cu_seqlens)
    y += x  # into y, which is contiguous whatever x is
    y += dropped(addmm(out_bias[1], gelu_forward(pre), fc2_weight), layout.fc2_dropout, layout.cu_seqlens)
    return y


def branches_backward(
    dy: torch.Tensor,
    h: torch.Tensor,
    in_weight: torch.Tensor,
    out_weight: torch.Tensor,
    qkv: torch.Tensor,
    pre: torch.Tensor,
    att: torch.Tensor,
    lse: torch.Tensor,
    layout: Layout,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of h, in_weight, in_bias, out_weight and out_bias; the residual's is dy."""
    if use_triton(h):
        from phi1.kernels.block.launch_triton import launch_block_backward

        return launch_block_backward(dy, h, in_weight, out_weight, qkv, pre, att, lse, layout)
    n_qkv = 3 * h.shape[1]
    dproj = empty((h.shape[0], in_weight.shape[0]), dtype=h.dtype, device=h.device)
    datt, dw_out, db_out = _output_backward(dy, att, pre, out_weight, layout, dproj[:, n_qkv:])
    q, k, v = layout.by_sample(qkv)
    attention_backward(datt.unflatten(1, (layout.n_heads, -1)).unflatten(0, q.shape[:2]), q, k, v, att.view(q.shape),
                       lse, layout.by_sample(dproj[:, :n_qkv]), layout.scheme_of(qkv), layout.cu_seqlens)
    return _mm(dproj, in_weight), _mm(dproj.t(), h), dproj.sum(0), dw_out, db_out


def _output_backward(
    dy: torch.Tensor, att: torch.Tensor, pre: torch.Tensor, out_weight: torch.Tensor, layout: Layout, dpre: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(datt [N, D], dw_out [D, D+F], db_out [2, D]); dpre [N, F] is filled."""
    sizes = [att.shape[1], pre.shape[1]]
    joined = _room_for_both(att, pre)
    act = joined[:, sizes[0] :]
    if not layout.drops:
        djoined = _mm(dy, out_weight)
        datt, dact = djoined.split_with_sizes(sizes, dim=1)
        gelu_backward(dact, pre, dpre, act)
        return datt, _mm(dy.t(), joined), dy.sum(0).expand(2, -1).contiguous()
    dy1 = dropped(dy, layout.dense_dropout, layout.cu_seqlens)
    dy2 = dropped(dy, layout.fc2_dropout, layout.cu_seqlens)
    dense_weight, fc2_weight = out_weight.split_with_sizes(sizes, dim=1)
    gelu_backward(mm(dy2, fc2_weight), pre, dpre, act)
    dw_out = torch.cat((mm(dy1.t(), att), mm(dy2.t(), act)), dim=1)
    return mm(dy1, dense_weight), dw_out, torch.stack((dy1.sum(0), dy2.sum(0)))


def _room_for_both(att: torch.Tensor, pre: torch.Tensor) -> torch.Tensor:
    """[att | unset] [N, D+F]."""
    width = att.shape[1]
    joined = empty((att.shape[0], width + pre.shape[1]), dtype=att.dtype, device=att.device)
    joined[:, :width] = att
    return joined


def _addmm(bias: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return addmm(bias, a, b, out=empty((a.shape[0], b.shape[1]), dtype=a.dtype, device=a.device))


def _mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return mm(a, b, out=empty((a.shape[0], b.shape[1]), dtype=a.dtype, device=a.device))
