"""phi's MLP: two linear layers with gelu_new between them.

    pre = x W1^T + b1        act = gelu_new(pre)        out = act W2^T + b2

Products accumulate in float32 and are rounded to x's dtype. Saved for the backward: x, pre and the weights; act is
computed again, together with the derivative.

N rows, D width, F MLP width.
"""

from __future__ import annotations

import torch
from torch.nn.functional import linear

from phi1.kernels.core.backend import operator, reference_forced, use_triton
from phi1.kernels.core.checks import check_alike, check_float, check_rank, check_shape, check_tensors
from phi1.kernels.core.cpu_matmul import mm
from phi1.kernels.gemm.linear import linear_forward
from phi1.kernels.pointwise.gelu import gelu_backward, gelu_new


def mlp_forward(
    x: torch.Tensor, w1: torch.Tensor, b1: torch.Tensor, w2: torch.Tensor, b2: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [N, D], pre [N, F])."""
    act, pre = linear_forward(x, w1, b1, None, True, None)
    return linear_forward(act, w2, b2, None, False, None)[0], pre


def mlp_backward(
    dout: torch.Tensor, x: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, pre: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, w1, b1, w2, b2."""
    act = torch.empty_like(pre)
    if use_triton(x):
        from phi1.kernels.gemm.mlp_triton import launch_dgelu
        from phi1.kernels.pointwise.epilogue_triton import launch_epilogue_backward

        dpre = torch.empty_like(pre)
        db1 = launch_dgelu(dout, w2, pre, dpre, act)
        db2 = launch_epilogue_backward(dout, None, None, bias=True)
        assert db2 is not None
    else:
        dout = dout.contiguous()
        dpre = gelu_backward(mm(dout, w2), pre, y=act)
        db1, db2 = dpre.sum(0), dout.sum(0)
    return mm(dpre, w1), mm(dpre.t(), x), db1, mm(dout.t(), act), db2


@operator("phi1::mlp")
def _mlp_op(
    x: torch.Tensor, w1: torch.Tensor, b1: torch.Tensor, w2: torch.Tensor, b2: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return mlp_forward(x, w1, b1, w2, b2)


@_mlp_op.register_fake
def _(x: torch.Tensor, w1: torch.Tensor, b1, w2: torch.Tensor, b2):
    return x.new_empty((x.shape[0], w2.shape[0])), x.new_empty((x.shape[0], w1.shape[0]))


@operator("phi1::mlp_backward")
def _mlp_backward_op(
    dout: torch.Tensor, x: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, pre: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return mlp_backward(dout, x, w1, w2, pre)


@_mlp_backward_op.register_fake
def _(dout, x: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, pre):
    db1, db2 = x.new_empty((w1.shape[0],)), x.new_empty((w2.shape[0],))
    return x.new_empty(x.shape), w1.new_empty(w1.shape), db1, w2.new_empty(w2.shape), db2


def _setup(ctx, inputs, output) -> None:
    x, w1, _, w2, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # or autograd fills zeros for pre
    ctx.save_for_backward(x, w1, w2, output[1])


def _autograd(ctx, dout, _):
    if dout is None:
        return (None,) * 5
    return torch.ops.phi1.mlp_backward(dout, *ctx.saved_tensors)


_mlp_op.register_autograd(_autograd, setup_context=_setup)


def mlp(x: torch.Tensor, w1: torch.Tensor, b1: torch.Tensor, w2: torch.Tensor, b2: torch.Tensor) -> torch.Tensor:
    """gelu_new(x W1^T + b1) W2^T + b2.

    Args:
        x: [N, D], float16, bfloat16 or float32.
        w1: [F, D], x's dtype, as all parameters.
        b1: [F].
        w2: [D, F].
        b2: [D].

    Returns:
        [N, D] in x's dtype, contiguous.

    Raises:
        TypeError: an argument is not a tensor, or of another dtype.
        ValueError: a shape or a device breaks its rule.
    """
    op = "mlp"
    check_tensors(op, x=x, w1=w1, b1=b1, w2=w2, b2=b2)
    check_float(op, "x", x)
    check_alike(op, "x", x, w1=w1, b1=b1, w2=w2, b2=b2)
    check_rank(op, "x", x, "N, D")
    check_rank(op, "w1", w1, "F, D")
    width, inner = x.shape[1], w1.shape[0]
    check_shape(op, "w1", w1, (inner, width), f"columns as many as x's {list(x.shape)}")
    check_shape(op, "b1", b1, (inner,), f"one per row of w1 {list(w1.shape)}")
    check_shape(op, "w2", w2, (width, inner), f"w1's {list(w1.shape)} the other way round")
    check_shape(op, "b2", b2, (width,), f"one per row of w2 {list(w2.shape)}")
    if reference_forced():
        return mlp_reference(x, w1, b1, w2, b2)
    return torch.ops.phi1.mlp(x, w1, b1, w2, b2)[0]


def mlp_reference(
    x: torch.Tensor, w1: torch.Tensor, b1: torch.Tensor, w2: torch.Tensor, b2: torch.Tensor
) -> torch.Tensor:
    """`mlp` in plain differentiable PyTorch."""
    return linear(gelu_new(linear(x, w1, b1)), w2, b2)
