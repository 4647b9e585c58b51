"""The parallel block behind its norm on GPUs: the order of its launches, forward and backward; formulas in `block.py`.

qkv is saved as [N, 3, D] with q and k rotated: by in_proj's kernel, or in place where the tuned table gives the product
to cuBLAS. Their gradients leave attention rotated back. Gradients of [q | k | v | pre] share one buffer, so that dh and
dW_in are one product each; act comes out of the pass that makes dpre. Bias gradients are partial sums, added in order.
What the forward has not kept is computed again by its own kernels, and has the same bits.

N rows, D width, H heads, K head size, F MLP width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from phi1.kernels.attention.launch_triton import launch_attention_backward, launch_attention_forward
from phi1.kernels.block.bias_grad_triton import (
    launch_bias_partials,
    launch_bias_sums,
    launch_branch_gradients,
)
from phi1.kernels.block.projections_triton import in_proj_tile, launch_in_proj, launch_out_proj
from phi1.kernels.gemm.linear_triton import launch_linear_forward
from phi1.kernels.gemm.mlp_triton import launch_dgelu_partial
from phi1.kernels.pointwise.epilogue_triton import launch_epilogue_forward
from phi1.kernels.pointwise.rotary_triton import launch_rotary

if TYPE_CHECKING:
    from phi1.kernels.block.eager import Layout


def launch_block_forward(
    h: torch.Tensor, x: torch.Tensor, in_weight: torch.Tensor, in_bias: torch.Tensor, out_weight: torch.Tensor,
    out_bias: torch.Tensor, layout: Layout, keeps_pre: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `branches_forward` of `_block.py`."""
    qkv, pre, act = _project(h, in_weight, in_bias, layout, pre=keeps_pre)
    att, lse = _attend(qkv, layout)
    if layout.drops:
        width = h.shape[1]
        y, _ = launch_linear_forward(att, out_weight[:, :width], out_bias[0], x, False, layout.dense_dropout,
                                     layout.cu_seqlens)
        y, _ = launch_linear_forward(act, out_weight[:, width:], out_bias[1], y, False, layout.fc2_dropout,
                                     layout.cu_seqlens)
    else:
        y = launch_out_proj(att, act, x, out_weight, out_bias)
    return y, qkv, pre, att, lse


def launch_block_again(
    h: torch.Tensor, in_weight: torch.Tensor, in_bias: torch.Tensor, qkv: torch.Tensor, att: torch.Tensor,
    lse: torch.Tensor, layout: Layout, recompute: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `branches_again` of `_block.py`."""
    if recompute == "mlp":
        return qkv, _project(h, in_weight, in_bias, layout, qkv=False, act=False)[1], att, lse
    qkv, pre, _ = _project(h, in_weight, in_bias, layout, act=False)
    return qkv, pre, *_attend(qkv, layout)


def launch_block_backward(
    dy: torch.Tensor, h: torch.Tensor, in_weight: torch.Tensor, out_weight: torch.Tensor, qkv: torch.Tensor,
    pre: torch.Tensor, att: torch.Tensor, lse: torch.Tensor, layout: Layout,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `branches_backward` of `_block.py`."""
    width = h.shape[1]
    dproj = h.new_empty((h.shape[0], in_weight.shape[0]))
    dqkv, dpre = dproj[:, : 3 * width], dproj[:, 3 * width :]
    datt, dw_out, dpre_sums, branch_sums = _output_backward(dy, att, pre, out_weight, layout, dpre)
    q, k, v = layout.by_sample(qkv)
    launch_attention_backward(datt.view(q.shape), q, k, v, att.view(q.shape), lse, layout.by_sample(dqkv),
                              layout.scheme_of(qkv), layout.cu_seqlens)
    dqkv_sums, *dy_sums = launch_bias_partials(dqkv, None if layout.drops else dy)
    db_in, db_out = launch_bias_sums(dqkv_sums, dpre_sums, branch_sums or dy_sums * 2, h)
    return torch.mm(dproj, in_weight), torch.mm(dproj.t(), h), db_in, dw_out, db_out


def _output_backward(
    dy: torch.Tensor, att: torch.Tensor, pre: torch.Tensor, out_weight: torch.Tensor, layout: Layout, dpre: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """(datt [N, D], dw_out [D, D+F], dpre's partial sums, those of dy where a branch drops); dpre [N, F] is filled."""
    width, act = att.shape[1], torch.empty_like(pre)
    dense_dy, fc2_dy = dy, dy
    branch_sums: list[torch.Tensor] = []
    if layout.drops:
        (dense_dy, fc2_dy), branch_sums = launch_branch_gradients(dy, layout.dense_dropout, layout.fc2_dropout,
                                                                  layout.cu_seqlens)
    dpre_sums = launch_dgelu_partial(fc2_dy, out_weight[:, width:], pre, dpre, act)
    dw_out = torch.empty_like(out_weight, memory_format=torch.contiguous_format)
    torch.mm(fc2_dy.t(), act, out=dw_out[:, width:])
    del act, fc2_dy  # here the backward holds most
    torch.mm(dense_dy.t(), att, out=dw_out[:, :width])
    return torch.mm(dense_dy, out_weight[:, :width]), dw_out, dpre_sums, branch_sums


def _project(
    h: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, layout: Layout, *, qkv: bool = True, pre: bool = True,
    act: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(qkv [N, 3, D], q and k rotated, pre [N, F], act [N, F]); empty what is not wanted."""
    rotary, width = layout.scheme.rotary, h.shape[1]
    assert rotary is not None
    t = in_proj_tile(h, weight.shape[0], width // layout.n_heads, rotary[0].shape[1])
    if t is not None:
        q_k_v, before, after = launch_in_proj(h, weight, bias, rotary, layout.n_heads, t, qkv=qkv, pre=pre, act=act)
        return q_k_v.unflatten(1, (3, width)) if qkv else q_k_v, before, after
    none, n_qkv = h.new_empty(0), 3 * width
    q_k_v = _rotated_by_cublas(h, weight[:n_qkv], bias[:n_qkv], layout) if qkv else none
    before = torch.addmm(bias[n_qkv:], h, weight[n_qkv:].t())
    if not act:
        return q_k_v, before, none
    after = launch_epilogue_forward(before, None, True, None, out=None if pre else before)
    return q_k_v, before if pre else none, after


def _rotated_by_cublas(h: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, layout: Layout) -> torch.Tensor:
    """qkv [N, 3, D]: one launch rotates q and k in place, where attention would rotate each at every read."""
    assert layout.scheme.rotary is not None
    qkv = torch.addmm(bias, h, weight.t()).unflatten(1, (3, h.shape[1]))
    q_and_k = qkv[:, :2].unflatten(2, (layout.n_heads, -1))
    launch_rotary(q_and_k, q_and_k, *layout.scheme.rotary, False)
    return qkv


def _attend(qkv: torch.Tensor, layout: Layout) -> tuple[torch.Tensor, torch.Tensor]:
    """(att [N, D], lse [H, N])."""
    att, lse = launch_attention_forward(*layout.by_sample(qkv), layout.scheme_of(qkv), layout.cu_seqlens)
    return att.view(qkv.shape[0], qkv.shape[2]), lse
