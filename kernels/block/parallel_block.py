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

All three have the same bits. Statistics, softmax and lse are float32. Deterministic.

N rows, D width, H heads, K head size, F MLP width, B batch, T positions, R rotary dimension.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from phi1.kernels.attention.attention_qkv import attention_qkv_reference
from phi1.kernels.block.dispatch import branches_again, branches_backward, branches_forward
from phi1.kernels.block.rules import NO_DROPOUT, check_block, wants_gradients
from phi1.kernels.block.spec import BlockSpec, Parameters, Saved
from phi1.kernels.core.backend import operator, reference_forced, use_triton
from phi1.kernels.core.checks import require
from phi1.kernels.core.philox import Dropout, is_active
from phi1.kernels.pointwise.dropout import dropped
from phi1.kernels.pointwise.gelu import gelu_new
from phi1.kernels.pointwise.layer_norm import layer_norm_backward, layer_norm_forward, layer_norm_reference

RECOMPUTE = ("none", "mlp", "block")


@operator("phi1::parallel_block")
def _parallel_block_op(
    x: torch.Tensor,
    parameters: Sequence[torch.Tensor],
    rotary: Sequence[torch.Tensor],
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
    own = Parameters(*parameters)
    spec = BlockSpec.of(x, rotary, cu_seqlens, seq_starts, rng, sample_ids, n_heads, batch, ps, layers, kinds)
    h = layer_norm_forward(x, own.norm_weight, own.norm_bias, eps)[0]
    y, saved = branches_forward(h, x, own, spec, keeps_pre=recompute == "none")
    if recompute == "block":
        saved = Saved(*(kept.new_empty(0) for kept in saved))
    return y, *saved


@_parallel_block_op.register_fake
def _(x, parameters, rotary, cu_seqlens, seq_starts, rng, sample_ids, n_heads, batch, ps, layers, kinds, eps,
      recompute):
    (n_rows, width), rows = x.shape, parameters[2].shape[0]
    keeps = recompute != "block"
    qkv = x.new_empty((0,) if not keeps else (n_rows, 3, width) if use_triton(x) else (n_rows, 3 * width))
    pre = x.new_empty((n_rows, rows - 3 * width) if recompute == "none" else (0,))
    att = x.new_empty(x.shape if keeps else (0,))
    return x.new_empty(x.shape), qkv, pre, att, x.new_empty((n_heads, n_rows) if keeps else (0,), dtype=torch.float32)


@operator("phi1::parallel_block_backward")
def _parallel_block_backward_op(
    dy: torch.Tensor,
    x: torch.Tensor,
    parameters: Sequence[torch.Tensor],
    saved: Sequence[torch.Tensor],
    rotary: Sequence[torch.Tensor],
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
    own, kept = Parameters(*parameters), Saved(*saved)
    spec = BlockSpec.of(x, rotary, cu_seqlens, seq_starts, rng, sample_ids, n_heads, batch, ps, layers, kinds)
    dy = dy.contiguous()
    h, mean, rstd = layer_norm_forward(x, own.norm_weight, own.norm_bias, eps)
    if recompute != "none":
        kept = branches_again(h, own, kept, spec, recompute)
    dh, *others = branches_backward(dy, h, own, kept, spec)
    dx, dnorm_weight, dnorm_bias = layer_norm_backward(dh, x, own.norm_weight, mean, rstd, dy)
    din_weight, din_bias, dout_weight, dout_bias = others
    return dx, dnorm_weight, dnorm_bias, din_weight, din_bias, dout_weight, dout_bias


@_parallel_block_backward_op.register_fake
def _(dy, x, parameters, *_):
    return tuple(tensor.new_empty(tensor.shape) for tensor in (x, *parameters))


def _setup(ctx, inputs, output) -> None:
    x, parameters, rotary, *packing_and_rng = inputs[:7]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # or autograd fills zeros for what is saved
    ctx.save_for_backward(x, *parameters, *output[1:], *rotary, *packing_and_rng)
    ctx.constants = inputs[7:]


def _autograd(ctx, dy, *_):
    others = [None] * (len(ctx.needs_input_grad) - 3)  # of the arguments behind x, parameters and rotary
    if dy is None:
        return None, [None] * 6, [None] * 3, *others
    x, *tensors = ctx.saved_tensors
    parameters, saved, rotary, packing_and_rng = tensors[:6], tensors[6:10], tensors[10:13], tensors[13:]
    dx, *gradients = torch.ops.phi1.parallel_block_backward(dy, x, parameters, saved, rotary, *packing_and_rng,
                                                            *ctx.constants)
    return dx, gradients, [None] * 3, *others


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
    op, parameters = "parallel_block", Parameters(norm_weight, norm_bias, in_weight, in_bias, out_weight, out_bias)
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
    return torch.ops.phi1.parallel_block(x, parameters, (cos, sin, positions), cu_seqlens, seq_starts, rng, sample_ids,
                                         n_heads, batch, ps, layers, kinds, eps, recompute)[0]


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
