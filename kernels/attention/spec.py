"""The options of one call of attention that both backends take besides q, k and v.

B batch, T positions, N rows, R rotary dimension.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from phi1.kernels.core.philox import Dropout
from phi1.kernels.pointwise.rotary import rows_of_tables


@dataclass(frozen=True)
class AttentionSpec:
    """The mask, the scale, the rotation and the dropout of one call of attention.

    Args:
        causal: True lets a query see only the keys up to its own position.
        scale: the factor on q k^T.
        seq_starts: [B], the first visible key of each sample, or None.
        rotary: (cos [T, R/2], sin [T, R/2], positions [N]), by which q and k are rotated first, or None.
        dropout: the dropout of the probabilities, or None.
        rotary_applied: True if q and k are already rotated. Then only their gradients are rotated, back.
        sample: index of the first sample, for the dropout masks.
        rows: the rotation of each row, from `rows_of_tables`, two [N, R], or None.
    """

    causal: bool
    scale: float
    seq_starts: torch.Tensor | None = None
    rotary: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
    dropout: Dropout | None = None
    rotary_applied: bool = False
    sample: int = 0
    rows: tuple[torch.Tensor, torch.Tensor] | None = None

    def of_document(self, number: int, rows: slice) -> AttentionSpec:
        """Return the spec of one packed document as a batch of its own."""
        own = None if self.rows is None else (self.rows[0][rows], self.rows[1][rows])
        return replace(self, sample=number, rows=own)

    def with_rows(self) -> AttentionSpec:
        """Return the spec with `rows` filled in from `rotary`."""
        return self if self.rotary is None else replace(self, rows=rows_of_tables(*self.rotary))

    def tables(self, batch: int, samples: slice, rows: slice) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return cos and sin [B, 1, T, R] for some rows of some samples. They broadcast over heads."""
        if self.rows is None:
            return None
        cos, sin = (table.unflatten(0, (batch, -1))[samples, None, rows] for table in self.rows)
        return cos, sin
