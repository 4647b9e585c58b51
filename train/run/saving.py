"""The checkpoints of a run: when one is due, the facts beside its tensors, and the best one."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from phi1.train.checkpoint.best import Standing
from phi1.train.checkpoint.checkpoint import Saver
from phi1.train.checkpoint.files import checkpoint_name
from phi1.train.recipe.recipe import Checkpoint
from phi1.train.run.monitor import Monitor
from phi1.train.runtime.launch import RunError
from phi1.train.step.trainer import Trainer


class Saving:
    """Saves a trainer between its steps.

    Args:
        saver: writes checkpoints.
        rules: the steps between checkpoints, and the rule by which one is the best.
        steps: last step of the run; no checkpoint is due after it, because `save` follows.
        facts: JSON values for each checkpoint. "best" is the best step so far that has a checkpoint. "due" exists if
            the evaluations after the step were stopped; it holds the loss if that was found before.
        monitor: records the checkpoints.
        saved: the checkpoint that the trainer was loaded from.
    """

    def __init__(self, saver: Saver, rules: Checkpoint, steps: int, facts: dict[str, Any], monitor: Monitor,
                 saved: Path | None = None) -> None:
        self.saver, self.rules, self.steps, self.monitor = saver, rules, steps, monitor
        self.saved = saved
        """The newest checkpoint."""
        self.failure: RunError | None = None
        """The error for which the last step of a complete run has no checkpoint."""
        self.pending: dict[str, Any] | None = facts.get("due")
        """Results of the evaluations after the finished step that a stop interrupted; None if it did not."""
        self._facts = {key: value for key, value in facts.items() if key != "due"}
        self._standing: Standing | None = None
        self._begun: dict[str, Any] = {}
        """Facts to keep once the checkpoint in flight is committed."""

    def due(self, step: int) -> bool:
        """Return True if a checkpoint is due after a step."""
        return is_due(self.rules.every, step, self.steps)

    def measured(self, step: int, loss: float | None, solved: float | None) -> None:
        """Note the results of a step's evaluations, if they suffice to compare it with others."""
        if loss is not None and (solved is not None or self.rules.best != "humaneval"):
            self._standing = Standing(step, loss, solved)

    @property
    def best(self) -> Standing | None:
        """The best step so far that has a checkpoint."""
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
        """Collective: save this step, unless that is done, and wait for it. Raises RunError if it cannot be written."""
        if self.saver.in_flight:
            self.monitor.attempt(self.finish)
        if self.saved is None or self.saved.name != checkpoint_name(trainer.finished) or self.pending is not None:
            self.begin(trainer)
            self.finish()


def is_due(every: int, step: int, steps: int) -> bool:
    """Return True if something that is done every `every` steps (0: never) is due; the last step is not counted."""
    return every > 0 and step % every == 0 and step < steps
