"""The checkpoints of a run: when one is due, what it holds beside the tensors, and which one is the best."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from phi1.train.checkpoint.best import Standing
from phi1.train.checkpoint.checkpoint import Saver
from phi1.train.checkpoint.files import checkpoint_name
from phi1.train.recipe.recipe import Checkpoint
from phi1.train.run.monitor import Monitor
from phi1.train.step.trainer import Trainer


class Saving:
    """Saves a trainer between its steps.

    Args:
        saver: writes checkpoints.
        rules: how often, and by which rule one is the best.
        steps: last step of the run, whose checkpoint comes by itself.
        facts: JSON values that go into each checkpoint. "best" is the best step until now whose checkpoint is there.
            "due" is there if the evaluations after the step were stopped, with the loss if that was found before.
        monitor: told what is saved.
        saved: the checkpoint that the trainer was loaded from.
    """

    def __init__(self, saver: Saver, rules: Checkpoint, steps: int, facts: dict[str, Any], monitor: Monitor,
                 saved: Path | None = None) -> None:
        self.saver, self.rules, self.steps, self.monitor = saver, rules, steps, monitor
        self.saved = saved
        """The newest checkpoint."""
        self.pending: dict[str, Any] | None = facts.get("due")
        """What evaluations after the finished step have found before they were stopped; None if they were not."""
        self._facts = {key: value for key, value in facts.items() if key != "due"}
        self._standing: Standing | None = None
        self._begun: dict[str, Any] = {}
        """What becomes a fact once the checkpoint in flight is committed."""

    def due(self, step: int) -> bool:
        """Say whether a checkpoint is due after a step."""
        return is_due(self.rules.every, step, self.steps)

    def measured(self, step: int, loss: float | None, solved: float | None) -> None:
        """Note what evaluations have found of a step, if that is enough to compare it with others."""
        if loss is not None and (solved is not None or self.rules.best != "humaneval"):
            self._standing = Standing(step, loss, solved)

    @property
    def best(self) -> Standing | None:
        """The best step until now of those whose checkpoints are kept."""
        return Standing(**self._facts["best"]) if "best" in self._facts else None

    def begin(self, trainer: Trainer) -> None:
        """Collective: begin to write a checkpoint of this step. Raises RunError on every process if it cannot be."""
        if self.saver.in_flight:  # a disk slower than the checkpoints are frequent
            self.monitor.attempt(self.finish)
        self.monitor.begin(f"the checkpoint of step {trainer.finished}")
        now, rule = self._standing, self.rules.best
        best = rule and now and now.step == trainer.finished and now.beats(self.best, rule)
        self._begun = {"best": asdict(now)} if now and best else {}
        due = {} if self.pending is None else {"due": self.pending}
        self.saver.begin(trainer, self._facts | due | self._begun)

    def finish(self) -> None:
        """Collective: wait for the checkpoint in flight. Raises RunError on every process if it was not written."""
        self.monitor.begin("the end of a checkpoint")
        done = self.saver.finish()
        self.saved = done.path
        self._facts |= self._begun
        self.monitor.record(lambda ledger: ledger.saved(done.step, done.measured()))

    def save(self, trainer: Trainer) -> None:
        """Collective: a checkpoint of this step, unless it is there; nothing is being written when this returns.

        Raises:
            RunError: it cannot be written.
        """
        if self.saver.in_flight:
            self.monitor.attempt(self.finish)
        if self.saved is None or self.saved.name != checkpoint_name(trainer.finished) or self.pending is not None:
            self.begin(trainer)
            self.finish()


def is_due(every: int, step: int, steps: int) -> bool:
    """Say whether something that is done every so many steps is due; what comes at the end comes by itself."""
    return every > 0 and step % every == 0 and step < steps
