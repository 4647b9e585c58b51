"""Forward and backward of the parallel block on plain tensors; formulas and what is saved in `block.py`.

N rows, D width, H heads, K head size, F MLP width, B batch, T positions, R rotary dimension.
"""

from __future__ import annotations

import torch

from phi1.kernels._attention import Mask, attention_backward, attention_forward
from phi1.kernels._gelu import gelu_backward, gelu_forward
from phi1.kernels._layer_norm import layer_norm_backward, layer_norm_forward
from phi1.kernels._philox import Dropout
from phi1.kernels._residual import dropped
from phi1.kernels._rotary import rotate_


def block_forward(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    in_weight: torch.Tensor,
    in_bias: torch.Tensor,
    out_weight: torch.Tensor,
    out_bias: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor],
    mask: Mask,
    *,
    n_heads: int,
    batch: int,
    cu_seqlens: torch.Tensor | None,
    eps: float,
    dense_dropout: Dropout | None,
    fc2_dropout: Dropout | None,
) -> tuple[torch.Tensor, ...]:
    """(x', mean [N], rstd [N], proj [N, 3D+F], att [N, D], lse [H, N]). Nothing is checked.

    rotary: cos and sin of each row, by `rows_of_tables`.
    """
    width = x.shape[1]
    h, mean, rstd = layer_norm_forward(x, norm_weight, norm_bias, eps)
    proj = torch.addmm(in_bias, h, in_weight.t())
    qkv, pre = _parts(proj, width, n_heads)
    rotate_(qkv[:, :2], *rotary)
    att, lse = attention_forward(*_by_sample(qkv, batch), mask, cu_seqlens)
    att = att.view(x.shape)
    if dense_dropout is None and fc2_dropout is None:
        y = torch.addmm(x + out_bias.sum(0), _joined(att, pre), out_weight.t())
        return y, mean, rstd, proj, att, lse
    dense_weight, fc2_weight = out_weight.t().split_with_sizes([width, pre.shape[1]])
    y = x + dropped(torch.addmm(out_bias[0], att, dense_weight), dense_dropout, cu_seqlens)
    y += dropped(torch.addmm(out_bias[1], gelu_forward(pre), fc2_weight), fc2_dropout, cu_seqlens)
    return y, mean, rstd, proj, att, lse


def block_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    in_weight: torch.Tensor,
    out_weight: torch.Tensor,
    saved: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    rotary: tuple[torch.Tensor, torch.Tensor],
    mask: Mask,
    *,
    batch: int,
    cu_seqlens: torch.Tensor | None,
    eps: float,
    dense_dropout: Dropout | None,
    fc2_dropout: Dropout | None,
) -> tuple[torch.Tensor, ...]:
    """Gradients of x, norm_weight, norm_bias, in_weight, in_bias, out_weight, out_bias. Nothing is checked.

    saved: what `block_forward` returned after x'.
    """
    mean, rstd, proj, att, lse = saved
    width, n_heads = x.shape[1], lse.shape[0]
    qkv, pre = _parts(proj, width, n_heads)
    dproj = torch.empty_like(proj)
    dqkv, dpre = _parts(dproj, width, n_heads)
    datt, dw_out, db_out = _output_backward(dy, att, pre, out_weight, dense_dropout, fc2_dropout, cu_seqlens, dpre)
    q, k, v = _by_sample(qkv, batch)
    attention_backward(datt.unflatten(1, (n_heads, -1)).unflatten(0, q.shape[:2]), q, k, v, att.view(q.shape), lse,
                       _by_sample(dqkv, batch), mask, cu_seqlens)
    rotate_(dqkv[:, :2], *rotary, inverse=True)
    h = layer_norm_forward(x, norm_weight, norm_bias, eps)[0]
    dw_in = torch.mm(dproj.t(), h)
    dx, dw_norm, db_norm = layer_norm_backward(torch.mm(dproj, in_weight), x, norm_weight, mean, rstd, dy)
    return dx, dw_norm, db_norm, dw_in, dproj.sum(0), dw_out, db_out


def _output_backward(
    dy, att, pre, out_weight, dense_dropout, fc2_dropout, cu_seqlens, dpre
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(datt [N, D], dw_out [D, D+F], db_out [2, D]); dpre [N, F] is filled."""
    sizes = [att.shape[1], pre.shape[1]]
    joined = att.new_empty((att.shape[0], sum(sizes)))
    joined[:, : sizes[0]] = att
    act = joined[:, sizes[0] :]
    if dense_dropout is None and fc2_dropout is None:
        datt, dact = torch.mm(dy, out_weight).split_with_sizes(sizes, dim=1)
        gelu_backward(dact, pre, dpre, act)
        return datt, torch.mm(dy.t(), joined), dy.sum(0).expand(2, -1).contiguous()
    dy1, dy2 = dropped(dy, dense_dropout, cu_seqlens), dropped(dy, fc2_dropout, cu_seqlens)
    dense_weight, fc2_weight = out_weight.split_with_sizes(sizes, dim=1)
    gelu_backward(torch.mm(dy2, fc2_weight), pre, dpre, act)
    dw_out = torch.cat((torch.mm(dy1.t(), att), torch.mm(dy2.t(), act)), dim=1)
    return torch.mm(dy1, dense_weight), dw_out, torch.stack((dy1.sum(0), dy2.sum(0)))


def _parts(proj: torch.Tensor, width: int, n_heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of proj [N, 3D+F]: qkv [N, 3, H, K] and pre [N, F]."""
    return proj[:, : 3 * width].unflatten(1, (3, n_heads, width // n_heads)), proj[:, 3 * width :]


def _by_sample(qkv: torch.Tensor, batch: int) -> tuple[torch.Tensor, ...]:
    """[N, 3, H, K] -> q, k, v [B, T, H, K], views."""
    return qkv.unflatten(0, (batch, qkv.shape[0] // batch)).unbind(2)


def _joined(att: torch.Tensor, pre: torch.Tensor) -> torch.Tensor:
    """[att | gelu_new(pre)] [N, D+F]: copying att costs less than a second product's rounding and traffic."""
    width = att.shape[1]
    joined = att.new_empty((att.shape[0], width + pre.shape[1]))
    joined[:, :width] = att
    gelu_forward(pre, out=joined[:, width:])
    return joined
