"""Attention forward and backward, without autograd or checks: the Triton kernels on GPUs, PyTorch elsewhere.

    S = scale q k^T + mask        P = softmax(S)        out = drop(P) v        lse = log sum exp S
    dP = drop(dout v^T)           dS = P (dP - rowsum(P dP))
    dv = drop(P)^T dout           dq = scale dS k                dk = scale dS^T q

S, P and lse are float32, in base 2 with the scale folded in, in float32, so that
float16 q and k of 300 stay finite.

B batch, Tq queries, Tk keys, H heads, K head size, N = B * Tq rows, R rotary dimension.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from phi1.kernels.attention.eager import torch_backward, torch_forward
from phi1.kernels.attention.spec import AttentionSpec
from phi1.kernels.core.backend import use_triton


def attention_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec, cu_seqlens: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [B, Tq, H, K], lse [H, N] float32) of q [B, Tq, H, K] and k, v [B, Tk, H, K], any strides.

    With cu_seqlens the N rows are packed documents: each attends to itself alone, and reads no other's rows.
    """
    if use_triton(q):
        from phi1.kernels.attention.launch_triton import launch_attention_forward

        return launch_attention_forward(q, k, v, spec, cu_seqlens)
    return torch_forward(q, k, v, spec.with_rows(), cu_seqlens)


def attention_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    grads: Sequence[torch.Tensor],
    spec: AttentionSpec,
    cu_seqlens: torch.Tensor | None = None,
) -> None:
    """Write the gradients of q, k and v into `grads`, three tensors of their shapes and any strides.

    out and lse are the forward's; the PyTorch code does not read out.
    """
    if use_triton(q):
        from phi1.kernels.attention.launch_triton import launch_attention_backward

        launch_attention_backward(dout, q, k, v, out, lse, grads, spec, cu_seqlens)
    else:
        torch_backward(dout, q, k, v, lse, grads, spec.with_rows(), cu_seqlens)
