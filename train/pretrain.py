"""Pretrain a phi-1: `torchrun --standalone train/pretrain.py [--config FILE.toml] [--section.key value ...]`.

Without arguments it trains `nano` on the standard library of this Python: data, tokenizer, model, evaluation,
checkpoint and a Hugging Face export in runs/nano. `python train/pretrain.py` is the same in one process. The same
command resumes a run that was stopped. Exit codes: 0 complete, 75 saved and the same command goes on, 2 a mistake to
mend, 1 a mistake of ours, 130 interrupted with nothing saved, 141 the reader of the output is gone.
"""

from __future__ import annotations

import shlex
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from phi1.train.checkpoint.files import checkpoints
from phi1.train.runtime.launch import (
    GO_ON,
    INTERRUPTED,
    Rank,
    RunError,
    announce,
    connect,
    leave,
    limit_spinning,
    on_signals,
    say,
    stop_with,
    time_left,
    write_root_cause,
)

if TYPE_CHECKING:  # main imports the slow modules, where it can catch Ctrl-C
    from phi1.train.recipe.recipe import Recipe
    from phi1.train.run.folder import RunFolder


def main(file: Path | None = None, purpose: str | None = __doc__) -> int:  # type: ignore[return]  # see stop_with
    """Run the command line. `file` is the recipe without --config, the nano run's if None; `purpose` heads --help."""
    limit_spinning()
    rank, program = Rank(), Path(sys.argv[0]).stem
    folder: RunFolder | None = None
    try:
        rank = Rank.from_environment()
        from phi1.train.recipe.command_line import parse

        recipe = parse(sys.argv[1:], file)

        from phi1.train.recipe.file import show_help
        from phi1.train.run.folder import RunFolder
        from phi1.train.run.preflight import check_recipe

        if recipe is None:
            if rank.rank == 0:
                show_help(purpose, file)
            return 0
        if rank.attempt and time_left(rank, recipe.run.time_limit) < 0:  # torchrun restarts what exits with GO_ON
            leave(GO_ON)
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
        resumes = folder and checkpoints(folder.checkpoints) and recipe and not recipe.run.prove_resume
        if rank.rank == 0:
            then = "goes on from the newest checkpoint" if resumes else "begins anew"
            say(f"{program}: interrupted; the same command {then}", sys.stderr)
        return GO_ON if resumes else INTERRUPTED
    except RuntimeError:
        if not rank.is_orphan():
            raise
        stop_with("torchrun has ended; the same command goes on, or begins anew", rank, program, code=GO_ON)
    except BrokenPipeError:  # the reader of our output has gone away
        return 141


def start_or_resume(recipe: Recipe, folder: RunFolder, rank: Rank) -> int:
    """Rank 0 decides what the run starts from and prepares its data, and then all processes run it."""
    from phi1.train.run.start import Start, start_replay, start_run

    replays, start = recipe.run.prove_resume > 0, Start()
    if rank.rank == 0:
        # A stop during the preparation raises KeyboardInterrupt, so that it cleans up; later StopSignals takes over.
        on_signals(signal.default_int_handler)
        start = (start_replay if replays else start_run)(recipe, folder, rank)
        if rank.world_size == 1 and start.complete:
            return 0
    store = connect(rank)
    start = Start.from_json(announce(store, rank, start.to_json()))
    if start.complete:
        return 0

    if replays:
        from phi1.train.run.replay import replay

        return replay(recipe, folder, rank, store, start)

    from phi1.train.run.run import run  # only now, since it imports torch

    stopped = run(recipe, folder, rank, store, start)
    if not stopped:
        return 0
    line = f"{stopped}; go on with: {rank.command(f'--config {shlex.quote(str(folder.config))}')}"
    if rank.rank == 0:
        say(line)
    write_root_cause(line)
    return GO_ON


if __name__ == "__main__":
    leave(main())
