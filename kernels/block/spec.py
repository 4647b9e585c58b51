"""What both backends of the block take besides the rows: its parameters, and how rows attend and are dropped.

N rows, D width, H heads, K head size, F MLP width, B batch, T positions, R rotary dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from phi1.kernels.attention.spec import AttentionSpec
from phi1.kernels.core.philox import Dropout, dropout_from_fields


class Parameters(NamedTuple):
    """The block's parameters, in the order of its operators."""

    norm_weight: torch.Tensor  # [D]
    norm_bias: torch.Tensor  # [D]
    in_weight: torch.Tensor  # [3D + F, D] rows q, k, v, fc1
    in_bias: torch.Tensor  # [3D + F]
    out_weight: torch.Tensor  # [D, D + F] columns dense, fc2
    out_bias: torch.Tensor  # [2, D] rows dense, fc2


class Saved(NamedTuple):
    """What the backward reads of a forward; empty where it is computed again."""

    qkv: torch.Tensor  # [N, 3D], or from the Triton kernels [N, 3, D] with q and k rotated
    pre: torch.Tensor  # [N, F]
    att: torch.Tensor  # [N, D]
    lse: torch.Tensor  # [H, N] float32


@dataclass(frozen=True)
class BlockSpec:
    """How rows form sequences, how they attend, and what is dropped on the branches."""

    n_heads: int
    batch: int
    cu_seqlens: torch.Tensor | None
    attention: AttentionSpec
    dense_dropout: Dropout | None
    fc2_dropout: Dropout | None

    @classmethod
    def of(
        cls, x: torch.Tensor, rotary: Sequence[torch.Tensor], cu_seqlens: torch.Tensor | None,
        seq_starts: torch.Tensor | None, rng: torch.Tensor | None, sample_ids: torch.Tensor | None, n_heads: int,
        batch: int, ps: Sequence[float], layers: Sequence[int], kinds: Sequence[int],
    ) -> BlockSpec:
        """The spec that an operator's arguments describe. rotary: cos, sin, positions."""
        attention, dense, fc2 = (
            dropout_from_fields(p, rng if p else None, sample_ids, layer, kind)
            for p, layer, kind in zip(ps, layers, kinds, strict=True)
        )
        cos, sin, positions = rotary
        scale = (x.shape[1] // n_heads) ** -0.5
        return cls(n_heads, batch, cu_seqlens, AttentionSpec(True, scale, seq_starts, (cos, sin, positions), attention),
                   dense, fc2)

    @property
    def rotary(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(cos [T, R/2], sin [T, R/2], positions [N])."""
        assert self.attention.rotary is not None
        return self.attention.rotary

    @property
    def drops(self) -> bool:
        """True where a branch drops anything."""
        return self.dense_dropout is not None or self.fc2_dropout is not None

    def attention_on(self, qkv: torch.Tensor) -> AttentionSpec:
        """The attention on qkv, whose axes say which forward made it: [N, 3D], or [N, 3, D] with q and k rotated."""
        return replace(self.attention, rotary_applied=qkv.dim() == 3)

    def by_sample(self, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[N, 3D] or [N, 3, D] -> q, k, v [B, T, H, K], views."""
        qkv = qkv.flatten(1)
        n_rows, columns = qkv.shape
        shape = (self.batch, n_rows // self.batch, 3, self.n_heads, columns // (3 * self.n_heads))
        q, k, v = qkv.unflatten(1, shape[2:]).unflatten(0, shape[:2]).unbind(2)
        return q, k, v
