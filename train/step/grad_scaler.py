"""fp16's dynamic loss scale.

The scale halves when gradients overflow and doubles after `loss_scale_window` finite steps in a row. The first
`loss_scale_hysteresis` - 1 overflows after a growth leave the scale as it is, so that a single bad batch costs one step
only. The scale never falls below `loss_scale_floor`: at that point an overflow is the model's fault. These are the
rules of DeepSpeed, with which phi-1 was trained; torch.amp.GradScaler has neither hysteresis nor floor.
"""

from __future__ import annotations

from typing import Any

from phi1.train.recipe.recipe import Train


class GradScaler:
    """The loss scale and the counts that change it; equal on every process, since all see the same norms.

    Args:
        train: the recipe's optimization.
        enabled: True for fp16; otherwise the scale stays 1.
    """

    def __init__(self, train: Train, enabled: bool) -> None:
        self.train, self.enabled = train, enabled
        self.scale = train.loss_scale if enabled else 1.0
        self.clean = 0
        """Finite steps since the last overflow or growth."""
        self.patience = train.loss_scale_hysteresis
        """Overflows until the scale falls, including the one that lowers it."""

    def update(self, finite: bool) -> None:
        """Adapt the scale to a step's gradient."""
        if not self.enabled:
            return
        if not finite:
            self.clean = 0
            self.patience = max(1, self.patience) - 1
            if not self.patience:
                self.scale = max(self.scale / 2, min(self.scale, self.train.loss_scale_floor))
            return
        self.clean += 1
        if self.clean == self.train.loss_scale_window:
            self.scale, self.clean, self.patience = 2 * self.scale, 0, self.train.loss_scale_hysteresis

    def state_dict(self) -> dict[str, Any]:
        """Return JSON values; empty if the scale is not enabled."""
        return {"scale": self.scale, "clean": self.clean, "patience": self.patience} if self.enabled else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a saved state. Values that it lacks, from fp32 or an older version, stay at their first value."""
        if self.enabled:
            vars(self).update({name: state[name] for name in self.state_dict().keys() & state.keys()})
