"""The checks before a run starts. Each refuses in one line, and does nothing else.

No process group exists yet, so a refusal ends the command at once and affects no other process.
"""

from __future__ import annotations

import importlib.util
from dataclasses import asdict

from phi1.train.data.batch_plan import BatchPlan
from phi1.train.metrics.ledger import has_saved
from phi1.train.metrics.profiling import profiled_steps
from phi1.train.recipe.recipe import Recipe
from phi1.train.run.folder import RunFolder
from phi1.train.runtime.launch import Rank, RunError
from phi1.train.step.schedule import schedule_end

# Settings that model.init may have otherwise, since the weights' shape and meaning do not depend on them.
MAY_DIFFER = ("attention_dropout", "residual_dropout", "initializer_range", "max_position_embeddings")


def check_recipe(recipe: Recipe, rank: Rank) -> None:
    """Raise RunError for a recipe whose values do not fit together; every process comes to the same answer."""
    config, train, data = recipe.phi1_config(), recipe.train, recipe.data
    BatchPlan.of(train.batch_size, train.micro_batch_size, rank.rank, rank.world_size)
    rank.shard_group(recipe.run.shard_group)
    profiled_steps(recipe.run.profile, train.steps)
    if data.seq_len > config.max_position_embeddings:
        raise RunError(f"data.seq_len must be at most the model's context, model.max_position_embeddings "
                       f"{config.max_position_embeddings}; got {data.seq_len}")
    if data.tokenizer == "train" and data.vocab_size > config.vocab_size:
        raise RunError(f"data.vocab_size must be at most model.vocab_size, {config.vocab_size}; got {data.vocab_size}")
    rule = recipe.checkpoint
    if rule.best and (not recipe.eval.every or not rule.every or recipe.eval.every % rule.every):
        raise RunError("checkpoint.best needs eval.every to be a multiple of checkpoint.every, and neither to be 0; "
                       f"got {recipe.eval.every} and {rule.every}")
    if recipe.model.lora_rank and recipe.model.init is None:
        raise RunError("model.lora_rank needs model.init, a model whose weights stay as they are")
    check_humaneval(recipe)
    if recipe.run.wandb and importlib.util.find_spec("wandb") is None:
        raise RunError("run.wandb needs the package wandb, which is not installed: pip install wandb, or leave it out")
    if train.min_lr > train.lr:
        raise RunError(f"train.min_lr must be at most train.lr, {train.lr}; got {train.min_lr}")
    if train.warmup_steps > schedule_end(train):
        raise RunError(f"train.warmup_steps must be at most the schedule's {schedule_end(train)} steps; got "
                       f"{train.warmup_steps}")


def check_humaneval(recipe: Recipe) -> None:
    """Check, for a recipe with HumanEval, the consent to run the model's programs, and the file of problems."""
    file = recipe.eval.humaneval
    if file is None:
        if recipe.checkpoint.best == "humaneval":
            raise RunError("checkpoint.best humaneval needs eval.humaneval, a file of problems")
        return
    if not recipe.eval.execute:
        raise RunError("eval.humaneval runs programs that the model writes on this machine, with your rights and no "
                       "sandbox; --eval.execute true consents to it")
    from phi1.evaluate.humaneval import read_problems

    try:
        read_problems(file)
    except ValueError as error:
        raise RunError(f"eval.humaneval {error}") from None


def check_untrained(folder: RunFolder) -> None:
    """Raise RunError if a run without checkpoints has other results, which beginning anew would overwrite."""
    left = [path for path in (folder.summary, folder.export) if path.exists()]
    if has_saved(folder.ledger):
        left.append(folder.ledger)
    # Where no checkpoint could ever be written, the run has an export all the same, and the ledger of this very run.
    if left and not (left == [folder.export] and folder.ledger.exists()):
        names = ", ".join(map(str, left))
        raise RunError(f"run.folder {folder.path}: it was trained before, but no checkpoint is left in "
                       f"{folder.checkpoints} to go on from; give another --run.folder, or remove {names} to "
                       "start over")


def check_init(recipe: Recipe) -> None:
    """Raise RunError if model.init has no weights, or another model's. They are read when the model is built."""
    init = recipe.model.init
    if init is None:
        return
    from phi1.weights.files import locate
    from phi1.weights.huggingface import config_of

    try:
        given, own = asdict(config_of(locate(init) / "config.json")), asdict(recipe.phi1_config())
    except (OSError, ValueError, NotImplementedError) as error:
        raise RunError(f"model.init {init}: {' '.join(str(error).split())}") from None
    other = [f"{key} is {given[key]!r}, the run's is {value!r}" for key, value in own.items()
             if given[key] != value and key not in MAY_DIFFER]
    if other:
        raise RunError(f"model.init {init} is another model: its {'; '.join(other)}")
