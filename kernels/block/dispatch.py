"""The block behind its norm, without autograd or checks: the Triton kernels on GPUs, PyTorch elsewhere.

Formulas in `parallel_block.py`. The backward takes what either backend saved, whichever it runs on itself.

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
    """(x', saved) of the normalised h and the residual x, both [N, D]; pre is empty unless it is kept."""
    if use_triton(h):
        from phi1.kernels.block.launch_triton import launch_block_forward

        return launch_block_forward(h, x, parameters, spec, keeps_pre)
    return eager.branches_forward(h, x, parameters, spec, keeps_pre)


def branches_again(
    h: torch.Tensor, parameters: Parameters, saved: Saved, spec: BlockSpec, recompute: str
) -> Saved:
    """What the backward reads, with the forward's bits: "mlp" computes pre again, "block" everything."""
    if use_triton(h):
        from phi1.kernels.block.launch_triton import launch_block_again

        return launch_block_again(h, parameters, saved, spec, recompute)
    return eager.branches_again(h, parameters, saved, spec, recompute)


def branches_backward(
    dy: torch.Tensor, h: torch.Tensor, parameters: Parameters, saved: Saved, spec: BlockSpec
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of h, in_weight, in_bias, out_weight and out_bias; the residual's is dy."""
    if use_triton(h):
        from phi1.kernels.block.launch_triton import launch_block_backward

        return launch_block_backward(dy, h, parameters, saved, spec)
    return eager.branches_backward(dy, h, parameters, saved, spec)
