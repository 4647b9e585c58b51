"""Linear layer and cross-entropy in one operation that never holds all [N, V] logits. `dispatch.py` has the formulas.

With reduction "mean" or "sum" the forward computes the gradients that the inputs require and saves them instead of the
inputs (float16's as float32, times 2^10). The backward only scales them. With "none" each row has its own incoming
gradient, so the backward computes the logits again.

N rows, D width, V vocabulary.
"""

from __future__ import annotations

import torch

from phi1.kernels.core.backend import operator, reference_forced
from phi1.kernels.core.checks import (
    check_alike,
    check_device,
    check_dtype,
    check_flag,
    check_float,
    check_range,
    check_rank,
    check_real,
    check_shape,
    check_tensors,
    check_whole,
    require,
)
from phi1.kernels.cross_entropy.dispatch import losses_and_gradients, scaled
from phi1.kernels.cross_entropy.spec import LossRule, Needs, gradient_dtype, scale_of

REDUCTIONS = ("mean", "sum", "none")


@operator("phi1::linear_cross_entropy")
def _linear_cross_entropy_op(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    valid_vocab: int,
    workspace_mb: int,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
    inputs: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    rule = LossRule(ignore_index, label_smoothing, z_loss, valid_vocab, workspace_mb << 20)
    needs = Needs(need_x, need_weight, need_bias)
    losses, lse, dx, dw, db = losses_and_gradients(x, weight, bias, targets, rule, needs)
    if reduction == "none":
        return losses, lse, dx, dw, db
    loss = losses.sum()
    if reduction == "mean":
        loss = loss / (targets != ignore_index).sum()
    return loss, lse, dx, dw, db


@_linear_cross_entropy_op.register_fake
def _(x, weight, bias, targets, reduction, ignore_index, label_smoothing, z_loss, valid_vocab, workspace_mb,
      need_x, need_weight, need_bias, inputs=None):
    lse = x.new_empty((x.shape[0],), dtype=torch.float32)
    loss = torch.empty_like(lse) if reduction == "none" else x.new_empty((), dtype=torch.float32)
    kept = gradient_dtype(x.dtype)
    dx = x.new_empty(x.shape if need_x else (0,), dtype=kept)
    dw = x.new_empty(weight.shape if need_weight else (0,), dtype=kept)
    return loss, lse, dx, dw, x.new_empty((weight.shape[0] if need_bias else 0,), dtype=torch.float32)


@operator("phi1::linear_cross_entropy_backward")
def _linear_cross_entropy_backward_op(
    dloss: torch.Tensor,
    dx: torch.Tensor,
    dw: torch.Tensor,
    db: torch.Tensor,
    targets: torch.Tensor,
    reduction: str,
    ignore_index: int,
    like: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    factor = dloss / scale_of(like.dtype)
    if reduction == "mean":
        factor = factor / (targets != ignore_index).sum().clamp(min=1)  # without targets the gradients are 0
    return scaled(dx, factor, like.dtype), scaled(dw, factor, like.dtype), scaled(db, factor, like.dtype)


@_linear_cross_entropy_backward_op.register_fake
def _(dloss, dx, dw, db, targets, reduction, ignore_index, like):
    return tuple(gradient.new_empty(gradient.shape, dtype=like.dtype) for gradient in (dx, dw, db))


@operator("phi1::linear_cross_entropy_rows_backward")
def _rows_backward_op(
    dloss: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    valid_vocab: int,
    workspace_mb: int,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rule = LossRule(ignore_index, label_smoothing, z_loss, valid_vocab, workspace_mb << 20)
    # Row weights are at most 1, because a loss scale in dloss would overflow float16.
    largest = dloss.abs().amax() if dloss.numel() else dloss.new_ones(())
    largest = torch.where(largest > 0, largest, torch.ones_like(largest))
    _, _, *gradients = losses_and_gradients(x, weight, bias, targets, rule, Needs(need_x, need_weight, need_bias),
                                            dloss / largest)
    dx, dw, db = (scaled(gradient, largest / scale_of(x.dtype), x.dtype) for gradient in gradients)
    return dx, dw, db


@_rows_backward_op.register_fake
def _(dloss, x, weight, bias, targets, ignore_index, label_smoothing, z_loss, valid_vocab, workspace_mb,
      need_x, need_weight, need_bias):
    dx, dw = x.new_empty(x.shape if need_x else (0,)), weight.new_empty(weight.shape if need_weight else (0,))
    return dx, dw, x.new_empty((weight.shape[0] if need_bias else 0,))


def _setup(ctx, inputs, output) -> None:
    x, weight, bias, targets, reduction, *numbers = inputs
    _, lse, *gradients = output
    ctx.mark_non_differentiable(lse, *gradients)
    ctx.set_materialize_grads(False)
    ctx.reduction, ctx.numbers, ctx.dtype = reduction, numbers, x.dtype
    if reduction == "none":
        ctx.save_for_backward(x, weight, bias, targets)
    else:
        ctx.save_for_backward(*gradients, targets, numbers.pop())


def _autograd(ctx, dloss, *_):
    if dloss is None:
        return (None,) * len(ctx.needs_input_grad)
    wanted = ctx.needs_input_grad[:3]
    if ctx.reduction == "none":
        gradients = torch.ops.phi1.linear_cross_entropy_rows_backward(dloss, *ctx.saved_tensors, *ctx.numbers[:5],
                                                                      *wanted)
    else:
        *saved, inputs = ctx.saved_tensors
        if torch.is_grad_enabled() and inputs is not None:
            # With create_graph the saved gradients are constants, so a second backward must raise: not give 0 or None.
            dloss = dloss + inputs.sum()
        like = dloss.new_empty(0, dtype=ctx.dtype)
        gradients = torch.ops.phi1.linear_cross_entropy_backward(dloss, *saved, ctx.reduction, ctx.numbers[0], like)
    return *(g if want else None for g, want in zip(gradients, wanted, strict=True)), *[None] * 11


_linear_cross_entropy_op.register_autograd(_autograd, setup_context=_setup)


def linear_cross_entropy(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    *,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    valid_vocab: int | None = None,
    return_lse: bool = False,
    workspace_mb: int = 256,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Return the cross-entropy, in nats, of the logits x W^T + b against target ids.

    Args:
        x: [N, D], float16, bfloat16 or float32.
        weight: [V, D], x's dtype.
        bias: [V], x's dtype, or None.
        targets: [N] int64, each at least 0 and less than valid_vocab, or ignore_index. Checked on CPU and under
            `check_values(True)`; if not checked, a row with another target has loss NaN.
        reduction: "mean" over the targets that are not ignored, "sum", or "none" for [N]. If all targets are ignored,
            the mean is NaN and its gradients are 0.
        ignore_index: the target of rows that have loss 0 and no gradient.
        label_smoothing: the part of the target's weight that is spread evenly over all columns; at least 0, less than
            1.
        z_loss: factor of lse^2 added to each row's loss, at least 0. Float16 gradients overflow if z_loss * lse is 31
            or more.
        valid_vocab: the number of columns that count; V by default. The columns behind them are ignored.
        return_lse: also return log sum exp of each row's logits, float32 [N], which has no gradient.
        workspace_mb: MiB for logits and temporaries. Not included are the gradients, a few numbers for each row, and a
            float32 sum of the weight's gradient, 4 V D bytes, if the rows need more than one chunk or are float16.

    Returns:
        float32 loss, a scalar or [N]; with return_lse, (loss, lse).

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: a shape, a device, a number or a target breaks its rule.

    Source: label smoothing as in Szegedy et al., arXiv 1512.00567; z-loss as in Chowdhery et al., arXiv 2204.02311.
    """
    check_flag("linear_cross_entropy", return_lse=return_lse)
    vocab = _check("linear_cross_entropy", x, weight, bias, targets, reduction, ignore_index, label_smoothing, z_loss,
                   valid_vocab, workspace_mb)
    if reference_forced():
        return linear_cross_entropy_reference(x, weight, bias, targets, reduction=reduction, ignore_index=ignore_index,
                                              label_smoothing=label_smoothing, z_loss=z_loss, valid_vocab=vocab,
                                              return_lse=return_lse)
    in_forward = torch.is_grad_enabled() and reduction != "none"
    given = [tensor for tensor in (x, weight, bias) if tensor is not None]
    needs = [in_forward and tensor is not None and tensor.requires_grad for tensor in (x, weight, bias)]
    # An empty tensor that depends on all inputs and holds none of their memory.
    inputs = torch.cat([tensor[:0].flatten() for tensor in given]) if any(needs) else None
    loss, lse, *_ = torch.ops.phi1.linear_cross_entropy(
        x, weight, bias, targets, reduction, ignore_index, float(label_smoothing), float(z_loss), vocab, workspace_mb,
        *needs, inputs,
    )
    return (loss, lse) if return_lse else loss


def _check(op, x, weight, bias, targets, reduction, ignore_index, label_smoothing, z_loss, valid_vocab,
           workspace_mb) -> int:
    given = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    check_tensors(op, x=x, targets=targets, **given)
    check_float(op, "x", x)
    check_alike(op, "x", x, **given)
    check_rank(op, "x", x, "N, D")
    check_rank(op, "weight", weight, "V, D")
    vocab = weight.shape[0]
    check_shape(op, "weight", weight, (vocab, x.shape[1]), f"columns as many as x's {list(x.shape)}")
    if bias is not None:
        check_shape(op, "bias", bias, (vocab,), f"one per row of weight {list(weight.shape)}")
    check_dtype(op, "targets", targets, torch.int64)
    check_device(op, "targets", targets, "x", x)
    check_shape(op, "targets", targets, x.shape[:1], f"one per row of x {list(x.shape)}")
    require(reduction in REDUCTIONS, op, f"reduction must be one of {', '.join(REDUCTIONS)}", repr(reduction))
    valid_vocab = vocab if valid_vocab is None else valid_vocab
    check_whole(op, ignore_index=ignore_index, workspace_mb=workspace_mb, valid_vocab=valid_vocab)
    check_real(op, label_smoothing=label_smoothing, z_loss=z_loss)
    require(0 <= label_smoothing < 1, op, "label_smoothing must be at least 0 and less than 1", label_smoothing)
    require(z_loss >= 0, op, "z_loss must be at least 0", z_loss)
    require(workspace_mb >= 1, op, "workspace_mb must be at least 1", workspace_mb)
    require(1 <= valid_vocab <= vocab, op, f"valid_vocab must be between 1 and weight's {vocab} rows", valid_vocab)
    check_range(op, "targets", targets, 0, valid_vocab, "the valid vocabulary", also=ignore_index)
    return valid_vocab


def linear_cross_entropy_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    *,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    valid_vocab: int | None = None,
    return_lse: bool = False,
    workspace_mb: int = 256,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Compute `linear_cross_entropy` in plain differentiable PyTorch, with all logits in memory.

    workspace_mb is not used.
    """
    vocab = weight.shape[0] if valid_vocab is None else valid_vocab
    logits = torch.nn.functional.linear(x, weight[:vocab], None if bias is None else bias[:vocab])
    logits = logits.to(torch.promote_types(x.dtype, torch.float32))
    lse = logits.logsumexp(1)
    own = logits.gather(1, targets.clamp(0, vocab - 1)[:, None])[:, 0]
    loss = lse - (1 - label_smoothing) * own - label_smoothing * logits.mean(1) + z_loss * lse.square()
    counted = targets != ignore_index
    loss = torch.where((targets >= 0) & (targets < vocab), loss, torch.nan).masked_fill(~counted, 0)
    if reduction != "none":
        loss = loss.sum() / counted.sum() if reduction == "mean" else loss.sum()
    return (loss, lse.detach()) if return_lse else loss
