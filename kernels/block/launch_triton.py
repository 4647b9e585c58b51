"""The block behind its norm on GPUs: the order of its launches, forward and backward; see `dispatch.py`.

qkv is saved as [N, 3, D] with q and k rotated: by in_proj's kernel, or in place where the tuned table gives the product
to cuBLAS. Their gradients leave attention rotated back. Gradients of [q | k | v | pre] share one buffer, so that dh and
dW_in are one product each; act comes out of the pass that makes dpre. Bias gradients are partial sums, added in order.
What the forward has not kept is computed again by its own kernels, and has the same bits.

N rows, D width, H heads, K head size, F MLP width.
"""

from __future__ import annotations

import torch

from phi1.kernels.attention.launch_triton import launch_attention_backward, launch_attention_forward
from phi1.kernels.block.bias_grad_triton import (
    launch_bias_partials,
    launch_bias_sums,
    launch_branch_gradients,
)
from phi1.kernels.block.projections_triton import in_proj_tile, launch_in_proj, launch_out_proj
from phi1.kernels.block.spec import BlockSpec, Parameters, Saved
from phi1.kernels.gemm.linear_triton import launch_linear_forward
from phi1.kernels.gemm.mlp_triton import launch_dgelu_partial
from phi1.kernels.pointwise.epilogue_triton import launch_epilogue_forward
from phi1.kernels.pointwise.rotary_triton import launch_rotary


def launch_block_forward(
    h: torch.Tensor, x: torch.Tensor, parameters: Parameters, spec: BlockSpec, keeps_pre: bool
) -> tuple[torch.Tensor, Saved]:
    """`dispatch.branches_forward` by the kernels."""
    out_weight, out_bias, width = parameters.out_weight, parameters.out_bias, h.shape[1]
    qkv, pre, act = _project(h, parameters, spec, pre=keeps_pre)
    att, lse = _attend(qkv, spec)
    if spec.drops:
        y, _ = launch_linear_forward(att, out_weight[:, :width], out_bias[0], x, False, spec.dense_dropout,
                                     spec.cu_seqlens)
        y, _ = launch_linear_forward(act, out_weight[:, width:], out_bias[1], y, False, spec.fc2_dropout,
                                     spec.cu_seqlens)
    else:
        y = launch_out_proj(att, act, x, out_weight, out_bias)
    return y, Saved(qkv, pre, att, lse)


def launch_block_again(
    h: torch.Tensor, parameters: Parameters, saved: Saved, spec: BlockSpec, recompute: str
) -> Saved:
    """`dispatch.branches_again` by the kernels."""
    if recompute == "mlp":
        _, pre, _ = _project(h, parameters, spec, qkv=False, act=False)
        return saved._replace(pre=pre)
    qkv, pre, _ = _project(h, parameters, spec, act=False)
    att, lse = _attend(qkv, spec)
    return Saved(qkv, pre, att, lse)


def launch_block_backward(
    dy: torch.Tensor, h: torch.Tensor, parameters: Parameters, saved: Saved, spec: BlockSpec
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`dispatch.branches_backward` by the kernels."""
    in_weight, width, (qkv, pre, att, lse) = parameters.in_weight, h.shape[1], saved
    dproj = h.new_empty((h.shape[0], in_weight.shape[0]))
    dqkv, dpre = dproj[:, : 3 * width], dproj[:, 3 * width :]
    datt, dw_out, dpre_sums, branch_sums = _output_backward(dy, att, pre, parameters.out_weight, spec, dpre)
    q, k, v = spec.by_sample(qkv)
    launch_attention_backward(datt.view(q.shape), q, k, v, att.view(q.shape), lse, spec.by_sample(dqkv),
                              spec.attention_on(qkv), spec.cu_seqlens)
    dqkv_sums, *dy_sums = launch_bias_partials(dqkv, None if spec.drops else dy)
    db_in, db_out = launch_bias_sums(dqkv_sums, dpre_sums, branch_sums or dy_sums * 2, h)
    return torch.mm(dproj, in_weight), torch.mm(dproj.t(), h), db_in, dw_out, db_out


def _output_backward(
    dy: torch.Tensor, att: torch.Tensor, pre: torch.Tensor, out_weight: torch.Tensor, spec: BlockSpec,
    dpre: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """(datt [N, D], dw_out [D, D+F], dpre's partial sums, those of dy where a branch drops); dpre [N, F] is filled."""
    width, act = att.shape[1], torch.empty_like(pre)
    dense_dy, fc2_dy = dy, dy
    branch_sums: list[torch.Tensor] = []
    if spec.drops:
        (dense_dy, fc2_dy), branch_sums = launch_branch_gradients(dy, spec.dense_dropout, spec.fc2_dropout,
                                                                  spec.cu_seqlens)
    dpre_sums = launch_dgelu_partial(fc2_dy, out_weight[:, width:], pre, dpre, act)
    dw_out = torch.empty_like(out_weight, memory_format=torch.contiguous_format)
    torch.mm(fc2_dy.t(), act, out=dw_out[:, width:])
    del act, fc2_dy  # here the backward holds most
    torch.mm(dense_dy.t(), att, out=dw_out[:, :width])
    return torch.mm(dense_dy, out_weight[:, :width]), dw_out, dpre_sums, branch_sums


def _project(
    h: torch.Tensor, parameters: Parameters, spec: BlockSpec, *, qkv: bool = True, pre: bool = True, act: bool = True
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(qkv [N, 3, D], q and k rotated, pre [N, F], act [N, F]); empty what is not wanted."""
    weight, bias, width = parameters.in_weight, parameters.in_bias, h.shape[1]
    t = in_proj_tile(h, weight.shape[0], width // spec.n_heads, spec.rotary[0].shape[1])
    if t is not None:
        q_k_v, before, after = launch_in_proj(h, weight, bias, spec.rotary, spec.n_heads, t, qkv=qkv, pre=pre, act=act)
        return q_k_v.unflatten(1, (3, width)) if qkv else q_k_v, before, after
    none, n_qkv = h.new_empty(0), 3 * width
    q_k_v = _rotated_by_cublas(h, weight[:n_qkv], bias[:n_qkv], spec) if qkv else none
    before = torch.addmm(bias[n_qkv:], h, weight[n_qkv:].t())
    if not act:
        return q_k_v, before, none
    after = launch_epilogue_forward(before, None, True, None, out=None if pre else before)
    return q_k_v, before if pre else none, after


def _rotated_by_cublas(h: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, spec: BlockSpec) -> torch.Tensor:
    """qkv [N, 3, D]: one launch rotates q and k in place, where attention would rotate each at every read."""
    qkv = torch.addmm(bias, h, weight.t()).unflatten(1, (3, h.shape[1]))
    q_and_k = qkv[:, :2].unflatten(2, (spec.n_heads, -1))
    launch_rotary(q_and_k, q_and_k, *spec.rotary, False)
    return qkv


def _attend(qkv: torch.Tensor, spec: BlockSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """(att [N, D], lse [H, N])."""
    att, lse = launch_attention_forward(*spec.by_sample(qkv), spec.attention_on(qkv), spec.cu_seqlens)
    return att.view(qkv.shape[0], qkv.shape[2]), lse
