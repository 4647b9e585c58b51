"""The evaluations of a run: when held-out loss, HumanEval and completions are due, and what they find."""

from __future__ import annotations

from dataclasses import dataclass

from phi1.evaluate.humaneval import scores
from phi1.train.evaluate.humaneval import HumanEval
from phi1.train.evaluate.samples import Samples
from phi1.train.evaluate.validation import Figures, HeldOut
from phi1.train.recipe.recipe import Eval
from phi1.train.run.monitor import Monitor
from phi1.train.run.saving import is_due
from phi1.train.runtime.all_ranks import Failed
from phi1.train.runtime.stop_signals import StopSignals
from phi1.train.step.trainer import Trainer


@dataclass
class Evaluation:
    """Evaluates a trainer between its steps.

    Args:
        held_out: the text to find the loss of.
        samples: the headers to complete.
        humaneval: the problems to solve; None for none.
        rules: how often to evaluate and to complete.
        humaneval_every: steps between two times of solving the problems: those between checkpoints.
        steps: last step of the run, after which all of it comes by itself.
        rank: this process's.
        stop_signals: asked between batches.
        monitor: told what is found.
    """

    held_out: HeldOut
    samples: Samples
    humaneval: HumanEval | None
    rules: Eval
    humaneval_every: int
    steps: int
    rank: int
    stop_signals: StopSignals
    monitor: Monitor
    stopped: bool = False
    """The last evaluation was stopped."""

    def due(self, step: int) -> bool:
        """Say whether anything is due after a step."""
        return (self._is_due(self.rules.every, step) or self._is_due(self.rules.completions_every, step)
                or (self.humaneval is not None and self._is_due(self.humaneval_every, step)))

    def _is_due(self, every: int, step: int) -> bool:
        return is_due(every, step, self.steps)

    def run(self, trainer: Trainer, loss: float | None = None) -> tuple[float | None, float | None]:
        """Collective: do what is due after the finished step, or as much of it as comes before a stop.

        Args:
            trainer: rests between two steps.
            loss: of this step, if it was found before.

        Returns:
            The held-out loss and HumanEval's pass@1, None for what is not known.
        """
        step, solved = trainer.finished, None
        if loss is None and self._is_due(self.rules.every, step) and (figures := self.validate(trainer)):
            loss = figures.loss
        if not self.stopped and self.humaneval and self._is_due(self.humaneval_every, step):
            solved = self.solve(trainer, self.humaneval)
        if not self.stopped and self._is_due(self.rules.completions_every, step):
            self.monitor.begin(f"the completions after step {step}")
            self.monitor.attempt(lambda: self.samples.write(trainer, self.rank))
        return loss, solved

    def at_the_end(self, trainer: Trainer) -> tuple[Figures, float | None] | None:
        """Collective: what was reached, with HumanEval's pass@1; None if a stop was asked for meanwhile."""
        figures = self.validate(trainer)
        solved = self.solve(trainer, self.humaneval) if figures and self.humaneval else None
        return (figures, solved) if figures and not self.stopped else None

    def validate(self, trainer: Trainer) -> Figures | None:
        """Collective: figures on the held-out text; None if a stop was asked for meanwhile."""
        figures = self.held_out.evaluate(trainer.model, trainer.engine, self.rank, trainer.batch_plan.micro_batch,
                                         lambda: self._stop(f"the evaluation after step {trainer.finished}"))
        if figures:
            self.monitor.record(lambda ledger: ledger.evaluation(trainer.finished, figures.as_dict()))
            self.monitor.say(f"step {trainer.finished:,}: validation loss {figures.loss:.4f}, "
                             f"{figures.bits_per_byte:.4f} bits per byte")
        return figures

    def solve(self, trainer: Trainer, humaneval: HumanEval) -> float | None:
        """Collective: HumanEval's pass@1; None if a stop was asked for meanwhile, or some process could not run it."""
        step = trainer.finished
        try:
            attempts = humaneval.evaluate(trainer, self.rank, lambda: self._stop(f"HumanEval after step {step}"))
        except Failed as error:
            self.monitor.say(f"warning: HumanEval after step {step} is missing: {error}; the run goes on")
            return None
        if attempts is None:
            return None
        if self.rank == 0:
            self.monitor.attempt(lambda: humaneval.write(attempts, step))
        solved = scores(attempts)["pass@1"]
        self.monitor.record(lambda ledger: ledger.humaneval(step, solved, len(attempts)))
        self.monitor.say(f"step {step:,}: HumanEval pass@1 {100 * solved:.1f} % of {len(attempts)} problems")
        return solved

    def _stop(self, what: str) -> bool:
        self.monitor.begin(what)
        self.stopped = self.stop_signals.agreed_to_stop()
        return self.stopped
