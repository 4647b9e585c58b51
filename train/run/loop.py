"""The run itself: steps, ledger, checkpoints, evaluations, until the end or an agreed stop."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from phi1.evaluate.humaneval import scores
from phi1.train.checkpoint.best import Standing
from phi1.train.checkpoint.checkpoint import Saver, gather_weights
from phi1.train.checkpoint.files import checkpoint_name
from phi1.train.evaluate.humaneval import HumanEval
from phi1.train.evaluate.samples import Samples
from phi1.train.evaluate.validation import Figures, HeldOut
from phi1.train.metrics.ledger import Ledger
from phi1.train.metrics.mfu import Mfu
from phi1.train.metrics.profiling import Profiler
from phi1.train.metrics.progress import Progress
from phi1.train.recipe.recipe import Recipe
from phi1.train.run.folder import RunFolder
from phi1.train.runtime.all_ranks import Failed
from phi1.train.runtime.engine import peak_memory_gib
from phi1.train.runtime.launch import RunError
from phi1.train.runtime.stop_signals import StopSignals
from phi1.train.runtime.watchdog import Watchdog
from phi1.train.step.trainer import Trainer


@dataclass
class Loop:
    """What a run goes through, the same on every process.

    Args:
        recipe: steps, and when to save and evaluate.
        folder: where to.
        trainer: new, or loaded from a checkpoint.
        held_out: what to evaluate on.
        samples: what to let the model write.
        humaneval: what to let it solve at each checkpoint; None for nothing.
        stop_signals: how to stop.
        progress: what to show; silent on all ranks but the first.
        ledger: rank 0's; None on the others.
        rank: this process's.
        facts: JSON values that go into each checkpoint; "best" is the best step until now whose checkpoint is there,
            "due" is there if what follows the step has been stopped, with the loss if that was found before.
        mfu: turns speed into MFU.
        watchdog: told what begins.
        saver: writes checkpoints.
        profiler: records some steps.
        saved: the checkpoint that the trainer was loaded from, then the newest one.
    """

    recipe: Recipe
    folder: RunFolder
    trainer: Trainer
    held_out: HeldOut
    samples: Samples
    humaneval: HumanEval | None
    stop_signals: StopSignals
    progress: Progress
    ledger: Ledger | None
    rank: int
    facts: dict[str, Any]
    mfu: Mfu
    watchdog: Watchdog
    saver: Saver
    profiler: Profiler
    saved: Path | None = None
    stopped: bool = False
    """Whether an evaluation was stopped."""
    standing: Standing | None = None
    """Of the last step that was measured."""
    _begun: dict[str, Any] = field(default_factory=dict)
    """What becomes a fact once the checkpoint in flight is committed."""

    def run(self) -> bool:
        """Collective: train to the last step. Returns False if it was stopped before.

        Raises:
            RunError: a process has failed, too many steps in a row were skipped, or the checkpoint at the end cannot be
                written.
        """
        last = self.recipe.train.steps
        going = "due" not in self.facts or self._follow_up()
        while going and self.trainer.finished < last and not self.stop_signals.agreed_to_stop(self.saver.writes()):
            if self.saver.in_flight and not self.stop_signals.any_writes:
                self._try(self._finish_saving)
            self._step()
            going = self._follow_up()
        self.save()
        return going and self.trainer.finished == last

    def _follow_up(self) -> bool:
        """What is due after the finished step, its checkpoint last, so that it knows how good it is.

        Returns:
            False if a stop came first; a checkpoint that is saved now says what is still due.
        """
        before, step = self.facts.pop("due", None), self.trainer.finished
        loss, solved = (before or {}).get("loss"), None
        if loss is None and self._due(self.recipe.eval.every) and (figures := self.evaluate()):
            loss = figures.loss
        if not self.stopped and self.humaneval and self._due(self.recipe.checkpoint.every):
            solved = self.solve()
        if self.stopped:
            self.facts["due"] = {} if loss is None else {"loss": loss}
            return False
        if loss is not None and (solved is not None or self.recipe.checkpoint.best != "humaneval"):
            self.standing = Standing(step, loss, solved)
        if self._due(self.recipe.eval.completions_every):
            self.watchdog.report(f"the completions after step {step}")
            self._try(lambda: self.samples.write(self.trainer, self.rank))
        if before is not None or self._due(self.recipe.checkpoint.every):
            self._try(self._begin_saving)
        return True

    def save(self) -> None:
        """Collective: a checkpoint of this step, unless it is there; nothing is being written when this returns.

        Raises:
            RunError: it cannot be written.
        """
        if self.saver.in_flight:
            self._try(self._finish_saving)
        if self.saved is None or self.saved.name != checkpoint_name(self.trainer.finished) or "due" in self.facts:
            self._begin_saving()
            self._finish_saving()

    @property
    def best(self) -> Standing | None:
        """The best step until now of those whose checkpoints are kept."""
        return Standing(**self.facts["best"]) if "best" in self.facts else None

    def _begin_saving(self) -> None:
        if self.saver.in_flight:  # a disk slower than the checkpoints are frequent
            self._try(self._finish_saving)
        self.watchdog.report(f"the checkpoint of step {self.trainer.finished}")
        now, rule = self.standing, self.recipe.checkpoint.best
        best = rule and now and now.step == self.trainer.finished and now.beats(self.best, rule)
        self._begun = {"best": asdict(now)} if now and best else {}
        self.saver.begin(self.trainer, self.facts | self._begun)

    def _finish_saving(self) -> None:
        self.watchdog.report("the end of a checkpoint")
        done = self.saver.finish()
        self.saved = done.path
        self.facts |= self._begun
        self._note(lambda ledger: ledger.saved(done.step, done.measured()))

    def assess(self) -> tuple[Figures, float | None] | None:
        """Collective, at the end: what was reached, with HumanEval's pass@1; None if a stop was asked for meanwhile."""
        figures = self.evaluate()
        solved = self.solve() if figures and self.humaneval else None
        return (figures, solved) if figures and not self.stopped else None

    def weights(self) -> dict[str, Tensor]:
        """Collective, at the end: what was trained, on rank 0's CPU; nothing on the other processes.

        Raises:
            RunError: some process has no memory for that.
        """
        self.watchdog.report("the export")
        try:
            return gather_weights(self.trainer.model)
        except Failed as error:
            raise RunError(f"the trained weights could not be gathered: {error}; they are saved in {self.saved}, which "
                           f"phi1 convert --model {self.saved} --out FOLDER exports as well") from None

    def solve(self) -> float | None:
        """Collective: HumanEval's pass@1; None if a stop was asked for meanwhile, or some process could not run it."""
        assert self.humaneval
        step, humaneval = self.trainer.finished, self.humaneval
        try:
            attempts = humaneval.evaluate(self.trainer, self.rank, lambda: self._stop(f"HumanEval after step {step}"))
        except Failed as error:
            self.progress.say(f"warning: HumanEval after step {step} is missing: {error}; the run goes on")
            return None
        if attempts is None:
            return None
        if self.rank == 0:
            self._try(lambda: humaneval.write(attempts, step))
        solved = scores(attempts)["pass@1"]
        self._note(lambda ledger: ledger.humaneval(step, solved, len(attempts)))
        self.progress.say(f"step {step:,}: HumanEval pass@1 {100 * solved:.1f} % of {len(attempts)} problems")
        return solved

    def evaluate(self) -> Figures | None:
        """Collective: figures on the held-out text; None if a stop was asked for meanwhile."""
        trainer = self.trainer
        figures = self.held_out.evaluate(trainer.model, trainer.engine, self.rank, trainer.batch_plan.micro_batch,
                                         lambda: self._stop(f"the evaluation after step {trainer.finished}"))
        if figures:
            self._note(lambda ledger: ledger.evaluation(trainer.finished, figures.as_dict()))
            self.progress.say(f"step {trainer.finished:,}: validation loss {figures.loss:.4f}, "
                              f"{figures.bits_per_byte:.4f} bits per byte")
        return figures

    def _stop(self, what: str) -> bool:
        self.watchdog.report(what)
        self.stopped = self.stop_signals.agreed_to_stop()
        return self.stopped

    def _due(self, every: int) -> bool:
        """Whether something is due after this step; what comes at the end comes by itself."""
        finished = self.trainer.finished
        return every > 0 and finished % every == 0 and finished < self.recipe.train.steps

    def _step(self) -> None:
        trainer = self.trainer
        self.watchdog.report(f"step {trainer.finished + 1}")
        started = time.perf_counter()
        with self.profiler.step(trainer.finished + 1):
            outcome = trainer.run_step()
        seconds = time.perf_counter() - started
        speed = self.progress.tokens / seconds
        measured = {"tokens_per_s": speed, "seconds": seconds, "memory_gib": peak_memory_gib(trainer.engine),
                    **self.mfu.of(speed)}
        self.progress.step(outcome.step, outcome.loss, seconds)
        self._note(lambda ledger: ledger.step(outcome, measured))
        if outcome.skipped:
            why = f"{trainer.problem} (loss {outcome.loss:.4g}, loss scale {outcome.scale:g})"
            self.progress.say(f"step {outcome.step:,}: skipped, since {why}")
            if trainer.skips >= self.recipe.train.max_skips:  # every process comes to the same answer
                raise RunError(f"the last {trainer.skips} steps were skipped (train.max_skips), step {outcome.step} "
                               f"since {why}: the newest checkpoint is {self.saved.name if self.saved else 'none'}; "
                               f"{trainer.cure} may help")

    def _try(self, action: Callable[[], None]) -> None:
        """Something on the way that the training can do without: what goes wrong is reported, and the run goes on."""
        try:
            action()
        except RunError as error:
            self.progress.say(f"warning: {error}; the run goes on")

    def _note(self, write: Callable[[Ledger], None]) -> None:
        if ledger := self.ledger:
            self._try(lambda: write(ledger))
