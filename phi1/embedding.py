"""The token embedding, with a gradient that is accurate for a token of any frequency.

    out[n] = weight[ids[n]]        dweight[v] = sum of dout[n] over the n whose id is v

On CUDA, PyTorch's gradient is deterministic and fast: it sorts the ids of a training step and sums each id's rows in
order, in float32 and without atomics. At B = 8, T = 2048, D = 2048, V = 51,200 in float16 it moves 0.35 GB, a tenth of
a millisecond of an H100's bandwidth, so a kernel of ours would gain nothing. On a CPU, PyTorch's gradient is
deterministic too, but it sums in the weight's dtype: 500 rows of 0.37 sum to 128 in bfloat16. This module sums them in
float32 and rounds once.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from phi1.kernels.core.checks import check_differentiable
from phi1.kernels.core.cpu_memory import empty


def embed(weight: Tensor, ids: Tensor) -> Tensor:
    """weight[ids]: [V, D] and [N] int64 -> [N, D]."""
    if weight.is_cpu and weight.dtype in (torch.bfloat16, torch.float16):
        check_differentiable("Phi1", weight=weight)
        return torch.ops.phi1.embedding(weight, ids)
    return F.embedding(ids, weight)


@torch.library.custom_op("phi1::embedding", mutates_args=())
def _embedding(weight: Tensor, ids: Tensor) -> Tensor:
    return F.embedding(ids, weight)


@_embedding.register_fake
def _(weight: Tensor, ids: Tensor) -> Tensor:
    return weight.new_empty((*ids.shape, weight.shape[1]))


@torch.library.custom_op("phi1::embedding_backward", mutates_args=())
def _embedding_backward(dout: Tensor, ids: Tensor, n_rows: int) -> Tensor:
    used, index = ids.unique(return_inverse=True)  # the float32 sums have one row per token of the batch, not V
    sums = torch.ops.aten.embedding_dense_backward(dout.float(), index, used.numel(), -1, False)
    dweight = empty((n_rows, dout.shape[1]), dtype=dout.dtype, device=dout.device).zero_()
    dweight[used] = sums.to(dout.dtype)
    return dweight


@_embedding_backward.register_fake
def _(dout: Tensor, ids: Tensor, n_rows: int) -> Tensor:
    return dout.new_empty((n_rows, dout.shape[1]))


def _setup(ctx, inputs, output) -> None:
    weight, ids = inputs
    ctx.save_for_backward(ids)
    ctx.n_rows = weight.shape[0]


def _autograd(ctx, dout):
    return torch.ops.phi1.embedding_backward(dout, *ctx.saved_tensors, ctx.n_rows), None


_embedding.register_autograd(_autograd, setup_context=_setup)
