"""Builds the parts of a run on one process: connects the processes, opens the data, builds and loads the model."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phi1.evaluate.humaneval import read_problems
from phi1.tokenizer import Tokenizer
from phi1.train.checkpoint.checkpoint import Saver, load_checkpoint
from phi1.train.data.batch_plan import BatchPlan
from phi1.train.data.corpus import Corpus
from phi1.train.evaluate.humaneval import HumanEval
from phi1.train.evaluate.samples import Samples, function_headers
from phi1.train.evaluate.validation import HeldOut
from phi1.train.metrics.ledger import Ledger
from phi1.train.metrics.loggers import open_loggers
from phi1.train.metrics.mfu import Mfu
from phi1.train.metrics.profiling import Profiler, profiled_steps
from phi1.train.metrics.progress import Progress
from phi1.train.plan.out_of_memory import explained
from phi1.train.recipe.recipe import Recipe
from phi1.train.run.corpus import open_on_all_ranks
from phi1.train.run.evaluation import Evaluation
from phi1.train.run.folder import RunFolder
from phi1.train.run.monitor import Monitor
from phi1.train.run.ranks import meet
from phi1.train.run.resume import changed_keys, check_bitwise, defining, notes
from phi1.train.run.saving import Saving
from phi1.train.run.start import Start
from phi1.train.runtime.engine import Engine, build_model
from phi1.train.runtime.launch import Rank, RunError, on_signals
from phi1.train.runtime.stop_signals import StopSignals
from phi1.train.runtime.watchdog import Watchdog
from phi1.train.step.schedule import schedule_end
from phi1.train.step.trainer import Trainer

if TYPE_CHECKING:
    from torch.distributed import Store


@dataclass(frozen=True)
class Run:
    """The parts of a run, one of each on every process; its trainer is new, or loaded from a checkpoint."""

    trainer: Trainer
    evaluation: Evaluation
    saving: Saving
    stop_signals: StopSignals
    monitor: Monitor
    profiler: Profiler


@contextmanager
def build(recipe: Recipe, folder: RunFolder, rank: Rank, store: Store, start: Start,
          watchdog: Watchdog) -> Iterator[Run]:
    """Collective: connect, open, build and load; at the end of the block close the terminal line and the ledger.

    Until all processes have loaded, a stop has nothing to save, and signals end the process.

    Raises:
        RunError: on every process, if one fails; or out of memory, here or in the block.
    """
    if rank.world_size > 1:  # a process that waits for another would not run a handler in Python
        on_signals(signal.SIG_DFL)
    engine, environment = meet(recipe, rank, store)
    folder.check_shared(rank.rank)
    corpus, validation, tokenizer = open_on_all_ranks(recipe, start.fingerprint, rank)
    checkpoint = folder.checkpoints / start.checkpoints[0] if start.checkpoints else None
    stop_signals = StopSignals(rank, recipe.run.time_limit)
    with explained(recipe, engine, folder.path, rank):
        trainer, stored = make_trainer(recipe, engine, corpus, rank, checkpoint)
        if checkpoint and recipe.run.bitwise:
            check_bitwise(checkpoint, stored, environment)
        if stored and changed_keys(stored, recipe):
            trainer.skips = 0  # the change may have ended them
        held_out = HeldOut(validation, tokenizer, recipe.data.seq_len, recipe.eval.sequences)  # waits for all ranks
        on_signals(stop_signals.note)
        samples, humaneval = _tasks(recipe, folder, tokenizer, held_out)
        with Progress(recipe.train.steps, trainer.finished, recipe.train.batch_size * recipe.data.seq_len,
                      silent=rank.rank > 0) as progress:
            _announce_start(progress, recipe, trainer, stored, environment)
            ledger = _ledger(folder, recipe, trainer, stop_signals, environment) if rank.rank == 0 else None
            monitor = Monitor(watchdog, progress, ledger, Mfu.of_run(trainer.model.config, recipe.data.seq_len, engine))
            # Half of the watchdog's limit: a save that fails on one process costs a save, and not the run.
            saver = Saver(folder.checkpoints, recipe.checkpoint.keep, recipe.checkpoint.keep_every,
                          recipe.run.watchdog / 2)
            profiler = Profiler(profiled_steps(recipe.run.profile if rank.rank == 0 else "", recipe.train.steps),
                                folder.path, progress.say, trainer.finished)
            saving = Saving(saver, recipe.checkpoint, recipe.train.steps, _facts(recipe, environment, corpus, stored),
                            monitor, checkpoint)
            evaluation = Evaluation(held_out, samples, humaneval, recipe.eval, recipe.checkpoint.every,
                                    recipe.train.steps, rank.rank, stop_signals, monitor)
            yield Run(trainer, evaluation, saving, stop_signals, monitor, profiler)
        if ledger:
            ledger.close()


def make_trainer(recipe: Recipe, engine: Engine, corpus: Corpus, rank: Rank,
                 checkpoint: Path | None) -> tuple[Trainer, dict[str, Any]]:
    """Collective: make the trainer, new or from a checkpoint; returns it and the checkpoint's notes."""
    batch_plan = BatchPlan.of(recipe.train.batch_size, recipe.train.micro_batch_size, rank.rank, rank.world_size)
    init = None if checkpoint else recipe.model.init
    lora = (recipe.model.lora_rank, recipe.model.lora_alpha) if recipe.model.lora_rank else None
    model = build_model(recipe.phi1_config(), engine, recipe.train.seed, init, lora)
    model.recompute = recipe.train.activations.removeprefix("recompute-")
    trainer = Trainer(model, recipe.train, recipe.data.seq_len, corpus, batch_plan, engine)
    return trainer, load_checkpoint(trainer, checkpoint) if checkpoint else {}


def _tasks(recipe: Recipe, folder: RunFolder, tokenizer: Tokenizer,
           held_out: HeldOut) -> tuple[Samples, HumanEval | None]:
    """Make the completions of held-out headers, and HumanEval if it is requested."""
    rules = recipe.eval
    samples = Samples(folder.samples, tokenizer, function_headers(held_out.text, rules.completions), recipe.train.seed)
    if rules.humaneval is None:
        return samples, None
    return samples, HumanEval(folder.samples, tokenizer, read_problems(rules.humaneval), rules.timeout)


def _facts(recipe: Recipe, environment: dict[str, Any], corpus: Corpus, stored: dict[str, Any]) -> dict[str, Any]:
    """Return the facts of the run for its checkpoints, and those of the step that it resumes from."""
    facts = {"defining": defining(recipe), "schedule": schedule_end(recipe.train), "data": corpus.fingerprint,
             "environment": environment, "recipe": recipe.as_dict(), "changes": stored.get("changes", [])}
    if stored and (changed := changed_keys(stored, recipe)):
        facts["changes"] = [*facts["changes"], {"step": stored["step"], **changed}]
    return facts | {key: stored[key] for key in ("best", "due") if key in stored}


def _announce_start(progress: Progress, recipe: Recipe, trainer: Trainer, stored: dict[str, Any],
                    environment: dict[str, Any]) -> None:
    """Say what is trained on which hardware, and what has changed since the checkpoint."""
    train = recipe.train
    what = f"{recipe.model.preset}, {recipe.phi1_config().num_parameters:,} parameters"
    copies = f" in {environment['replicas']} replicas" if trainer.engine.replicas > 1 else ""
    where = (f"{environment['world_size']} x {environment['device']}{copies}, {environment['threads']} threads, "
             f"{environment['precision']}")
    batch = f"{train.batch_size} x {recipe.data.seq_len} tokens a step"
    if not stored:
        progress.say(f"training {what}: {train.steps:,} steps of {batch} ({where})")
        return
    progress.say(f"going on with {what}, after step {trainer.finished:,} of {train.steps:,}, {batch} ({where})")
    changed = changed_keys(stored, recipe)
    for note in notes(stored, environment, train, changed):
        progress.say(f"note: {note}")


def _ledger(folder: RunFolder, recipe: Recipe, trainer: Trainer, stop_signals: StopSignals,
            environment: dict[str, Any]) -> Ledger | None:
    """Open rank 0's ledger; if it cannot be written, all processes stop before the first step."""
    try:
        loggers = open_loggers(folder.path, trainer.finished, recipe.as_dict(), tensorboard=recipe.run.tensorboard,
                             wandb=recipe.run.wandb)
        ledger = Ledger(folder.ledger, trainer.finished, loggers)
        ledger.start({"finished": trainer.finished, "environment": environment, "data": trainer.corpus.fingerprint},
                     recipe.as_dict())
        return ledger
    except RunError as error:
        stop_signals.failure = error
        return None
