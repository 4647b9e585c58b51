"""phi's parallel block as one operation: two merged projections around attention (arXiv 2306.11644, section 2.3).

    h = layer_norm(x)
    [q | k | v | pre] = h W_in^T + b_in
    att = attention(rotary(q), rotary(k), v)        act = gelu_new(pre)
    x' = x + drop(att W_dense^T + b_dense) + drop(act W_fc2^T + b_fc2)

Without dropout on the branches [att | act] W_out^T is one product with one accumulator over D + F. In the backward,
dx = layer_norm'([dqkv | dpre] W_in) + dx' is one product over 3D + F, and dW_in, dW_out one each; with dropout on a
branch the two branches have their own. h, its statistics and act are computed again in the backward. Saved: x, and

    recompute="none"     qkv (of the Triton kernels with q and k rotated), pre, att, lse
    recompute="mlp"      qkv, att, lse; pre is one product more
    recompute="block"    no more: all but the output projection is computed again. So also where no backward follows

All three have the same bits. Statistics, softmax and lse are float32. Deterministic. What runs is in `_block.py`.

N rows, D width, H heads, K head size, F MLP width, B batch, T positions, R rotary dimension.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from phi1.kernels.attention.attention_qkv import attention_qkv_reference
from phi1.kernels.block.eager import (
    branches_again,
    branches_backward,
    branches_forward,
    layout_of,
    rotate_keys,
)
from phi1.kernels.block.rules import check_block, check_without_gradients, wants_gradients
from phi1.kernels.core.backend import operator, reference_forced, use_triton
from phi1.kernels.core.checks import require
from phi1.kernels.core.philox import Dropout, is_active
from phi1.kernels.pointwise.dropout import dropped
from phi1.kernels.pointwise.gelu import gelu_new
from phi1.kernels.pointwise.layer_norm import layer_norm_backward, layer_norm_forward, layer_norm_reference
from phi1.kernels.pointwise.rotary import rotate_reference

NO_DROPOUT: tuple[None, None, None] = (None, None, None)
RECOMPUTE = ("none", "mlp", "block")
PREFILL = "prefill"  # of the operator: no backward follows, and of qkv the rotated keys and the values are wanted


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
    layout = layout_of(x, cos, sin, positions, cu_seqlens, seq_starts, rng, sample_ids, n_heads, batch, ps, layers,
                       kinds)
    h = layer_norm_forward(x, norm_weight, norm_bias, eps)[0]
    y, qkv, pre, att, lse = branches_forward(h, x, in_weight, in_bias, out_weight, out_bias, layout,
                                             keeps_pre=recompute == "none")
    if recompute == PREFILL:
        rotate_keys(qkv, layout)
    elif recompute == "block":
        qkv = qkv.new_empty(0)
    if recompute in ("block", PREFILL):
        att, lse = att.new_empty(0), lse.new_empty(0)
    return y, qkv, pre, att, lse


@_parallel_block_op.register_fake
def _(x: torch.Tensor, norm_weight, norm_bias, in_weight: torch.Tensor, in_bias, out_weight, out_bias, cos, sin,
      positions, cu_seqlens, seq_starts, rng, sample_ids, n_heads: int, batch, ps, layers, kinds, eps, recompute: str):
    n_rows, width = x.shape
    keeps_att = recompute in ("none", "mlp")
    qkv = x.new_empty((0,) if recompute == "block" else (n_rows, 3, width) if use_triton(x) else (n_rows, 3 * width))
    pre = x.new_empty((n_rows, in_weight.shape[0] - 3 * width) if recompute == "none" else (0,))
    att = x.new_empty(x.shape if keeps_att else (0,))
    lse = x.new_empty((n_heads, n_rows) if keeps_att else (0,), dtype=torch.float32)
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
    layout = layout_of(x, cos, sin, positions, cu_seqlens, seq_starts, rng, sample_ids, n_heads, batch, ps, layers,
                       kinds)
    dy = dy.contiguous()
    h, mean, rstd = layer_norm_forward(x, norm_weight, norm_bias, eps)
    if recompute != "none":
        qkv, pre, att, lse = branches_again(h, in_weight, in_bias, qkv, att, lse, layout, recompute)
    dh, din_weight, din_bias, dout_weight, dout_bias = branches_backward(
        dy, h, in_weight, out_weight, qkv, pre, att, lse, layout)
    dx, dnorm_weight, dnorm_bias = layer_norm_backward(dh, x, norm_weight, mean, rstd, dy)
    return dx, dnorm_weight, dnorm_bias, din_weight, din_bias, dout_weight, dout_bias


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
    require(recompute in RECOMPUTE, op, f"recompute must be one of {', '.join(RECOMPUTE)}", repr(recompute))
    batch, positions = check_block(op, x, parameters, cos, sin, n_heads, batch, cu_seqlens, seq_starts, positions, eps,
                                   dropouts)
    if reference_forced():
        return parallel_block_reference(x, *parameters, cos, sin, n_heads=n_heads, batch=batch, cu_seqlens=cu_seqlens,
                                        seq_starts=seq_starts, positions=positions, eps=eps, dropouts=dropouts)
    if not wants_gradients(x, *parameters):
        recompute = "block"
    active = [d if is_active(d) else None for d in dropouts]
    ps, layers, kinds = zip(*((d.p, d.layer, d.kind) if d else (0.0, 0, 0) for d in active), strict=True)
    rng, sample_ids = next(((d.rng, d.sample_ids) for d in active if d), (None, None))
    return torch.ops.phi1.parallel_block(x, *parameters, cos, sin, positions, cu_seqlens, seq_starts, rng, sample_ids,
                                         n_heads, batch, ps, layers, kinds, eps, recompute)[0]


def parallel_block_prefill(
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
    seq_starts: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`parallel_block` of prompts, and the keys and values that decoding needs of it. It has no backward.

    Args:
        all: as for `parallel_block`; none may want a gradient.

    Returns:
        (out [N, D], keys [N, H, K], rotated, values [N, H, K]), keys and values views of one tensor.

    Raises:
        TypeError, ValueError: as `parallel_block`; a gradient is wanted.
    """
    op, parameters = "parallel_block_prefill", (norm_weight, norm_bias, in_weight, in_bias, out_weight, out_bias)
    batch, positions = check_block(op, x, parameters, cos, sin, n_heads, batch, None, seq_starts, positions, eps,
                                   NO_DROPOUT)
    if reference_forced():
        out = parallel_block_reference(x, *parameters, cos, sin, n_heads=n_heads, batch=batch, seq_starts=seq_starts,
                                       positions=positions, eps=eps)
        h = layer_norm_reference(x, norm_weight, norm_bias, eps)
        qkv = torch.nn.functional.linear(h, in_weight, in_bias)[:, : 3 * x.shape[1]].unflatten(1, (3, n_heads, -1))
        return out, rotate_reference(qkv[:, 1:2], cos, sin, positions)[:, 0], qkv[:, 2]
    check_without_gradients(op, x, *parameters)
    out, qkv, *_ = torch.ops.phi1.parallel_block(x, *parameters, cos, sin, positions, None, seq_starts, None, None,
                                                 n_heads, batch, (0.0,) * 3, (0,) * 3, (0,) * 3, eps, PREFILL)
    _, keys, values = qkv.flatten(1).unflatten(1, (3, n_heads, -1)).unbind(1)
    return out, keys, values


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
