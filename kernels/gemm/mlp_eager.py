"""phi's MLP forward and backward without autograd or checks: the Triton kernels, or PyTorch.

N rows, D width, F MLP width.
"""

from __future__ import annotations

import torch

from phi1.kernels.core.backend import use_triton
from phi1.kernels.core.cpu_matmul import mm
from phi1.kernels.gemm.linear_eager import linear_forward
from phi1.kernels.pointwise.gelu_eager import gelu_backward


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
        from phi1.kernels.pointwise.epilogue_triton import launch_backward

        dpre = torch.empty_like(pre)
        db1 = launch_dgelu(dout, w2, pre, dpre, act)
        db2 = launch_backward(dout, None, None, bias=True)
        assert db2 is not None
    else:
        dout = dout.contiguous()
        dpre = gelu_backward(mm(dout, w2), pre, y=act)
        db1, db2 = dpre.sum(0), dout.sum(0)
    return mm(dpre, w1), mm(dpre.t(), x), db1, mm(dout.t(), act), db2
