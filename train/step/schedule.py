"""The learning rate: linear warmup, then linear decay. Both are functions of the step alone; a skipped step counts."""

from __future__ import annotations

from phi1.train.recipe.recipe import Train


def schedule_end(train: Train) -> int:
    """Return the step at which the rate reaches min_lr. phi-1's own run stopped before it."""
    return train.schedule_steps or train.steps


def learning_rate(step: int, train: Train) -> float:
    """Return the rate of the step that follows `step` finished ones."""
    if step < train.warmup_steps:
        return train.lr * (step + 1) / train.warmup_steps
    end = schedule_end(train)
    left = max(0.0, (end - step) / max(1, end - train.warmup_steps))
    return train.min_lr + (train.lr - train.min_lr) * left
