"""HumanEval on a model under training: each process lets it solve a share of the problems, and runs that."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from phi1 import Phi1
from phi1.evaluate.execute import NOT_RUN
from phi1.evaluate.humaneval import BATCH, NOT_FINITE, Attempt, Problem, complete, judge
from phi1.tokenizer import Tokenizer
from phi1.train.evaluate.samples import whole_model
from phi1.train.runtime.all_ranks import all_ranks, attempt, fail
from phi1.train.runtime.launch import RunError
from phi1.train.step.trainer import Trainer


@dataclass(frozen=True)
class HumanEval:
    """The problems of a run, for evaluations of one greedy completion each.

    Args:
        folder: of the results; made when the first are written.
        tokenizer: the corpus's.
        problems: all of them, the same on every process.
        seconds: that a completion may run.
    """

    folder: Path
    tokenizer: Tokenizer
    problems: list[Problem]
    seconds: float

    def evaluate(self, trainer: Trainer, rank: int, stop: Callable[[], bool]) -> list[Attempt] | None:
        """Collective: let the weights as they are solve the problems, and run that.

        Args:
            trainer: rests between two steps; nothing of it is touched.
            rank: this process's.
            stop: asked on all processes between batches; True ends the evaluation.

        Returns:
            One result a problem, the same on all processes; None if it was stopped.

        Raises:
            Failed: on every process, if one cannot run programs, or not let the model write them.
        """
        model = whole_model(trainer.model, trainer.engine)
        assert model
        own: list[Attempt] = []
        error: str | None = None
        world = trainer.engine.world_size
        for first in range(rank * BATCH, len(self.problems) + rank * BATCH, world * BATCH):  # as often on each process
            if stop():
                return None
            if error is None:  # the others wait for this process in `stop`, whatever becomes of its share
                share = self.problems[first : first + BATCH]
                error, found = attempt(partial(self._attempts, model, share))
                own += found or []
        shares = all_ranks(lambda: fail(error) if error else own)
        order = {problem.task_id: at for at, problem in enumerate(self.problems)}
        return sorted((one for share in shares for one in share), key=lambda one: order[one.task_id])

    def _attempts(self, model: Phi1, problems: list[Problem]) -> list[Attempt]:
        try:
            done = list(judge(problems, complete(model, self.tokenizer, problems), self.seconds))
        except FloatingPointError:
            return [Attempt(problem.task_id, "", NOT_FINITE) for problem in problems]
        for one in done:
            if one.result and one.result.startswith(NOT_RUN):  # says nothing of the model
                fail(one.result)
        return done

    def write(self, attempts: list[Attempt], step: int) -> None:
        """Write humaneval-N.jsonl. Raises RunError if that is not possible."""
        path = self.folder / f"humaneval-{step}.jsonl"
        try:
            self.folder.mkdir(exist_ok=True)
            path.write_text("".join(attempt.as_json() + "\n" for attempt in attempts), encoding="utf-8")
        except OSError as error:
            raise RunError(f"{path}: {error.strerror}") from None
