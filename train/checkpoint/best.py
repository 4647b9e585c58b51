"""The comparison by which one checkpoint of a run is the best."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Standing:
    """Results of a step's evaluations; later checkpoints keep those of the best step."""

    step: int
    loss: float
    """Validation, nats a token."""
    solved: float | None = None
    """HumanEval's pass@1, if it was asked for."""

    def beats(self, other: Standing | None, rule: str) -> bool:
        """Compare with another step: by "validation" loss, or by "humaneval" and then the loss."""
        return other is None or self._merit(rule) > other._merit(rule)

    def _merit(self, rule: str) -> tuple[float, float]:
        solved = -1.0 if rule == "validation" or self.solved is None else self.solved
        return solved, -math.inf if math.isnan(self.loss) else -self.loss

    def __str__(self) -> str:
        solved = "" if self.solved is None else f", pass@1 {100 * self.solved:.1f} %"
        return f"validation loss {self.loss:.4f}{solved}"
