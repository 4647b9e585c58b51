"""What is checked before a run may start: everything that can be refused is refused here, in one line.

No process group exists yet, so that a refusal ends the command at once and touches no other process.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import socket
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phi1.tokenizer import Tokenizer
from phi1.train.checkpoint.files import Notes, checkpoints, choose, remove_after, step_of
from phi1.train.data.batch_plan import BatchPlan
from phi1.train.data.corpus import Corpus, open_corpus
from phi1.train.data.shards import MANIFEST, read_manifest
from phi1.train.metrics.ledger import has_saved, read_ledger
from phi1.train.metrics.profiling import profiled_steps
from phi1.train.recipe.recipe import Recipe
from phi1.train.run.folder import RunFolder, check_bitwise, check_continues
from phi1.train.run.report import show_complete
from phi1.train.runtime.launch import Rank, RunError, say
from phi1.train.step.schedule import schedule_end

if TYPE_CHECKING:
    from phi1.train.runtime.engine import Engine

COMPLETE = "complete"
# Between the weights that a run starts from and its model: neither shape nor function depends on these.
MAY_DIFFER = ("attention_dropout", "residual_dropout", "initializer_range", "max_position_embeddings")


def check_recipe(recipe: Recipe, rank: Rank) -> None:
    """What the recipe alone decides; every process comes to the same answer.

    Raises:
        RunError: values that do not go together.
    """
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
    check_humaneval(recipe)
    if recipe.run.wandb and importlib.util.find_spec("wandb") is None:
        raise RunError("run.wandb needs the package wandb, which is not installed: pip install wandb, or leave it out")
    if train.min_lr > train.lr:
        raise RunError(f"train.min_lr must be at most train.lr, {train.lr}; got {train.min_lr}")
    if train.warmup_steps > schedule_end(train):
        raise RunError(f"train.warmup_steps must be at most the schedule's {schedule_end(train)} steps; got "
                       f"{train.warmup_steps}")


def check_humaneval(recipe: Recipe) -> None:
    """See that the model's programs may be run, if they are asked for, and that there are problems."""
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


def admit(recipe: Recipe, folder: RunFolder, rank: Rank) -> str:
    """Rank 0: take the run's folder, choose the checkpoint to go on from, and see that the data are there.

    Returns:
        The fingerprint of the data and, after a blank, the name of the checkpoint if there is one; or COMPLETE, after
        saying so.

    Raises:
        RunError: the run cannot start.
    """
    folder.lock()
    launch = os.environ.get("TORCHELASTIC_RUN_ID", "")
    checkpoint = choose(folder.checkpoints, _asked_for(recipe, folder, rank, launch))
    stored = None
    if checkpoint is None:
        check_untrained(folder)
        check_init(recipe)
    else:
        stored = Notes(checkpoint)
        check_continues(folder, checkpoint, stored, recipe)
        summary = folder.completed(recipe.train.steps)
        if summary and stored["step"] == recipe.train.steps:
            show_complete(summary, folder, rank)
            return COMPLETE
    environment = environment_of(recipe, start_engine(recipe, rank))
    if checkpoint and stored and recipe.run.bitwise:
        check_bitwise(checkpoint, stored, environment)
    prepare_data(recipe)
    train, _, _ = open_data(recipe)
    if checkpoint and stored:
        check_data(checkpoint, stored, train)
    for name in remove_after(folder.checkpoints, checkpoint):
        say(f"removed {folder.checkpoints / name}, which lies after {checkpoint and checkpoint.name}")
    folder.store(recipe, launch)
    return f"{train.fingerprint} {checkpoint.name}" if checkpoint else train.fingerprint


def _asked_for(recipe: Recipe, folder: RunFolder, rank: Rank, launch: str) -> str:
    """What to go on from. A launch goes back to an older checkpoint once; its restarts go on from what came since."""
    resume = recipe.checkpoint.resume
    if not rank.attempt:
        folder.went_back.unlink(missing_ok=True)  # of an earlier launch: without --standalone all have one name
    elif resume != "auto" and folder.has_gone_back(launch):
        say(f"note: torchrun has restarted the run, which goes on from its newest checkpoint; {resume} was where it "
            "began")
        return "auto"
    return resume


def admit_proof(recipe: Recipe, folder: RunFolder, rank: Rank) -> str:
    """Rank 0: see that the last `run.prove_resume` steps can be run again here.

    Returns:
        The fingerprint of the data and the names of the checkpoint to begin with and of the newest, which is to come
        out, with blanks between.

    Raises:
        RunError: they cannot, or torchrun has restarted a proof that had come to its end.
    """
    folder.lock()
    if rank.attempt and folder.not_proven.exists():
        raise RunError(folder.not_proven.read_text(encoding="utf-8"))
    folder.not_proven.unlink(missing_ok=True)
    found = checkpoints(folder.checkpoints)
    newest = step_of(found[-1]) if found else 0
    before = [path for path in found if step_of(path) <= newest - recipe.run.prove_resume]
    if not before:
        there = ", ".join(path.name for path in found) or "none"
        raise RunError(f"--prove-resume {recipe.run.prove_resume} needs a checkpoint as many steps before the newest "
                       f"in {folder.checkpoints}; there: {there}; --checkpoint.keep and keep_every keep more")
    try:
        read_ledger(folder.ledger)
    except (OSError, ValueError) as error:
        raise RunError(f"--prove-resume: {folder.ledger} cannot be read: {error}") from None
    environment, (train, _, _) = environment_of(recipe, start_engine(recipe, rank)), open_data(recipe)
    for path in (before[-1], found[-1]):
        choose(folder.checkpoints, path.name)
        stored = Notes(path)
        check_continues(folder, path, stored, recipe)
        check_bitwise(path, stored, environment)
        check_data(path, stored, train)
    return f"{train.fingerprint} {before[-1].name} {found[-1].name}"


def start_engine(recipe: Recipe, rank: Rank) -> Engine:
    """What the recipe's run computes on in this process."""
    from phi1.train.runtime.engine import start  # imports torch, which a complete run can do without

    run, train = recipe.run, recipe.train
    return start(rank, run.device, train.precision, train.threads, run.shard_group, run.reshard)


def environment_of(recipe: Recipe, engine: Engine) -> dict[str, str | int]:
    """What must be equal for equal bits and may change in a run: the engine, and how a batch is cut."""
    micro_batch = recipe.train.micro_batch_size or recipe.train.batch_size // engine.world_size
    return engine.environment() | {"micro_batch": micro_batch}


def check_data(checkpoint: Path, stored: dict[str, Any], train: Corpus) -> None:
    """Raise RunError if a checkpoint was trained on other data."""
    if stored["data"] != train.fingerprint:
        raise RunError(f"{checkpoint} was trained on other data than {train.folder} holds now (fingerprint "
                       f"{stored['data'][:12]}, now {train.fingerprint[:12]}); give --data.folder or another "
                       "--run.folder")


def check_untrained(folder: RunFolder) -> None:
    """See that beginning anew overwrites no trained model: without checkpoints nothing else may be left of a run.

    Raises:
        RunError: something is left.
    """
    left = [path for path in (folder.summary, folder.export) if path.exists()]
    if has_saved(folder.ledger):
        left.append(folder.ledger)
    if left:
        names = ", ".join(map(str, left))
        raise RunError(f"run.folder {folder.path}: it was trained before, but no checkpoint is left in "
                       f"{folder.checkpoints} to go on from; give another --run.folder, or remove {names} to "
                       "start over")


def check_init(recipe: Recipe) -> None:
    """See that the weights to start from are there, and of the run's model. They are read when that is built.

    Raises:
        RunError: they are not.
    """
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


def open_data(recipe: Recipe, fingerprint: str | None = None, verify: bool = True) -> tuple[Corpus, Corpus, Tokenizer]:
    """Training split, validation split and tokenizer of a prepared corpus.

    Args:
        recipe: names the folder.
        fingerprint: of the corpus that the run is about; None for whatever is there.
        verify: read all of it and compare its hashes.

    Raises:
        RunError: it is damaged, does not fit the model, is too small for one batch, or another one takes its place.
    """
    folder, vocab_size = Path(recipe.data.folder), recipe.phi1_config().vocab_size
    try:
        train, validation = (open_corpus(folder, split, verify=verify) for split in ("train", "val"))
        train.require_samples(recipe.data.seq_len, recipe.train.batch_size)
        validation.require_samples(recipe.data.seq_len, 1)
        tokenizer = train.load_tokenizer()
        found = [train.fingerprint, validation.fingerprint, read_manifest(folder)["fingerprint"]]
    except ValueError as error:  # DataError, and what the tokenizer raises
        raise RunError(str(error)) from None
    except OSError as error:
        raise RunError(f"data.folder {folder}: {error.strerror}") from None
    if other := set(found) - {fingerprint or found[0]}:
        raise RunError(f"data.folder {folder}: another corpus has taken its place since the run began (fingerprint "
                       f"{(fingerprint or found[0])[:12]}, now {min(other)[:12]}); give the same command again")
    if train.vocab_size > vocab_size:
        raise RunError(f"model.vocab_size must be at least {train.vocab_size}, the number of token ids in {folder}; "
                       f"got {vocab_size}")
    return train, validation, tokenizer


def open_on_all_ranks(recipe: Recipe, fingerprint: str, rank: Rank) -> tuple[Corpus, Corpus, Tokenizer]:
    """Collective: `open_data` on every process. On each machine but rank 0's the first process reads all of it.

    Raises:
        Failed: on every process, if one cannot.
    """
    from phi1.train.runtime.all_ranks import all_ranks, fail  # imports torch, which a complete run can do without

    def open_own() -> tuple[Corpus, Corpus, Tokenizer]:
        try:
            return open_data(recipe, fingerprint, verify=rank.rank > 0 and rank.local_rank == 0)
        except RunError as error:
            fail(f"rank {rank.rank} on {socket.gethostname()}: {error}" if rank.rank else str(error))

    [opened] = all_ranks(open_own, keep=True)
    return opened


def read_again(recipe: Recipe, fingerprint: str, rank: Rank, report: Callable[[str], None]) -> None:
    """Collective, at the end: one process of each machine sees whether its corpus is as it was when the run began."""
    from phi1.train.runtime.all_ranks import Failed, all_ranks

    try:
        all_ranks(lambda: open_data(recipe, fingerprint) if rank.local_rank == 0 else None, keep=True)
    except Failed as error:
        report(f"warning: the corpus has changed since the run began, and may have been read like that: {error}")


def prepare_data(recipe: Recipe) -> None:
    """Make the corpus if its folder is not there. A corpus that is there is taken as it is, whatever it was made from.

    Raises:
        RunError: it cannot be made, or it was made from another source than the one asked for.
    """
    from phi1.train.prepare.prepare import prepare

    data, folder = recipe.data, Path(recipe.data.folder)
    try:
        if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
            say(f"preparing {folder} from {data.source}")
            say(str(prepare(data.source, folder, tokenizer=data.tokenizer, vocab_size=data.vocab_size,
                            workers=data.workers, report=say)))
    except (ValueError, OSError) as error:
        raise RunError(f"data.folder {folder}: {error}") from None
    made_from = _made_from(recipe)
    if data.source != Recipe().data.source and not any(_same_source(data.source, source) for source in made_from):
        raise RunError(f"data.folder {folder} was made from {', '.join(made_from)}, not from data.source "
                       f"{data.source}; give another --data.folder for it")


def _made_from(recipe: Recipe) -> list[str]:
    """The sources that the corpus was made from, as they were given."""
    data, folder = recipe.data, Path(recipe.data.folder)
    size = f" --vocab-size {data.vocab_size}" if data.tokenizer == "train" else ""
    again = (f"phi1 prepare --source {shlex.quote(data.source)} --tokenizer {shlex.quote(data.tokenizer)}{size} "
             f"--out {shlex.quote(data.folder)} --force")
    if not (folder / MANIFEST).exists():
        raise RunError(f"data.folder {folder}: it is there, but holds no corpus (no {MANIFEST}); give another "
                       f"--data.folder, or make the corpus with: {again}")
    try:
        return read_manifest(folder)["made"].get("sources", [])
    except ValueError as error:
        raise RunError(f"data.folder: {error} with: {again}") from None
    except OSError as error:
        raise RunError(f"data.folder: {error.filename}: {error.strerror}") from None


def _same_source(one: str, other: str) -> bool:
    """Whether two names are of one source: equal, or of the same folder."""
    if one == other or "stdlib" in (one, other):
        return one == other
    return Path(one).is_dir() and Path(one).resolve() == Path(other).resolve()
