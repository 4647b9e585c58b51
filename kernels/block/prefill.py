"""phi's parallel block on prompts, with the keys and values that decoding needs; formulas in `parallel_block.py`.

No backward.

N rows, D width, H heads, K head size, F MLP width, B batch, T positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from phi1.kernels.block.dispatch import branches_forward
from phi1.kernels.block.parallel_block import parallel_block_reference
from phi1.kernels.block.rules import NO_DROPOUT, check_block, check_without_gradients
from phi1.kernels.block.spec import BlockSpec, Parameters
from phi1.kernels.core.backend import operator, reference_forced
from phi1.kernels.pointwise.layer_norm import layer_norm_forward, layer_norm_reference
from phi1.kernels.pointwise.rotary import rotate_, rotate_reference, rows_of_tables


@operator("phi1::parallel_block_prefill")
def _prefill_op(
    x: torch.Tensor,
    parameters: Sequence[torch.Tensor],
    rotary: Sequence[torch.Tensor],
    seq_starts: torch.Tensor | None,
    n_heads: int,
    batch: int,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    own = Parameters(*parameters)
    spec = BlockSpec.of(x, rotary, None, seq_starts, None, None, n_heads, batch, (0.0,) * 3, (0,) * 3, (0,) * 3)
    h = layer_norm_forward(x, own.norm_weight, own.norm_bias, eps)[0]
    y, saved = branches_forward(h, x, own, spec, keeps_pre=False)
    qkv = saved.qkv.flatten(1).unflatten(1, (3, n_heads, -1))  # [N, 3, H, K]; q is rotated, or not, and not wanted
    if not spec.attention_on(saved.qkv).rotary_applied:
        cos, sin = rows_of_tables(*spec.rotary)
        rotate_(qkv[:, 1:2], cos[:, None, None], sin[:, None, None])
    return y, qkv


@_prefill_op.register_fake
def _(x, parameters, rotary, seq_starts, n_heads, *_):
    return x.new_empty(x.shape), x.new_empty((x.shape[0], 3, n_heads, x.shape[1] // n_heads))


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
    op = "parallel_block_prefill"
    parameters = Parameters(norm_weight, norm_bias, in_weight, in_bias, out_weight, out_bias)
    batch, positions = check_block(op, x, parameters, cos, sin, n_heads, batch, None, seq_starts, positions, eps,
                                   NO_DROPOUT)
    if reference_forced():
        out = parallel_block_reference(x, *parameters, cos, sin, n_heads=n_heads, batch=batch, seq_starts=seq_starts,
                                       positions=positions, eps=eps)
        h = layer_norm_reference(x, norm_weight, norm_bias, eps)
        qkv = torch.nn.functional.linear(h, in_weight, in_bias)[:, : 3 * x.shape[1]].unflatten(1, (3, n_heads, -1))
        return out, rotate_reference(qkv[:, 1:2], cos, sin, positions)[:, 0], qkv[:, 2]
    check_without_gradients(op, x, *parameters)
    out, qkv = torch.ops.phi1.parallel_block_prefill(x, parameters, (cos, sin, positions), seq_starts, n_heads, batch,
                                                     eps)
    _, keys, values = qkv.unbind(1)
    return out, keys, values
