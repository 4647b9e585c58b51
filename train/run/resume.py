"""A resumed run against the run that wrote the checkpoint: its recipe, its environment and its data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phi1.train.data.corpus import Corpus
from phi1.train.recipe.recipe import Recipe, Train
from phi1.train.run.folder import RunFolder
from phi1.train.runtime.launch import Rank, RunError
from phi1.train.step.schedule import learning_rate, schedule_end

if TYPE_CHECKING:
    from phi1.train.runtime.engine import Engine

# These may change when a run is resumed. Other keys of [model], [data] and [train] decide every later step.
_MAY_CHANGE = {"train.steps", "train.schedule_steps", "train.micro_batch_size", "train.threads", "train.precision",
               "train.activations", "train.max_skips", "train.max_loss_jump", "train.find_nonfinite"}


def start_engine(recipe: Recipe, rank: Rank) -> Engine:
    """What the recipe's run computes on in this process."""
    from phi1.train.runtime.engine import start  # imports torch, which a complete run can do without

    run, train = recipe.run, recipe.train
    return start(rank, run.device, train.precision, train.threads, run.shard_group, run.reshard)


def environment_of(recipe: Recipe, engine: Engine) -> dict[str, str | int]:
    """What must be equal for equal bits and may change in a run: the engine, and how a batch is cut."""
    micro_batch = recipe.train.micro_batch_size or recipe.train.batch_size // engine.world_size
    return engine.environment() | {"micro_batch": micro_batch}


def defining(recipe: Recipe) -> dict[str, Any]:
    """What every later step depends on, key by key: the model as resolved, the sequence length, the optimization."""
    model = {f"model.{key}": value for key, value in asdict(recipe.phi1_config()).items() if "dropout" not in key}
    train = {f"train.{key}": list(value) if isinstance(value, tuple) else value
             for key, value in asdict(recipe.train).items()}
    both = model | {"data.seq_len": recipe.data.seq_len} | train
    return {key: value for key, value in both.items() if key not in _MAY_CHANGE}


def check_continues(folder: RunFolder, checkpoint: Path, stored: dict[str, Any], recipe: Recipe) -> None:
    """Compare what defined the run when a checkpoint was saved with what defines it now.

    A key that is newer than the checkpoint had its default, which is to say what the trainer did before.

    Raises:
        RunError: they differ; the line names the keys with both values. Or the run is beyond its new end.
    """
    before = defining(Recipe()) | stored["defining"]
    changed = [f"{key} was {before[key]!r}, is {value!r}" for key, value in defining(recipe).items()
               if before[key] != value]
    if changed:
        raise RunError(f"{checkpoint} belongs to another run: {'; '.join(changed)}; go on with --config "
                       f"{folder.config}, or start another run with --run.folder")
    if stored["step"] > recipe.train.steps:
        raise RunError(f"train.steps: {checkpoint} has finished {stored['step']} steps already; got "
                       f"{recipe.train.steps}")


def check_bitwise(checkpoint: Path, stored: dict[str, Any], environment: dict[str, Any]) -> None:
    """Raise RunError if a run that goes on from a checkpoint in this environment would not have the same bits."""
    changed = _changed_environment(stored, environment)
    if "usual_loss" not in stored:
        changed = changed or "usual_loss was not recorded"
    if changed:
        raise RunError(f"{checkpoint} cannot go on bit for bit here: {changed}; give what it was, or leave --bitwise "
                       "out to go on with other rounding")


def _changed_environment(stored: dict[str, Any], environment: dict[str, Any]) -> str:
    before = stored["environment"]
    return "; ".join(f"{key} was {before.get(key, 'not recorded')}, is {value}" for key, value in environment.items()
                     if before.get(key) != value)


def check_data(checkpoint: Path, stored: dict[str, Any], train: Corpus) -> None:
    """Raise RunError if a checkpoint was trained on other data."""
    if stored["data"] != train.fingerprint:
        raise RunError(f"{checkpoint} was trained on other data than {train.folder} holds now (fingerprint "
                       f"{stored['data'][:12]}, now {train.fingerprint[:12]}); give --data.folder or another "
                       "--run.folder")


def notes(stored: dict[str, Any], environment: dict[str, Any], train: Train) -> Iterator[str]:
    """What keeps the rest of a run from being bitwise what it would have been, a line each."""
    if changed := _changed_environment(stored, environment):
        yield f"same batches and masks, but perhaps other rounding from here on: {changed}"
    end = schedule_end(train)
    if end != stored["schedule"]:
        yield (f"the learning rate now falls over {end:,} steps, before over {stored['schedule']:,}; the next step "
               f"takes {learning_rate(stored['step'], train):.3g}")
