"""The loss and its gradients without autograd or checks: the Triton kernels on GPUs, PyTorch elsewhere.

    l = x W^T + b           lse = log sum exp l            over the first valid_vocab columns
    loss = lse - (1 - e) l_t - e mean(l) + z lse^2         e label smoothing, z z-loss, t the target
    dl = (1 + 2 z lse) softmax(l) - (1 - e) onehot(t) - e / valid_vocab

Both walk over chunks of rows. A chunk's logits are one buffer in x's dtype, turned into dl in place. dl is kept
unnormalised, in float16 times 2^10: p - y divided by the number of targets would flush to 0 there. Sums over chunks are
float32. The gradients returned lack three factors: the incoming gradient, 1 / count and 2^-10. `scaled` applies them
once, at the end of the backward, in float32.

N rows, D width, V vocabulary (valid_vocab of it in every product).
"""

from __future__ import annotations

import torch

from phi1.kernels.core.backend import use_triton
from phi1.kernels.cross_entropy import eager
from phi1.kernels.cross_entropy.spec import LossRule, Needs


def losses_and_gradients(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    rule: LossRule,
    needs: Needs,
    row_weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(losses [N], lse [N], dx [N, D], dW [V, D], db [V]); gradients that are not wanted are empty.

    The gradients are those of the sum of losses, each times its row_weights [N] if given, times `scale_of` the dtype.
    """
    if use_triton(x):
        from phi1.kernels.cross_entropy.loss_triton import launch_losses_and_gradients

        return launch_losses_and_gradients(x, weight, bias, targets, rule, needs, row_weights)
    return eager.losses_and_gradients(x, weight, bias, targets, rule, needs, row_weights)


def scaled(gradient: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """gradient * factor, of one element, multiplied in float32, in another dtype."""
    if use_triton(gradient):
        from phi1.kernels.cross_entropy.loss_triton import launch_scale

        return launch_scale(gradient, factor, dtype)
    return eager.scaled(gradient, factor, dtype)
