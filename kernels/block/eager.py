"""The block behind its norm in PyTorch; formulas in `parallel_block.py`, functions explained in `dispatch.py`.

N rows, D width, H heads, K head size, F MLP width, B batch, R rotary dimension.
"""

from __future__ import annotations

import torch

from phi1.kernels.attention.dispatch import attention_backward, attention_forward
from phi1.kernels.block.spec import BlockSpec, Parameters, Saved
from phi1.kernels.core.cpu_matmul import addmm, mm
from phi1.kernels.core.cpu_memory import empty
from phi1.kernels.pointwise.dropout import dropped
from phi1.kernels.pointwise.gelu import gelu_backward, gelu_forward


def branches_forward(
    h: torch.Tensor, x: torch.Tensor, parameters: Parameters, spec: BlockSpec, keeps_pre: bool
) -> tuple[torch.Tensor, Saved]:
    """`dispatch.branches_forward` in PyTorch."""
    qkv, att, lse = _attended(h, parameters, spec)
    pre = _pre(h, parameters)
    y = _output(att, pre, x, parameters, spec)
    return y, Saved(qkv, pre if keeps_pre else pre.new_empty(0), att, lse)


def branches_again(
    h: torch.Tensor, parameters: Parameters, saved: Saved, spec: BlockSpec, recompute: str
) -> Saved:
    """`dispatch.branches_again` in PyTorch."""
    qkv, _, att, lse = saved
    if recompute == "block":
        qkv, att, lse = _attended(h, parameters, spec)
    return Saved(qkv, _pre(h, parameters), att, lse)


def branches_backward(
    dy: torch.Tensor, h: torch.Tensor, parameters: Parameters, saved: Saved, spec: BlockSpec
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`dispatch.branches_backward` in PyTorch."""
    in_weight, n_qkv, (qkv, pre, att, lse) = parameters.in_weight, 3 * h.shape[1], saved
    dproj = empty((h.shape[0], in_weight.shape[0]), dtype=h.dtype, device=h.device)
    datt, dw_out, db_out = _output_backward(dy, att, pre, parameters.out_weight, spec, dproj[:, n_qkv:])
    q, k, v = spec.by_sample(qkv)
    attention_backward(datt.unflatten(1, (spec.n_heads, -1)).unflatten(0, q.shape[:2]), q, k, v, att.view(q.shape),
                       lse, spec.by_sample(dproj[:, :n_qkv]), spec.attention_on(qkv), spec.cu_seqlens)
    return _mm(dproj, in_weight), _mm(dproj.t(), h), dproj.sum(0), dw_out, db_out


def _attended(
    h: torch.Tensor, parameters: Parameters, spec: BlockSpec
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(qkv [N, 3D], att [N, D], lse [H, N])."""
    n_qkv = 3 * h.shape[1]
    qkv = _addmm(parameters.in_bias[:n_qkv], h, parameters.in_weight[:n_qkv].t())
    att, lse = attention_forward(*spec.by_sample(qkv), spec.attention, spec.cu_seqlens)
    return qkv, att.view(h.shape), lse


def _pre(h: torch.Tensor, parameters: Parameters) -> torch.Tensor:
    n_qkv = 3 * h.shape[1]
    return _addmm(parameters.in_bias[n_qkv:], h, parameters.in_weight[n_qkv:].t())


def _output(
    att: torch.Tensor, pre: torch.Tensor, x: torch.Tensor, parameters: Parameters, spec: BlockSpec
) -> torch.Tensor:
    """x' [N, D]."""
    width, out_weight, out_bias = att.shape[1], parameters.out_weight, parameters.out_bias
    if not spec.drops:
        # One product and one rounding: copying att beside act costs less than a second product.
        joined = beside(att, pre)
        gelu_forward(pre, out=joined[:, width:])
        y = torch.add(x, out_bias.sum(0), out=empty(x.shape, dtype=x.dtype, device=x.device))
        return addmm(y, joined, out_weight.t(), out=y)
    dense_weight, fc2_weight = out_weight.t().split_with_sizes([width, pre.shape[1]])
    y = dropped(addmm(out_bias[0], att, dense_weight), spec.dense_dropout, spec.cu_seqlens)
    y += x  # into y, which is contiguous whatever x is
    y += dropped(addmm(out_bias[1], gelu_forward(pre), fc2_weight), spec.fc2_dropout, spec.cu_seqlens)
    return y


def _output_backward(
    dy: torch.Tensor, att: torch.Tensor, pre: torch.Tensor, out_weight: torch.Tensor, spec: BlockSpec,
    dpre: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(datt [N, D], dw_out [D, D+F], db_out [2, D]); dpre [N, F] is filled."""
    sizes = [att.shape[1], pre.shape[1]]
    joined = beside(att, pre)
    act = joined[:, sizes[0] :]
    if not spec.drops:
        djoined = _mm(dy, out_weight)
        datt, dact = djoined.split_with_sizes(sizes, dim=1)
        gelu_backward(dact, pre, dpre, act)
        return datt, _mm(dy.t(), joined), dy.sum(0).expand(2, -1).contiguous()
    dy1 = dropped(dy, spec.dense_dropout, spec.cu_seqlens)
    dy2 = dropped(dy, spec.fc2_dropout, spec.cu_seqlens)
    dense_weight, fc2_weight = out_weight.split_with_sizes(sizes, dim=1)
    gelu_backward(mm(dy2, fc2_weight), pre, dpre, act)
    dw_out = torch.cat((mm(dy1.t(), att), mm(dy2.t(), act)), dim=1)
    return mm(dy1, dense_weight), dw_out, torch.stack((dy1.sum(0), dy2.sum(0)))


def beside(att: torch.Tensor, pre: torch.Tensor) -> torch.Tensor:
    """[att | unset] [N, D+F]."""
    width = att.shape[1]
    joined = empty((att.shape[0], width + pre.shape[1]), dtype=att.dtype, device=att.device)
    joined[:, :width] = att
    return joined


def _addmm(bias: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return addmm(bias, a, b, out=empty((a.shape[0], b.shape[1]), dtype=a.dtype, device=a.device))


def _mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return mm(a, b, out=empty((a.shape[0], b.shape[1]), dtype=a.dtype, device=a.device))
