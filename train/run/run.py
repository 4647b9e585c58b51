"""One process's way through an admitted run: connect, build, load, train, evaluate, export."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor

from phi1.evaluate.humaneval import read_problems
from phi1.train.checkpoint.best import Standing
from phi1.train.checkpoint.checkpoint import Saver, load_checkpoint
from phi1.train.checkpoint.convert import read_weights
from phi1.train.checkpoint.files import checkpoint_name
from phi1.train.data.batch_plan import BatchPlan
from phi1.train.data.corpus import Corpus
from phi1.train.evaluate.humaneval import HumanEval
from phi1.train.evaluate.samples import Samples, function_headers
from phi1.train.evaluate.validation import Figures, HeldOut, xz_bits_per_byte
from phi1.train.metrics.ledger import Ledger
from phi1.train.metrics.loggers import open_loggers
from phi1.train.metrics.mfu import Mfu
from phi1.train.metrics.profiling import Profiler, profiled_steps
from phi1.train.metrics.progress import Progress
from phi1.train.plan.out_of_memory import explained
from phi1.train.recipe.recipe import Recipe
from phi1.train.run.corpus import open_on_all_ranks, read_again
from phi1.train.run.folder import RunFolder
from phi1.train.run.loop import Loop
from phi1.train.run.report import Reached, export, show_completions, show_summary, write_summary
from phi1.train.run.resume import defining, environment_of, notes, start_engine
from phi1.train.run.start import Start
from phi1.train.runtime.engine import Engine, build_model, connect_processes
from phi1.train.runtime.launch import Rank, RunError, on_signals, say
from phi1.train.runtime.stop_signals import StopSignals
from phi1.train.runtime.watchdog import Watchdog
from phi1.train.step.schedule import schedule_end
from phi1.train.step.trainer import Trainer

if TYPE_CHECKING:
    from torch.distributed import Store


def run(recipe: Recipe, folder: RunFolder, rank: Rank, store: Store, start: Start) -> str | None:
    """Train from a checkpoint, or from the beginning, to the end.

    Args:
        recipe: admitted.
        folder: locked by rank 0.
        rank: this process.
        store: through which the processes find each other.
        start: the corpus that rank 0 has read and hashed, and the checkpoint to resume from, if any.

    Returns:
        None if the run is complete; else where it was stopped, for rank 0 to print.

    Raises:
        RunError: the run cannot go on; every process raises it.
    """
    began = time.monotonic()
    with Watchdog(rank.rank, recipe.run.watchdog, folder.heartbeat if rank.rank == 0 else None) as watchdog:
        loop, found, weights = train(recipe, folder, rank, store, start, watchdog)
    dist.destroy_process_group()
    trainer, held_out, samples, progress = loop.trainer, loop.held_out, loop.samples, loop.progress
    if found is None:
        return (f"stopped by {loop.stop_signals.signal_name or 'a signal'} after step {trainer.finished:,} of "
                f"{recipe.train.steps:,}, which is saved in {loop.saved}")
    if rank.rank == 0:
        on_signals(signal.default_int_handler)  # nothing that a stop would have to save is left
        if loop.stop_signals.signal_name:  # since all last agreed to go on
            raise KeyboardInterrupt
        figures, solved = found
        reached = Reached(trainer.finished, figures.loss, figures.bits_per_byte, xz_bits_per_byte(held_out.text),
                          figures.n_bytes, trainer.finished * progress.tokens, progress.tokens_per_s(trainer.finished),
                          time.monotonic() - began, trainer.skipped, solved)
        last, rule = Standing(trainer.finished, figures.loss, solved), recipe.checkpoint.best
        if rule and loop.best and loop.best.beats(last, rule):
            weights = weights_of_best(folder.checkpoints / checkpoint_name(loop.best.step), weights,
                                      f"the best by {rule}: {loop.best}; the last step: {last}")
        export(weights, recipe.phi1_config(), samples.tokenizer, folder)
        write_summary(reached, folder)
        show_completions(folder, samples.headers, samples.seed)
        show_summary(reached, folder, samples.headers)
    return None


def train(recipe: Recipe, folder: RunFolder, rank: Rank, store: Store, start: Start,
          watchdog: Watchdog) -> tuple[Loop, tuple[Figures, float | None] | None, dict[str, Tensor]]:
    """Collective: connect, build, load and train; the loop, what was reached in the end, and the weights on rank 0.

    Nothing was reached, and no weights are gathered, where the run was stopped. Until all have built and loaded, there
    is nothing that a stop would have to save, and signals end the process.
    """
    if rank.world_size > 1:  # one that waits for another would not come to a handler in Python
        on_signals(signal.SIG_DFL)
    engine = start_engine(recipe, rank)
    connect_processes(engine, rank, store)
    folder.check_shared(rank.rank)
    corpus, validation, tokenizer = open_on_all_ranks(recipe, start.fingerprint, rank)
    checkpoint = folder.checkpoints / start.checkpoints[0] if start.checkpoints else None
    stop_signals = StopSignals(rank, recipe.run.time_limit)
    with explained(recipe, engine, folder.path, rank):
        trainer, stored = make_trainer(recipe, engine, corpus, rank, checkpoint)
        held_out = HeldOut(validation, tokenizer, recipe.data.seq_len, recipe.eval.sequences)  # waits for all
        on_signals(stop_signals.note)
        samples = Samples(folder.samples, tokenizer, function_headers(held_out.text, recipe.eval.completions),
                          recipe.train.seed)
        humaneval = HumanEval(folder.samples, tokenizer, read_problems(recipe.eval.humaneval), recipe.eval.timeout) \
            if recipe.eval.humaneval else None
        facts = {"defining": defining(recipe), "schedule": schedule_end(recipe.train), "data": corpus.fingerprint,
                 "environment": environment_of(recipe, engine)}
        facts |= {key: stored[key] for key in ("best", "due") if key in stored}
        with Progress(recipe.train.steps, trainer.finished, recipe.train.batch_size * recipe.data.seq_len,
                      silent=rank.rank > 0) as progress:
            _announce_start(progress, recipe, trainer, stored)
            ledger = _ledger(folder, recipe, trainer, stop_signals) if rank.rank == 0 else None
            saver = Saver(folder.checkpoints, recipe.checkpoint.keep, recipe.checkpoint.keep_every)
            profiler = Profiler(profiled_steps(recipe.run.profile if rank.rank == 0 else "", recipe.train.steps),
                                folder.path, progress.say, trainer.finished)
            loop = Loop(recipe, folder, trainer, held_out, samples, humaneval, stop_signals, progress, ledger,
                        rank.rank, facts, Mfu.of_run(recipe, engine), watchdog, saver, profiler, checkpoint)
            found = loop.assess() if loop.run() else None
            profiler.finish()
            if found:
                watchdog.report("the corpus, read once more")
                read_again(recipe, start.fingerprint, rank, progress.say)
        if ledger:
            ledger.close()
        return loop, found, loop.weights() if found else {}


def weights_of_best(chosen: Path, last: dict[str, Tensor], why: str) -> dict[str, Tensor]:
    """Rank 0: what a checkpoint holds, or the `last` step's weights if it is damaged or gone."""
    try:
        weights, _ = read_weights(chosen)
    except (RunError, OSError, MemoryError) as error:
        say(f"warning: {str(error) or 'no memory'}; exporting the last step instead of {why}")
        return last
    say(f"exporting {chosen.name}, {why}")
    return weights


def make_trainer(recipe: Recipe, engine: Engine, corpus: Corpus, rank: Rank,
                 checkpoint: Path | None) -> tuple[Trainer, dict[str, Any]]:
    """Collective: the trainer, new or as it was saved, and what was noted with it."""
    batch_plan = BatchPlan.of(recipe.train.batch_size, recipe.train.micro_batch_size, rank.rank, rank.world_size)
    init = None if checkpoint else recipe.model.init
    model = build_model(recipe.phi1_config(), engine, recipe.train.seed, init)
    model.recompute = recipe.train.activations.removeprefix("recompute-")
    trainer = Trainer(model, recipe.train, recipe.data.seq_len, corpus, batch_plan, engine)
    return trainer, load_checkpoint(trainer, checkpoint) if checkpoint else {}


def _announce_start(progress: Progress, recipe: Recipe, trainer: Trainer, stored: dict[str, Any]) -> None:
    """Say what is trained on what, and what is not as it was when the checkpoint was saved."""
    environment, train = environment_of(recipe, trainer.engine), recipe.train
    what = f"{recipe.model.preset}, {recipe.phi1_config().num_parameters:,} parameters"
    copies = f" in {environment['replicas']} replicas" if trainer.engine.replicas > 1 else ""
    where = (f"{environment['world_size']} x {environment['device']}{copies}, {environment['threads']} threads, "
             f"{environment['precision']}")
    batch = f"{train.batch_size} x {recipe.data.seq_len} tokens a step"
    if not stored:
        progress.say(f"training {what}: {train.steps:,} steps of {batch} ({where})")
        return
    progress.say(f"going on with {what}, after step {trainer.finished:,} of {train.steps:,}, {batch} ({where})")
    for note in notes(stored, environment, train):
        progress.say(f"note: {note}")


def _ledger(folder: RunFolder, recipe: Recipe, trainer: Trainer, stop_signals: StopSignals) -> Ledger | None:
    """Rank 0's ledger; if it cannot be written, all processes stop before the first step."""
    try:
        loggers = open_loggers(folder.path, trainer.finished, recipe.as_dict(), tensorboard=recipe.run.tensorboard,
                             wandb=recipe.run.wandb)
        ledger = Ledger(folder.ledger, trainer.finished, loggers)
        ledger.start({"finished": trainer.finished, "environment": environment_of(recipe, trainer.engine),
                      "data": trainer.corpus.fingerprint}, recipe.as_dict())
        return ledger
    except RunError as error:
        stop_signals.failure = error
        return None
