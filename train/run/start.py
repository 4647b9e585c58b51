"""The start of a run: rank 0 decides what it starts from and prepares its data, and announces that to all ranks."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, replace

from phi1.train.checkpoint.files import Notes, checkpoints, choose, remove_after, step_of
from phi1.train.metrics.ledger import read_ledger
from phi1.train.recipe.recipe import Recipe
from phi1.train.run.corpus import open_data, prepare_data
from phi1.train.run.folder import RunFolder
from phi1.train.run.preflight import check_init, check_untrained
from phi1.train.run.report import show_complete
from phi1.train.run.resume import check_bitwise, check_continues, check_data, environment_of, start_engine
from phi1.train.runtime.launch import Rank, RunError, say


@dataclass(frozen=True)
class Start:
    """What a run starts from."""

    fingerprint: str = ""
    """The corpus's."""
    checkpoints: tuple[str, ...] = ()
    """Their names: the one to resume from, if any; for a replay the first and the last one."""
    complete: bool = False
    """Nothing is left to do."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Start:
        found = json.loads(text)
        return cls(found["fingerprint"], tuple(found["checkpoints"]), found["complete"])


def start_run(recipe: Recipe, folder: RunFolder, rank: Rank) -> Start:
    """Rank 0: take the run's folder, choose the checkpoint to resume from, and prepare the data.

    A run that is complete is shown, and nothing of it is changed.

    Raises:
        RunError: the run cannot start.
    """
    folder.lock()
    launch = os.environ.get("TORCHELASTIC_RUN_ID", "")
    checkpoint = choose(folder.checkpoints, _asked_for(recipe.checkpoint.resume, folder, rank, launch))
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
            return Start(complete=True)
    environment = environment_of(recipe, start_engine(recipe, rank))
    if checkpoint and stored and recipe.run.bitwise:
        check_bitwise(checkpoint, stored, environment)
    prepare_data(recipe)
    train, _, _ = open_data(recipe)
    if checkpoint and stored:
        check_data(checkpoint, stored, train)
    for name in remove_after(folder.checkpoints, checkpoint):
        say(f"removed {folder.checkpoints / name}, which lies after {checkpoint and checkpoint.name}")
    _store(recipe, folder, launch)
    return Start(train.fingerprint, (checkpoint.name,) if checkpoint else ())


def _asked_for(resume: str, folder: RunFolder, rank: Rank, launch: str) -> str:
    """What to resume from. A launch goes back to an older checkpoint once; its restarts resume from the newest one."""
    if not rank.attempt:
        folder.went_back.unlink(missing_ok=True)  # of an earlier launch: without --standalone all have one name
    elif resume != "auto" and folder.has_gone_back(launch):
        say(f"note: torchrun has restarted the run, which goes on from its newest checkpoint; {resume} was where it "
            "began")
        return "auto"
    return resume


def _store(recipe: Recipe, folder: RunFolder, launch: str) -> None:
    """Write config.toml. Resuming from an older checkpoint is meant once: not that is stored, but the launch."""
    goes_back = recipe.checkpoint.resume != "auto"
    lasting = replace(recipe, checkpoint=replace(recipe.checkpoint, resume="auto"))
    folder.store(lasting.to_toml(), launch if goes_back else None)


def start_replay(recipe: Recipe, folder: RunFolder, rank: Rank) -> Start:
    """Rank 0: choose the checkpoints between which the last `run.prove_resume` steps are run again.

    Raises:
        RunError: they cannot be, or torchrun has restarted a replay that had come to its end.
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
    return Start(train.fingerprint, (before[-1].name, found[-1].name))
