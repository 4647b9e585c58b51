"""fp16's dynamic loss scale.

The scale halves where gradients overflow and doubles after `loss_scale_window` finite steps in a row. The first
`loss_scale_hysteresis` - 1 overflows after a growth are put up with, so that a single bad batch costs a step and no
scale; it never falls below `loss_scale_floor`, where an overflow speaks of the model and not of the scale. These are
the rules of DeepSpeed, with which phi-1 was trained; torch.amp.GradScaler has neither hysteresis nor floor.
"""

from __future__ import annotations

from typing import Any

from phi1.train.recipe.recipe import Train


class GradScaler:
    """A number, and what decides on the next one: the same on every process, since all see the same norms.

    Args:
        train: the recipe's optimization.
        enabled: whether the arithmetic is fp16; otherwise the scale is 1 and stays so.
    """

    def __init__(self, train: Train, enabled: bool) -> None:
        self.train, self.enabled = train, enabled
        self.scale = train.loss_scale if enabled else 1.0
        self.clean = 0
        """Finite steps since the last overflow or growth."""
        self.patience = train.loss_scale_hysteresis
        """Overflows until the scale falls, the one that lowers it included."""

    def update(self, finite: bool) -> None:
        """Take note of a step's gradient."""
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
        """JSON values; empty where the scale is not enabled."""
        return {"scale": self.scale, "clean": self.clean, "patience": self.patience} if self.enabled else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state, if both runs have one: fp32 may go on as fp16, and starts with the first scale.

        So does what an older version did not save: only when the scale next changes depends on it.
        """
        if self.enabled:
            vars(self).update({name: state[name] for name in self.state_dict().keys() & state.keys()})
