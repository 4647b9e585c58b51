"""phi's parallel block as one operation: two merged projections around attention (arXiv 2306.11644, section 2.3).

    h = layer_norm(x)
    [q | k | v | pre] = h W_in^T + b_in
    att = attention(rotary(q), rotary(k), v)        act = gelu_new(pre)
    x' = x + drop(att W_dense^T + b_dense) + drop(act W_fc2^T + b_fc2)

Without dropout on the branches [att | act] W_out^T is one product with one accumulator over D + F. In the backward,
dx = layer_norm'([dqkv | dpre] W_in) + dx' is one product over 3D + F, and dW_in, dW_out one each; with dropout on a
branch the two branches have their own. h, its statistics and act are computed again in the backward. Saved: x, and

    recompute="none"     qkv, pre, att, lse
    recompute="mlp"      qkv, att, lse; pre is one product more
    recompute="block"    no more: all but the output projection is computed again. So also where no backward follows

All three have the same bits. Statistics, softmax and lse are float32. Deterministic. What runs is in `_block.py`.

N rows, D width, H heads, K head size, F MLP width, B batch, T positions, R rotary dimension.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from phi1.kernels._attention import Scheme
from phi1.kernels._attention_rules import check_packing
from phi1.kernels._backend import operator, reference_forced
from phi1.kernels._block import Layout, branches_again, branches_backward, branches_forward
from phi1.kernels._checks import (
    check_alike,
    check_dropout,
    check_float,
    check_rank,
    check_shape,
    check_tensors,
    require,
)
from phi1.kernels._gelu import gelu_new
from phi1.kernels._philox import Dropout, dropout_from_fields, is_active
from phi1.kernels._residual import dropped
from phi1.kernels._rotary import check_positions, check_tables, default_positions
from phi1.kernels.attention_qkv import attention_qkv_reference
from phi1.kernels.layer_norm import layer_norm_backward, layer_norm_forward, layer_norm_reference

NO_DROPOUT: tuple[None, None, None] = (None, None, None)
RECOMPUTE = ("none", "mlp", "block")


def _layout(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor, cu_seqlens: torch.Tensor | None,
    seq_starts: torch.Tensor | None, rng: torch.Tensor | None, sample_ids: torch.Tensor | None, n_heads: int,
    batch: int, ps: Sequence[float], layers: Sequence[int], kinds: Sequence[int],
) -> Layout:
    attention, dense, fc2 = (
        dropout_from_fields(p, rng if p else None, sample_ids, layer, kind)
        for p, layer, kind in zip(ps, layers, kinds, strict=True)
    )
    scheme = Scheme(True, (x.shape[1] // n_heads) ** -0.5, seq_starts, (cos, sin, positions), attention)
    return Layout(n_heads, batch, cu_seqlens, scheme, dense, fc2)


@operator("phi1::parallel_block")
def _parallel_block_op(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    in_weight: torch.Tensor,
    in_bias: torch.Tensor,
    out_weight: torch.Tensor,
    out_bias: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    seq_starts: torch.Tensor | None,
    rng: torch.Tensor | None,
    sample_ids: torch.Tensor | None,
    n_heads: int,
    batch: int,
    ps: Sequence[float],
    layers: Sequence[int],
    kinds: Sequence[int],
    eps: float,
    recompute: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    layout = _layout(x, cos, sin, positions, cu_seqlens, seq_starts, rng, sample_ids, n_heads, batch, ps, layers, kinds)
    h = layer_norm_forward(x, norm_weight, norm_bias, eps)[0]
    y, qkv, pre, att, lse = branches_forward(h, x, in_weight, in_bias, out_weight, out_bias, layout,
                                             keeps_pre=recompute == "none")
    if recompute == "block":
        qkv, att, lse = qkv.new_empty(0), att.new_empty(0), lse.new_empty(0)
    return y, qkv, pre, att, lse


@_parallel_block_op.register_fake
def _(x: torch.Tensor, norm_weight, norm_bias, in_weight: torch.Tensor, in_bias, out_weight, out_bias, cos, sin,
      positions, cu_seqlens, seq_starts, rng, sample_ids, n_heads: int, batch, ps, layers, kinds, eps, recompute: str):
    n_rows, width = x.shape
    kept, keeps_pre = recompute != "block", recompute == "none"
    lse = x.new_empty((n_heads, n_rows) if kept else (0,), dtype=torch.float32)
    qkv, att = (x.new_empty((n_rows, columns) if kept else (0,)) for columns in (3 * width, width))
    pre = x.new_empty((n_rows, in_weight.shape[0] - 3 * width) if keeps_pre else (0,))
    return x.new_empty(x.shape), qkv, pre, att, lse


@operator("phi1::parallel_block_backward")
def _parallel_block_backward_op(
    dy: torch.Tensor,
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    in_weight: torch.Tensor,
    in_bias: torch.Tensor,
    out_weight: torch.Tensor,
    qkv: torch.Tensor,
    pre: torch.Tensor,
    att: torch.Tensor,
    lse: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    seq_starts: torch.Tensor | None,
    rng: torch.Tensor | None,
    sample_ids: torch.Tensor | None,
    n_heads: int,
    batch: int,
    ps: Sequence[float],
    layers: Sequence[int],
    kinds: Sequence[int],
    eps: float,
    recompute: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    layout = _layout(x, cos, sin, positions, cu_seqlens, seq_starts, rng, sample_ids, n_heads, batch, ps, layers, kinds)
    dy = dy.contiguous()
    h, mean, rstd = layer_norm_forward(x, norm_weight, norm_bias, eps)
    if recompute != "none":
        qkv, pre, att, lse = branches_again(h, in_weight, in_bias, qkv, att, lse, layout, recompute)
    dh, *others = branches_backward(dy, h, in_weight, out_weight, qkv, pre, att, lse, layout)
    return *layer_norm_backward(dh, x, norm_weight, mean, rstd, dy), *others


@_parallel_block_backward_op.register_fake
def _(dy, x, norm_weight, norm_bias, in_weight, in_bias, out_weight, *_):
    inputs = (x, norm_weight, norm_bias, in_weight, in_bias, out_weight)
    return *(tensor.new_empty(tensor.shape) for tensor in inputs), x.new_empty((2, x.shape[1]))


def _setup(ctx, inputs, output) -> None:
    x, norm_weight, norm_bias, in_weight, in_bias, out_weight, _, *others = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # or autograd fills zeros for what is saved
    tensors, ctx.constants = others[:7], others[7:]
    ctx.save_for_backward(x, norm_weight, norm_bias, in_weight, in_bias, out_weight, *output[1:], *tensors)


def _autograd(ctx, dy, *_):
    if dy is None:
        return (None,) * 21
    gradients = torch.ops.phi1.parallel_block_backward(dy, *ctx.saved_tensors, *ctx.constants)
    return *gradients, *[None] * 14


_parallel_block_op.register_autograd(_autograd, setup_context=_setup)


def parallel_block(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    in_weight: torch.Tensor,
    in_bias: torch.Tensor,
    out_weight: torch.Tensor,
    out_bias: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    n_heads: int,
    batch: int | None = None,
    cu_seqlens: torch.Tensor | None = None,
    seq_starts: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    eps: float = 1e-5,
    dropouts: tuple[Dropout | None, Dropout | None, Dropout | None] = NO_DROPOUT,
    recompute: str = "none",
) -> torch.Tensor:
    """One layer of phi: attention and MLP side by side on one layer norm, added to the residual stream.

    Args:
        x: [N, D], float16, bfloat16 or float32.
        norm_weight, norm_bias: [D], x's dtype, as all parameters.
        in_weight: [3D + F, D], rows q, k, v, fc1.
        in_bias: [3D + F].
        out_weight: [D, D + F], columns dense, fc2.
        out_bias: [2, D], rows dense, fc2.
        cos, sin: [T, R/2] float32 rotary tables, constants.
        n_heads: H; K = D / H.
        batch, cu_seqlens, seq_starts, positions: as for `attention_qkv`; attention is causal.
        eps: added to the norm's variance.
        dropouts: on the attention's probabilities, the dense branch and the MLP branch; those that are not None share
            rng and sample_ids.
        recompute: what the backward computes again rather than reads, for memory: "none"; "mlp", the MLP's
            pre-activation; "block", all between x and the output projection. It changes no bit.

    Returns:
        [N, D] in x's dtype.

    Raises:
        TypeError: an argument is not a tensor, or of another dtype.
        ValueError: a shape, a device or a value breaks its rule. Values inside tensors are checked on CPU and under
            `check_values(True)`.

    Source: Gunasekar et al., "Textbooks are all you need", arXiv 2306.11644, section 2.3.
    """
    op, parameters = "parallel_block", (norm_weight, norm_bias, in_weight, in_bias, out_weight, out_bias)
    _check(op, x, *parameters, n_heads, eps)
    require(recompute in RECOMPUTE, op, f"recompute must be one of {', '.join(RECOMPUTE)}", repr(recompute))
    batch = _check_rows(op, x, batch, cu_seqlens, seq_starts, dropouts, n_heads)
    check_tensors(op, cos=cos, sin=sin)
    check_tables(op, cos, sin, x, x.shape[1] // n_heads)
    if positions is None:
        positions = default_positions(x.shape[0], batch, cu_seqlens, seq_starts, x.device)
    check_tensors(op, positions=positions)
    check_positions(op, positions, x.shape[0], cos)
    if reference_forced():
        return parallel_block_reference(x, *parameters, cos, sin, n_heads=n_heads, batch=batch, cu_seqlens=cu_seqlens,
                                        seq_starts=seq_starts, positions=positions, eps=eps, dropouts=dropouts)
    if not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *parameters))):
        recompute = "block"
    active = [d if is_active(d) else None for d in dropouts]
    ps, layers, kinds = zip(*((d.p, d.layer, d.kind) if d else (0.0, 0, 0) for d in active), strict=True)
    rng, sample_ids = next(((d.rng, d.sample_ids) for d in active if d), (None, None))
    return torch.ops.phi1.parallel_block(x, *parameters, cos, sin, positions, cu_seqlens, seq_starts, rng, sample_ids,
                                         n_heads, batch, ps, layers, kinds, eps, recompute)[0]


def _check(op, x, norm_weight, norm_bias, in_weight, in_bias, out_weight, out_bias, n_heads, eps) -> None:
    parameters = {"norm_weight": norm_weight, "norm_bias": norm_bias, "in_weight": in_weight, "in_bias": in_bias,
                  "out_weight": out_weight, "out_bias": out_bias}
    check_tensors(op, x=x, **parameters)
    check_float(op, "x", x)
    check_alike(op, "x", x, **parameters)
    check_rank(op, "x", x, "N, D")
    check_rank(op, "in_weight", in_weight, "3D + F, D")
    width, rows = x.shape[1], in_weight.shape[0]
    require(n_heads >= 1 and width % n_heads == 0, op, f"n_heads must divide the {width} columns of x", n_heads)
    require(eps > 0, op, "eps must be greater than 0", eps)
    require(rows > 3 * width, op, f"in_weight must have more rows than 3 x the {width} columns of x", rows)
    why = f"for x {list(x.shape)} and in_weight {list(in_weight.shape)}"
    shapes = ((width,), (width,), (rows, width), (rows,), (width, rows - 2 * width), (2, width))
    for (name, parameter), shape in zip(parameters.items(), shapes, strict=True):
        check_shape(op, name, parameter, shape, why)


def _check_rows(op, x, batch, cu_seqlens, seq_starts, dropouts, n_heads) -> int:
    n_rows = x.shape[0]
    require(batch is None or cu_seqlens is None, op, "at most one of batch and cu_seqlens may be given", "both")
    batch = 1 if batch is None else batch
    require(batch >= 1 and n_rows % batch == 0, op, f"batch must divide the {n_rows} rows of x", batch)
    check_packing(op, x, batch, n_rows, n_rows // batch, cu_seqlens, seq_starts)
    require(len(dropouts) == 3, op, "dropouts must be three: attention, dense, fc2", len(dropouts))
    n_samples = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    for i, dropout in enumerate(dropouts):
        check_dropout(op, dropout, x, n_samples, n_heads if i == 0 else 1, f"dropouts[{i}]")
    given = [d for d in dropouts if d is not None]
    require(all(d.rng is given[0].rng and d.sample_ids is given[0].sample_ids for d in given), op,
            "dropouts must share one rng and one sample_ids", "different tensors")
    return batch


def parallel_block_reference(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    in_weight: torch.Tensor,
    in_bias: torch.Tensor,
    out_weight: torch.Tensor,
    out_bias: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    n_heads: int,
    batch: int | None = None,
    cu_seqlens: torch.Tensor | None = None,
    seq_starts: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    eps: float = 1e-5,
    dropouts: tuple[Dropout | None, Dropout | None, Dropout | None] = NO_DROPOUT,
) -> torch.Tensor:
    """`parallel_block` in plain differentiable PyTorch, with all scores in memory."""
    linear, width = torch.nn.functional.linear, x.shape[1]
    h = layer_norm_reference(x, norm_weight, norm_bias, eps)
    projected = linear(h, in_weight, in_bias)
    att = attention_qkv_reference(
        projected[:, : 3 * width].unflatten(1, (3, n_heads, -1)), batch=batch, cu_seqlens=cu_seqlens,
        rotary=(cos, sin), positions=positions, seq_starts=seq_starts, dropout=dropouts[0],
    )
    act = gelu_new(projected[:, 3 * width :])
    dense = linear(att, out_weight[:, :width], out_bias[0])
    fc2 = linear(act, out_weight[:, width:], out_bias[1])
    return x + dropped(dense, dropouts[1], cu_seqlens) + dropped(fc2, dropouts[2], cu_seqlens)
