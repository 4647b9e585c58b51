"""Compares a resumed run with the run that wrote the checkpoint: recipe, environment and data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phi1.train.data.corpus import Corpus
from phi1.train.recipe.recipe import CHANGEABLE, LORA, Recipe, Train, changes
from phi1.train.run.folder import RunFolder
from phi1.train.runtime.launch import Rank, RunError
from phi1.train.step.schedule import learning_rate, schedule_end

if TYPE_CHECKING:
    from phi1.train.runtime.engine import Engine

# These may change when a run is resumed. Other keys of [model], [data] and [train] decide every later step.
_MAY_CHANGE = {"train.steps", "train.schedule_steps", "train.micro_batch_size", "train.threads", "train.precision",
               "train.activations", "train.max_skips", "train.max_loss_jump", "train.find_nonfinite"}


def start_engine(recipe: Recipe, rank: Rank) -> Engine:
    """Choose device, precision and sharding of this process by the recipe."""
    from phi1.train.runtime.engine import start  # imports torch, which a complete run does not need

    run, train = recipe.run, recipe.train
    return start(rank, run.device, train.precision, train.threads, run.shard_group, run.reshard)


def environment_of(recipe: Recipe, engine: Engine) -> dict[str, Any]:
    """Return what may change when a run resumes, but must be equal for equal bits: the engine and the micro-batch.

    `ranks.meet` adds the hardware of the other processes.
    """
    micro_batch = recipe.train.micro_batch_size or recipe.train.batch_size // engine.world_size
    return engine.environment() | {"micro_batch": micro_batch}


def defining(recipe: Recipe) -> dict[str, Any]:
    """Return the keys that every later step depends on: resolved model, sequence length, optimization."""
    model = {f"model.{key}": value for key, value in asdict(recipe.phi1_config()).items() if "dropout" not in key}
    train = {f"train.{key}": list(value) if isinstance(value, tuple) else value
             for key, value in asdict(recipe.train).items()}
    model |= {f"model.{key}": getattr(recipe.model, key) for key in LORA}
    both = model | {"data.seq_len": recipe.data.seq_len} | train
    return {key: value for key, value in both.items() if key not in _MAY_CHANGE}


def check_continues(folder: RunFolder, checkpoint: Path, stored: dict[str, Any], recipe: Recipe) -> None:
    """Compare the defining keys of the run when a checkpoint was saved with those of the recipe now.

    A key that is newer than the checkpoint counts as its default, which is the trainer's behaviour before the key.

    Raises:
        RunError: they differ, and the line names the keys with both values; or the run is beyond its new end.
    """
    exact = recipe.run.bitwise or recipe.run.prove_resume
    allowed = {} if exact else changes(recipe.run.change)
    changed = [f"{key} was {old!r}, is {new!r}" for key, (old, new) in changed_keys(stored, recipe).items()
               if key not in allowed]
    if changed:
        own = checkpoint if "recipe" in stored else folder.config
        may = "" if exact or recipe.run.change else f"; {' and '.join(wanted)} may change with --run.change" \
            if (wanted := [key for key in changed_keys(stored, recipe) if key in CHANGEABLE]) else ""
        raise RunError(f"{checkpoint} belongs to another run: {'; '.join(changed)}; go on with --config {own}, or "
                       f"start another run with --run.folder{may}")
    if stored["step"] > recipe.train.steps:
        raise RunError(f"train.steps: {checkpoint} has finished {stored['step']} steps already; got "
                       f"{recipe.train.steps}")


def changed_keys(stored: dict[str, Any], recipe: Recipe) -> dict[str, tuple[Any, Any]]:
    """Return the defining keys that differ from those of a checkpoint: key -> (before, now)."""
    before = defining(Recipe()) | stored["defining"]
    return {key: (before[key], value) for key, value in defining(recipe).items() if before[key] != value}


def check_bitwise(checkpoint: Path, stored: dict[str, Any], environment: dict[str, Any]) -> None:
    """Raise RunError if a run that resumes from a checkpoint in this environment would not have the same bits."""
    changed = _changed_environment(stored, environment)
    if "usual_loss" not in stored:
        changed = changed or "usual_loss was not recorded"
    if changed:
        raise RunError(f"{checkpoint} cannot go on bit for bit here: {changed}; give what it was, or leave --bitwise "
                       "out to go on with other rounding")


def _changed_environment(stored: dict[str, Any], environment: dict[str, Any]) -> str:
    from phi1.train.runtime.environment import differences  # imports torch, which a complete run does not need

    before = {key: value for key, value in stored["environment"].items() if key in environment}
    changed = [f"{key} was {old}, is {new}" for key, (old, new) in
               differences(before, {key: environment[key] for key in before}).items()]
    unknown = [key for key in environment if key not in before]
    return "; ".join(changed + ([f"{', '.join(unknown)} not recorded"] if unknown else []))


def check_data(checkpoint: Path, stored: dict[str, Any], train: Corpus) -> None:
    """Raise RunError if a checkpoint was trained on other data."""
    if stored["data"] != train.fingerprint:
        raise RunError(f"{checkpoint} was trained on other data than {train.folder} holds now (fingerprint "
                       f"{stored['data'][:12]}, now {train.fingerprint[:12]}); give --data.folder or another "
                       "--run.folder")


def notes(stored: dict[str, Any], environment: dict[str, Any], train: Train,
          changed_by_wish: dict[str, tuple[Any, Any]]) -> Iterator[str]:
    """Yield one line for each change that may give the rest of a run other bits."""
    for key, (old, new) in changed_by_wish.items():
        yield f"{key} was {old!r}, is {new!r} from step {stored['step'] + 1:,} on (run.change)"
    if changed := _changed_environment(stored, environment):
        yield f"same batches and masks, but perhaps other rounding from here on: {changed}"
    end = schedule_end(train)
    if end != stored["schedule"]:
        yield (f"the learning rate now falls over {end:,} steps, before over {stored['schedule']:,}; the next step "
               f"takes {learning_rate(stored['step'], train):.3g}")
