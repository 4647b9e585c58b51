"""phi's parallel block for tokens behind a cache of keys and values, as one operation; formulas in `block.py`.

    [q | k | v | pre] = layer_norm(x) W_in^T + b_in
    rotary(k), v -> the last T places of the cache
    x' = x + [attention(rotary(q), keys, values) | gelu_new(pre)] W_out^T + b_dense + b_fc2

No backward. One operator a layer, where the operations one by one are six.

N rows, D width, H heads, K head size, F MLP width, B batch, T new tokens (N = B T), S tokens with those before.
"""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from phi1.kernels.attention.attention import attention_reference
from phi1.kernels.block.eager import branches_decode
from phi1.kernels.block.rules import check_decode
from phi1.kernels.core.backend import operator, reference_forced
from phi1.kernels.core.checks import check_flag
from phi1.kernels.pointwise.gelu import gelu_new
from phi1.kernels.pointwise.layer_norm import layer_norm_forward, layer_norm_reference
from phi1.kernels.pointwise.rotary import rotate_reference


def _decode(
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
    seq_starts: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    h = layer_norm_forward(x, norm_weight, norm_bias, eps)[0]
    return branches_decode(h, x, in_weight, in_bias, out_weight, out_bias, kv, (cos, sin, positions), seq_starts)


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
    arguments = (x, norm_weight, norm_bias, in_weight, in_bias, out_weight, out_bias, cos, sin, kv)
    check_flag("parallel_block_decode", check=check)
    if check or positions is None:
        positions = check_decode("parallel_block_decode", *arguments, seq_starts, positions, eps)
    if reference_forced():
        return parallel_block_decode_reference(*arguments, positions, seq_starts, eps)
    if _nothing_looks_on(x):
        return _decode(*arguments, positions, seq_starts, eps)
    return torch.ops.phi1.parallel_block_decode(*arguments, positions, seq_starts, eps)


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
