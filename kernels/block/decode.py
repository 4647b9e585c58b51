"""phi's parallel block for tokens behind a cache of keys and values, as one operation; formulas in `parallel_block.py`.

    [q | k | v | pre] = layer_norm(x) W_in^T + b_in
    rotary(k), v -> the last T places of the cache
    x' = x + [attention(rotary(q), keys, values) | gelu_new(pre)] W_out^T + b_dense + b_fc2

No backward. One operator a layer, where the operations one by one are six.

N rows, D width, H heads, K head size, F MLP width, B batch, T new tokens (N = B T), S tokens with those before.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from phi1.kernels.attention.attention import attention_reference
from phi1.kernels.attention.dispatch import attention_forward
from phi1.kernels.attention.spec import AttentionSpec
from phi1.kernels.block.eager import beside
from phi1.kernels.block.rules import check_decode
from phi1.kernels.block.spec import Parameters
from phi1.kernels.core.backend import operator, reference_forced
from phi1.kernels.core.checks import check_flag
from phi1.kernels.gemm.linear import linear_forward
from phi1.kernels.pointwise.gelu import gelu_forward, gelu_new
from phi1.kernels.pointwise.layer_norm import layer_norm_forward, layer_norm_reference
from phi1.kernels.pointwise.rotary import rotate_reference, rotate_rows_


def _decode(
    x: torch.Tensor,
    parameters: Sequence[torch.Tensor],
    rotary: Sequence[torch.Tensor],
    kv: torch.Tensor,
    seq_starts: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    own, (cos, sin, positions) = Parameters(*parameters), rotary
    width, (_, batch, length, n_heads, head_size) = x.shape[1], kv.shape
    h = layer_norm_forward(x, own.norm_weight, own.norm_bias, eps)[0]
    projected = linear_forward(h, own.in_weight, own.in_bias, None, False, None)[0]
    pre = projected[:, 3 * width :]
    qkv = projected[:, : 3 * width].unflatten(1, (3, n_heads, head_size))
    rotate_rows_(qkv, cos, sin, positions)
    q, k, v = qkv.unflatten(0, (batch, -1)).unbind(2)
    keys, values = kv.unbind(0)
    keys[:, length - k.shape[1] :].copy_(k)
    values[:, length - v.shape[1] :].copy_(v)
    att = attention_forward(q, keys, values, AttentionSpec(True, head_size**-0.5, seq_starts))[0]
    joined = beside(att.view(x.shape), pre)
    gelu_forward(pre, out=joined[:, width:])
    return linear_forward(joined, own.out_weight, own.out_bias[0] + own.out_bias[1], x, False, None)[0]


_operator = operator("phi1::parallel_block_decode", mutates=("kv",))(_decode)


@_operator.register_fake
def _(x: torch.Tensor, *_) -> torch.Tensor:
    return x.new_empty(x.shape)


def parallel_block_decode(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    in_weight: torch.Tensor,
    in_bias: torch.Tensor,
    out_weight: torch.Tensor,
    out_bias: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    kv: torch.Tensor,
    *,
    seq_starts: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    eps: float = 1e-5,
    check: bool = True,
) -> torch.Tensor:
    """`parallel_block` of the newest T tokens of each sequence, which see the S - T before them through a cache.

    Args:
        x: [N, D], the new tokens' rows, sequence by sequence.
        norm_weight, norm_bias, in_weight, in_bias, out_weight, out_bias, cos, sin, eps: as for `parallel_block`; none
            may want a gradient, nor x.
        kv: [2, B, S, H, K] in x's dtype, any strides: the keys, rotated, and the values of S tokens, T = N / B of them
            the new ones, whose places are written. It must not want a gradient.
        seq_starts: int32 [B], first real token of each row of a left-padded batch.
        positions: [N] rotary positions; by default S - T .. S - 1, less seq_starts, at least 0.
        check: False leaves out the checks of arguments, for all but the first of layers that are alike: they and
            PyTorch's dispatcher, which plain CPU tensors go past, were a third of a token's time on a model of four
            layers of width 256. With positions alone.

    Returns:
        [N, D] in x's dtype.

    Raises:
        TypeError, ValueError: as `parallel_block`; a gradient is wanted.

    Source: as `parallel_block`.
    """
    check_flag("parallel_block_decode", check=check)
    parameters = Parameters(norm_weight, norm_bias, in_weight, in_bias, out_weight, out_bias)
    if check or positions is None:
        positions = check_decode("parallel_block_decode", x, parameters, cos, sin, kv, seq_starts, positions, eps)
    if reference_forced():
        return parallel_block_decode_reference(x, *parameters, cos, sin, kv, positions, seq_starts, eps)
    run = _decode if _nothing_looks_on(x) else torch.ops.phi1.parallel_block_decode
    return run(x, parameters, (cos, sin, positions), kv, seq_starts, eps)


def _nothing_looks_on(x: torch.Tensor) -> bool:
    """True where the dispatcher would do no more than call the operator: a plain CPU tensor, nothing that traces or
    changes dtypes, and never a backward."""
    return (x.is_cpu and type(x) is torch.Tensor and not torch.compiler.is_compiling()
            and not torch.is_autocast_enabled("cpu") and _get_current_dispatch_mode() is None)


def parallel_block_decode_reference(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    in_weight: torch.Tensor,
    in_bias: torch.Tensor,
    out_weight: torch.Tensor,
    out_bias: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    kv: torch.Tensor,
    positions: torch.Tensor,
    seq_starts: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    """`parallel_block_decode` in plain PyTorch."""
    linear, width, batch = torch.nn.functional.linear, x.shape[1], kv.shape[1]
    projected = linear(layer_norm_reference(x, norm_weight, norm_bias, eps), in_weight, in_bias)
    qkv = projected[:, : 3 * width].unflatten(1, (3, *kv.shape[3:]))
    rotated = rotate_reference(qkv[:, :2], cos, sin, positions)
    q, k, v = (part.unflatten(0, (batch, -1)) for part in (*rotated.unbind(1), qkv[:, 2]))
    kv[:, :, kv.shape[2] - k.shape[1] :] = torch.stack((k, v))
    att = attention_reference(q, kv[0], kv[1], seq_starts=seq_starts).flatten(2).flatten(0, 1)
    dense = linear(att, out_weight[:, :width], out_bias[0])
    return x + dense + linear(gelu_new(projected[:, 3 * width :]), out_weight[:, width:], out_bias[1])
