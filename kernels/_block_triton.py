"""The parallel block behind its norm on GPUs: the order of its launches, forward and backward; formulas in `block.py`.

Where in_proj's kernel multiplies, it rotates q and k as well, and qkv is saved rotated; where the tuned table gives the
product to cuBLAS, attention rotates them as it reads. Either way the gradients leave attention rotated back. Gradients
of [q | k | v | pre] share one buffer, so that dh and dW_in are one product each; act comes out of the pass that makes
dpre. Bias gradients are partial sums, added in order.

N rows, D width, H heads, K head size, F MLP width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from phi1.kernels._attention_triton import launch_backward as launch_attention_backward
from phi1.kernels._attention_triton import launch_forward as launch_attention
from phi1.kernels._bias_sums_triton import launch_bias_partials, launch_bias_sums
from phi1.kernels._epilogue_triton import launch_backward_partial
from phi1.kernels._epilogue_triton import launch_forward as launch_epilogue
from phi1.kernels._linear_triton import launch_forward as launch_linear
from phi1.kernels._mlp_triton import launch_dgelu_partial
from phi1.kernels._philox import Dropout
from phi1.kernels._projections_triton import in_proj_tile, launch_in_proj, launch_out_proj

if TYPE_CHECKING:
    from phi1.kernels._block import Layout


def launch_forward(
    h: torch.Tensor, x: torch.Tensor, in_weight: torch.Tensor, in_bias: torch.Tensor, out_weight: torch.Tensor,
    out_bias: torch.Tensor, layout: Layout,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `branches_forward` of `_block.py`."""
    _refuse_packed_dropout(layout)
    layout, qkv, pre, act = _project(h, in_weight, in_bias, layout)
    att, lse = launch_attention(*layout.by_sample(qkv), layout.scheme, layout.cu_seqlens)
    att = att.view(h.shape)
    if layout.drops:
        width = h.shape[1]
        y = launch_linear(att, out_weight[:, :width], out_bias[0], x, False, layout.dense_dropout)[0]
        y = launch_linear(act, out_weight[:, width:], out_bias[1], y, False, layout.fc2_dropout)[0]
    else:
        y = launch_out_proj(att, act, x, out_weight, out_bias)
    return y, qkv, pre, att, lse


def launch_backward(
    dy: torch.Tensor, h: torch.Tensor, in_weight: torch.Tensor, out_weight: torch.Tensor, qkv: torch.Tensor,
    pre: torch.Tensor, att: torch.Tensor, lse: torch.Tensor, layout: Layout,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `branches_backward` of `_block.py`."""
    layout = _as_projected(h, in_weight, layout)
    width, act = h.shape[1], torch.empty_like(pre)
    dense_weight, fc2_weight = out_weight[:, :width], out_weight[:, width:]
    dproj = h.new_empty((h.shape[0], in_weight.shape[0]))
    dqkv, dpre = dproj[:, : 3 * width], dproj[:, 3 * width :]
    dense_dy, dense_sums = _dropped(dy, layout.dense_dropout) if layout.drops else (dy, None)
    fc2_dy, fc2_sums = _dropped(dy, layout.fc2_dropout) if layout.drops else (dy, None)

    dpre_sums = launch_dgelu_partial(fc2_dy, fc2_weight, pre, dpre, act)
    q, k, v = layout.by_sample(qkv)
    launch_attention_backward(torch.mm(dense_dy, dense_weight).view(q.shape), q, k, v, att.view(q.shape), lse,
                              layout.by_sample(dqkv), layout.scheme, layout.cu_seqlens)
    dqkv_sums, *dy_sums = launch_bias_partials(dqkv, None if layout.drops else dy)
    branch_sums = dy_sums * 2 if dense_sums is None or fc2_sums is None else (dense_sums, fc2_sums)
    db_in, db_out = launch_bias_sums(dqkv_sums, dpre_sums, branch_sums, h)
    dw_out = torch.empty_like(out_weight, memory_format=torch.contiguous_format)
    torch.mm(dense_dy.t(), att, out=dw_out[:, :width])
    torch.mm(fc2_dy.t(), act, out=dw_out[:, width:])
    return torch.mm(dproj, in_weight), torch.mm(dproj.t(), h), db_in, dw_out, db_out


def _project(
    h: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, layout: Layout
) -> tuple[Layout, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(the layout of what follows, qkv [N, 3D], pre [N, F], act [N, F])."""
    assert layout.scheme.rotary is not None
    n_qkv, t = 3 * h.shape[1], _in_proj_tile(h, weight, layout)
    if t is not None:
        return _rotated(layout), *launch_in_proj(h, weight, bias, layout.scheme.rotary, layout.n_heads, t)
    qkv = torch.addmm(bias[:n_qkv], h, weight[:n_qkv].t())
    pre = torch.addmm(bias[n_qkv:], h, weight[n_qkv:].t())
    return layout, qkv, pre, launch_epilogue(pre, None, True, None)


def _as_projected(h: torch.Tensor, weight: torch.Tensor, layout: Layout) -> Layout:
    """The layout that the forward's attention had."""
    return layout if _in_proj_tile(h, weight, layout) is None else _rotated(layout)


def _in_proj_tile(h: torch.Tensor, weight: torch.Tensor, layout: Layout) -> dict[str, int] | None:
    assert layout.scheme.rotary is not None
    return in_proj_tile(h, weight.shape[0], h.shape[1] // layout.n_heads, layout.scheme.rotary[0].shape[1])


def _rotated(layout: Layout) -> Layout:
    return replace(layout, scheme=replace(layout.scheme, rotary_applied=True))


def _dropped(dy: torch.Tensor, dropout: Dropout | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(dy [N, D] as it reaches a branch, partial sums over its rows [P, D])."""
    dropped = dy if dropout is None else torch.empty_like(dy)
    sums = launch_backward_partial(dy, None, dropout, dpre=None if dropout is None else dropped)
    assert sums is not None
    return dropped, sums


def _refuse_packed_dropout(layout: Layout) -> None:
    if layout.drops and layout.cu_seqlens is not None:
        raise NotImplementedError("parallel_block: the Triton kernels take dropout on a branch with batch, not with "
                                  "cu_seqlens; backend('reference') takes both")
