"""Pretrain a phi-1: `torchrun --standalone train/pretrain.py [--config FILE.toml] [--section.key value ...]`.

Without arguments it trains `nano` on the standard library of this Python: data, tokenizer, model, evaluation,
checkpoint and a Hugging Face export in runs/nano. `python train/pretrain.py` is the same in one process. The same
command goes on with a run that was stopped.
"""

from __future__ import annotations

import shlex
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from phi1.train.checkpoint.files import checkpoints
from phi1.train.runtime.launch import (
    Rank,
    RunError,
    announce,
    connect,
    leave,
    limit_spinning,
    on_signals,
    say,
    stop_with,
)

if TYPE_CHECKING:  # what takes long to import is imported by main, where Ctrl-C finds somebody to catch it
    from phi1.train.recipe.recipe import Recipe
    from phi1.train.run.folder import RunFolder

SHORT = {"prove-resume": "run.prove_resume", "profile": "run.profile"}


def parse(arguments: list[str], file: Path | None = None) -> Recipe | None:
    """The recipe that the command line asks for, by default the one in `file`; None if it asks for help.

    Raises:
        RunError: not understood.
    """
    from phi1.train.recipe.file import read_recipe, unknown
    from phi1.train.recipe.recipe import KEYS

    overrides: dict[str, str] = {}
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if word in ("-h", "--help"):
            return None
        if not word.startswith("--"):
            raise RunError(f"{word!r} is not understood: give --config FILE.toml or --section.key value")
        key, equals, value = ("--run.bitwise=true" if word == "--bitwise" else word)[2:].partition("=")
        if not equals:
            if not rest:
                raise RunError(f"{word} needs a value" if SHORT.get(key, key) in (*KEYS, "config") else unknown(key))
            value = rest.pop(0)
        if key == "config":
            file = Path(value)
        else:
            overrides[SHORT.get(key, key)] = value
    return read_recipe(file, overrides)


def main(file: Path | None = None, purpose: str | None = __doc__) -> int:  # type: ignore[return]  # see stop_with
    """Run the command line. `file` is the recipe without --config, the nano run's if None; `purpose` heads --help."""
    limit_spinning()
    rank, program = Rank(), Path(sys.argv[0]).stem
    folder: RunFolder | None = None
    try:
        rank = Rank.from_environment()
        recipe = parse(sys.argv[1:], file)

        from phi1.train.recipe.file import show_help
        from phi1.train.run.folder import RunFolder
        from phi1.train.run.preflight import check_recipe

        if recipe is None:
            if rank.rank == 0:
                show_help(purpose, file)
            return 0
        check_recipe(recipe, rank)
        folder = RunFolder(recipe.run.folder)
        try:
            return start_or_resume(recipe, folder, rank)
        finally:
            folder.discard_if_new()
    except RunError as error:
        stop_with(str(error), rank, program, alike=folder is None)
    except KeyboardInterrupt:
        on_signals(signal.SIG_IGN)  # Ctrl-C comes twice under torchrun: from the terminal and from it
        if rank.rank == 0:
            resumes = folder and checkpoints(folder.checkpoints) and recipe and not recipe.run.prove_resume
            then = "goes on from the newest checkpoint" if resumes else "begins anew"
            say(f"{program}: interrupted; the same command {then}", sys.stderr)
        return 130
    except RuntimeError:
        if not rank.is_orphan():
            raise
        stop_with("torchrun has ended; the same command goes on, or begins anew", rank, program)
    except BrokenPipeError:  # the reader of our output has gone away
        return 141


def start_or_resume(recipe: Recipe, folder: RunFolder, rank: Rank) -> int:
    """Rank 0 admits the run and prepares its data, and then all processes run it."""
    from phi1.train.run.preflight import COMPLETE, admit, admit_proof

    word = ""
    if rank.rank == 0:
        # Stopped here, the preparation clears up after itself; later on StopSignals listens.
        on_signals(signal.default_int_handler)
        word = (admit_proof if recipe.run.prove_resume else admit)(recipe, folder, rank)
        if rank.world_size == 1 and word == COMPLETE:
            return 0
    store = connect(rank)
    word = announce(store, rank, word)
    if word == COMPLETE:
        return 0

    fingerprint, *names = word.split()
    chosen = [folder.checkpoints / name for name in names]
    if recipe.run.prove_resume:
        from phi1.train.run.replay import prove

        return prove(recipe, folder, rank, store, fingerprint, *chosen)

    from phi1.train.run.run import run  # only now, since it imports torch

    stopped = run(recipe, folder, rank, store, fingerprint, *chosen)
    if stopped and rank.rank == 0:
        say(f"{stopped}; go on with: {rank.command(f'--config {shlex.quote(str(folder.config))}')}")
    return 0


if __name__ == "__main__":
    leave(main())
