"""How queries meet keys in one call of attention: what both backends take besides q, k and v.

B batch, T positions, N rows, R rotary dimension.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from phi1.kernels.core.philox import Dropout
from phi1.kernels.pointwise.rotary import rows_of_tables


@dataclass(frozen=True)
class AttentionSpec:
    """Which keys a query sees, how q and k are rotated, and which probabilities are dropped.

    Args:
        causal: a query sees the keys up to its own position.
        scale: on q k^T.
        seq_starts: [B], hides the keys before it; or None.
        rotary: (cos [T, R/2], sin [T, R/2], positions [N]) where q and k are rotated first; or None.
        dropout: drops probabilities; or None.
        rotary_applied: q and k have been rotated already; their gradients alone are rotated, back.
        sample: number of the first sample, for the dropout masks.
        rows: rotary by `rows_of_tables`, two [N, R]; or None.
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
        """The spec of one packed document, alone in its batch."""
        own = None if self.rows is None else (self.rows[0][rows], self.rows[1][rows])
        return replace(self, sample=number, rows=own)

    def with_rows(self) -> AttentionSpec:
        """The spec with its rotation row by row."""
        return self if self.rotary is None else replace(self, rows=rows_of_tables(*self.rotary))

    def tables(self, batch: int, samples: slice, rows: slice) -> tuple[torch.Tensor, torch.Tensor] | None:
        """cos and sin of some samples' rows, [B, 1, T, R]: they broadcast over heads."""
        if self.rows is None:
            return None
        cos, sin = (table.unflatten(0, (batch, -1))[samples, None, rows] for table in self.rows)
        return cos, sin
