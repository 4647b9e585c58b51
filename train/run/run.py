"""A run on one process from its accepted start to its end: build, train, evaluate, export."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import Tensor

from phi1.train.checkpoint.best import Standing
from phi1.train.checkpoint.checkpoint import gather_weights
from phi1.train.checkpoint.convert import read_weights
from phi1.train.checkpoint.files import checkpoint_name
from phi1.train.evaluate.validation import Figures, xz_bits_per_byte
from phi1.train.recipe.recipe import Recipe
from phi1.train.run import loop
from phi1.train.run.build import Run, build
from phi1.train.run.corpus import read_again
from phi1.train.run.folder import RunFolder
from phi1.train.run.report import Reached, export, show_completions, show_summary, write_summary
from phi1.train.run.start import Start
from phi1.train.runtime.all_ranks import Failed
from phi1.train.runtime.launch import Rank, RunError, on_signals, say
from phi1.train.runtime.watchdog import Watchdog

if TYPE_CHECKING:
    from torch.distributed import Store


def run(recipe: Recipe, folder: RunFolder, rank: Rank, store: Store, start: Start) -> str | None:
    """Train from a checkpoint, or from the beginning, to the end.

    Args:
        recipe: checked.
        folder: locked by rank 0.
        rank: this process.
        store: through which the processes find each other.
        start: the corpus that rank 0 has verified, and the checkpoint to resume from, if any.

    Returns:
        None if the run is complete; else the step and the reason of its stop.

    Raises:
        RunError: the run cannot continue; every process raises it.
    """
    began = time.monotonic()
    with Watchdog(rank.rank, recipe.run.watchdog, folder.heartbeat if rank.rank == 0 else None) as watchdog:
        trained, found, weights = train(recipe, folder, rank, store, start, watchdog)
    dist.destroy_process_group()
    trainer, stop_signals = trained.trainer, trained.stop_signals
    if found is None:
        return (f"stopped by {stop_signals.reason} after step {trainer.finished:,} of "
                f"{recipe.train.steps:,}, which is saved in {trained.saving.saved}")
    if rank.rank == 0:
        on_signals(signal.default_int_handler)  # from here on a stop has nothing to save
        if stop_signals.reason:  # a signal since all ranks last agreed to continue
            raise KeyboardInterrupt
        figures, solved = found
        held_out, samples, progress = trained.evaluation.held_out, trained.evaluation.samples, trained.monitor.progress
        reached = Reached(trainer.finished, figures.loss, figures.bits_per_byte, xz_bits_per_byte(held_out.text),
                          figures.n_bytes, trainer.finished * progress.tokens, progress.tokens_per_s(trainer.finished),
                          time.monotonic() - began, trainer.skipped, solved)
        last, best, rule = Standing(trainer.finished, figures.loss, solved), trained.saving.best, recipe.checkpoint.best
        exported, step = weights, trainer.finished
        if rule and best and best.beats(last, rule):
            exported = weights_of_best(folder.checkpoints / checkpoint_name(best.step), weights,
                                       f"the best by {rule}: {best}; the last step: {last}")
            step = step if exported is weights else best.step
        failure = trained.saving.failure
        try:
            export(exported, recipe.phi1_config(), samples.tokenizer, folder, step)
        except RunError as error:
            raise (RunError(f"{failure}; nor could the export: {error}") if failure else error) from None
        if failure:  # without a summary the run is not complete
            raise RunError(f"{failure}; the weights of the last step are in {folder.export}; once that is mended, the "
                           "same command trains from the newest checkpoint to the end again, for its optimizer")
        write_summary(reached, folder)
        show_completions(folder, samples.headers, samples.seed)
        show_summary(reached, folder, samples.headers)
    return None


def train(recipe: Recipe, folder: RunFolder, rank: Rank, store: Store, start: Start,
          watchdog: Watchdog) -> tuple[Run, tuple[Figures, float | None] | None, dict[str, Tensor]]:
    """Collective: build and train; returns the run, its final results, and the weights on rank 0.

    If the run was stopped, there are no results and no weights.
    """
    with build(recipe, folder, rank, store, start, watchdog) as built:
        found = built.evaluation.at_the_end(built.trainer) if loop.train(built) else None
        built.profiler.finish()
        if found:
            watchdog.report("the corpus, read once more")
            read_again(recipe, start.fingerprint, rank, built.monitor.say)
        return built, found, weights_of_last(built) if found else {}


def weights_of_last(built: Run) -> dict[str, Tensor]:
    """Collective: gather the trained weights on rank 0's CPU. Raises RunError if a process has too little memory."""
    built.monitor.begin("the export")
    try:
        return gather_weights(built.trainer.model)
    except Failed as error:
        saved = built.saving.saved
        raise RunError(f"the trained weights could not be gathered: {error}; they are saved in {saved}, which "
                       f"phi1 convert --model {saved} --out FOLDER exports as well") from None


def weights_of_best(chosen: Path, last: dict[str, Tensor], why: str) -> dict[str, Tensor]:
    """Rank 0: read the weights of a checkpoint, or return the `last` step's if it is damaged or gone."""
    try:
        weights, _ = read_weights(chosen)
    except (RunError, OSError, MemoryError) as error:
        say(f"warning: {str(error) or 'no memory'}; exporting the last step instead of {why}")
        return last
    say(f"exporting {chosen.name}, {why}")
    return weights
