"""The loop of a run: steps, each followed by the evaluations and the checkpoint that are due."""

from __future__ import annotations

import time

from phi1.train.checkpoint.files import checkpoints
from phi1.train.run.build import Run
from phi1.train.runtime.engine import peak_memory_gib
from phi1.train.runtime.launch import RunError
from phi1.train.step.trainer import UnreadableData


def train(run: Run) -> bool:
    """Collective: train to the last step. Returns False if the run was stopped before.

    Raises:
        RunError: a process has failed, too many steps in a row were skipped, or the checkpoint at a stop cannot be
            written. If the last step's cannot, `saving.failure` is set, so that the weights are exported all the same.
    """
    trainer, saver = run.trainer, run.saving.saver
    going = run.saving.pending is None or _follow_up(run)
    while going and trainer.finished < trainer.train.steps and not run.stop_signals.agreed_to_stop(saver.writes()):
        if saver.in_flight and not run.stop_signals.any_writes:
            run.monitor.attempt(run.saving.finish)
        _step(run)
        going = _follow_up(run)
    complete = going and trainer.finished == trainer.train.steps
    try:
        run.saving.save(trainer)
    except RunError as error:
        if not complete:
            raise
        run.saving.failure = error
    return complete


def _step(run: Run) -> None:
    trainer = run.trainer
    run.monitor.begin(f"step {trainer.finished + 1}")
    started = time.perf_counter()
    try:
        with run.profiler.step(trainer.finished + 1):
            outcome = trainer.run_step()
    except UnreadableData as error:
        run.monitor.attempt(lambda: run.saving.save(trainer))
        raise RunError(f"{error}; saved: {run.saving.saved}") from None
    run.monitor.step(outcome, time.perf_counter() - started, peak_memory_gib(trainer.engine))
    if outcome.skipped:
        why = f"{trainer.problem} (loss {outcome.loss:.4g}, loss scale {outcome.scale:g})"
        run.monitor.say(f"step {outcome.step:,}: skipped, since {why}")
        if trainer.skips >= trainer.train.max_skips:  # every process comes to the same answer
            run.saving.saver.keep_all = True  # an older one may be the way back
            run.monitor.attempt(lambda: run.saving.save(trainer))
            there = ", ".join(path.name for path in checkpoints(run.saving.saver.folder)) or "none"
            raise RunError(f"the last {trainer.skips} steps were skipped (train.max_skips), step {outcome.step} "
                           f"since {why}; checkpoints: {there}; go on with {trainer.cure}")


def _follow_up(run: Run) -> bool:
    """Evaluate after the finished step and then save it, as far as that is due; the checkpoint holds the results.

    Returns:
        False if a stop interrupted the evaluations; the checkpoint at the stop notes that they are still due.
    """
    step, pending = run.trainer.finished, run.saving.pending
    run.saving.pending = None
    if pending is not None or run.evaluation.due(step):
        loss, solved = run.evaluation.run(run.trainer, (pending or {}).get("loss"))
        if run.evaluation.stopped:
            run.saving.pending = {} if loss is None else {"loss": loss}
            return False
        run.saving.measured(step, loss, solved)
    if pending is not None or run.saving.due(step):
        run.monitor.attempt(lambda: run.saving.begin(run.trainer))
    return True
