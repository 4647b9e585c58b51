"""The block after its layer norm, without autograd or checks: the Triton kernels on GPUs, PyTorch elsewhere.

`parallel_block.py` has the formulas. The backward accepts what either backend saved.

N rows, D width, F MLP width.
"""

from __future__ import annotations

import torch

from phi1.kernels.block import eager
from phi1.kernels.block.spec import BlockSpec, Parameters, Saved
from phi1.kernels.core.backend import use_triton


def branches_forward(
    h: torch.Tensor, x: torch.Tensor, parameters: Parameters, spec: BlockSpec, keeps_pre: bool
) -> tuple[torch.Tensor, Saved]:
    """Return (x', saved) for the normalised h and the residual x, both [N, D]. Without keeps_pre, pre is empty."""
    if use_triton(h):
        from phi1.kernels.block.launch_triton import launch_block_forward

        return launch_block_forward(h, x, parameters, spec, keeps_pre)
    return eager.branches_forward(h, x, parameters, spec, keeps_pre)


def branches_again(
    h: torch.Tensor, parameters: Parameters, saved: Saved, spec: BlockSpec, recompute: str
) -> Saved:
    """Recompute the saved tensors with the same bits as the forward: pre for "mlp", all of them for "block"."""
    if use_triton(h):
        from phi1.kernels.block.launch_triton import launch_block_again

        return launch_block_again(h, parameters, saved, spec, recompute)
    return eager.branches_again(h, parameters, saved, spec, recompute)


def branches_backward(
    dy: torch.Tensor, h: torch.Tensor, parameters: Parameters, saved: Saved, spec: BlockSpec
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of h, in_weight, in_bias, out_weight and out_bias. The residual's gradient is dy."""
    if use_triton(h):
        from phi1.kernels.block.launch_triton import launch_block_backward

        return launch_block_backward(dy, h, parameters, saved, spec)
    return eager.branches_backward(dy, h, parameters, saved, spec)
