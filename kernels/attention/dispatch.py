"""Causal and full attention, forward and backward, without autograd or checks: the Triton kernels, or PyTorch.

    S = scale q k^T + mask        P = softmax(S)        out = drop(P) v        lse = log sum exp S
    dP = drop(dout v^T)           dS = P (dP - rowsum(P dP))
    dv = drop(P)^T dout           dq = scale dS k                dk = scale dS^T q

Shared by the operations that attend. S, P and lse are float32, in base 2 with the scale folded in, in float32, so that
float16 q and k of 300 stay finite.

B batch, Tq queries, Tk keys, H heads, K head size, N = B * Tq rows, R rotary dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from phi1.kernels.attention.eager import torch_backward, torch_forward
from phi1.kernels.core.backend import use_triton
from phi1.kernels.core.philox import Dropout
from phi1.kernels.pointwise.rotary import rows_of_tables


@dataclass(frozen=True)
class Scheme:
    """How queries meet keys: which keys they see, their rotation, and which probabilities are dropped.

    seq_starts [B] hides the keys before it. rotary is (cos [T, R/2], sin [T, R/2], positions [N]) where q and k are to
    be rotated first; with rotary_applied they have been, and their gradients alone are rotated, back. `sample` numbers
    the first sample for the dropout masks. rows is rotary by `rows_of_tables`, two [N, R].
    """

    causal: bool
    scale: float
    seq_starts: torch.Tensor | None = None
    rotary: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
    dropout: Dropout | None = None
    rotary_applied: bool = False
    sample: int = 0
    rows: tuple[torch.Tensor, torch.Tensor] | None = None

    def of_document(self, number: int, rows: slice) -> Scheme:
        """The scheme of one packed document, alone in its batch."""
        own = None if self.rows is None else (self.rows[0][rows], self.rows[1][rows])
        return replace(self, sample=number, rows=own)

    def with_rows(self) -> Scheme:
        """The scheme with its rotation row by row."""
        return self if self.rotary is None else replace(self, rows=rows_of_tables(*self.rotary))

    def tables(self, batch: int, samples: slice, rows: slice) -> tuple[torch.Tensor, torch.Tensor] | None:
        """cos and sin of some samples' rows, [B, 1, T, R]: they broadcast over heads."""
        if self.rows is None:
            return None
        cos, sin = (table.unflatten(0, (batch, -1))[samples, None, rows] for table in self.rows)
        return cos, sin


def attention_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scheme: Scheme, cu_seqlens: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [B, Tq, H, K], lse [H, N] float32) of q [B, Tq, H, K] and k, v [B, Tk, H, K], any strides.

    With cu_seqlens the N rows are packed documents: each attends to itself alone, and reads no other's rows.
    """
    if use_triton(q):
        from phi1.kernels.attention.launch_triton import launch_attention_forward

        return launch_attention_forward(q, k, v, scheme, cu_seqlens)
    return torch_forward(q, k, v, scheme.with_rows(), cu_seqlens)


def attention_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    grads: Sequence[torch.Tensor],
    scheme: Scheme,
    cu_seqlens: torch.Tensor | None = None,
) -> None:
    """Write the gradients of q, k and v into `grads`, three tensors of their shapes and any strides.

    out and lse are the forward's; the PyTorch code does not read out.
    """
    if use_triton(q):
        from phi1.kernels.attention.launch_triton import launch_attention_backward

        launch_attention_backward(dout, q, k, v, out, lse, grads, scheme, cu_seqlens)
    else:
        torch_backward(dout, q, k, v, lse, grads, scheme.with_rows(), cu_seqlens)
