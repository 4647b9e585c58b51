"""`--prove-resume K`: run the last K steps of a run again, and compare every bit with the records of the run.

The replay begins at a checkpoint that is at least K steps older than the newest. Each step is compared with its line in
the ledger, and in the end parameters, optimizer and counters with the newest checkpoint. Nothing is written but
not-proven.txt: with --max-restarts torchrun restarts a replay that has failed, and the restart prints that file instead
of running all steps again.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from phi1.train.checkpoint.checkpoint import load_checkpoint, state_hash
from phi1.train.checkpoint.files import step_of
from phi1.train.metrics.ledger import as_line, read_ledger
from phi1.train.recipe.recipe import Recipe
from phi1.train.run.build import make_trainer
from phi1.train.run.corpus import open_on_all_ranks
from phi1.train.run.folder import RunFolder
from phi1.train.run.ranks import meet
from phi1.train.run.resume import check_bitwise
from phi1.train.run.start import Start
from phi1.train.runtime.all_ranks import all_ranks
from phi1.train.runtime.launch import Rank, say
from phi1.train.runtime.watchdog import Watchdog
from phi1.train.step.trainer import Trainer

if TYPE_CHECKING:
    from torch.distributed import Store


def replay(recipe: Recipe, folder: RunFolder, rank: Rank, store: Store, start: Start) -> int:
    """Run the steps between two checkpoints again, and let rank 0 print the verdict. Returns 0 if all bits agree, or 1.

    The arguments are those of `run`.
    """
    first, newest = (folder.checkpoints / name for name in start.checkpoints)
    with Watchdog(rank.rank, recipe.run.watchdog) as watchdog:
        engine, environment = meet(recipe, rank, store)
        folder.check_shared(rank.rank)
        corpus, _, _ = open_on_all_ranks(recipe, start.fingerprint, rank)
        trainer, stored = make_trainer(recipe, engine, corpus, rank, first)
        check_bitwise(first, stored, environment)
        wrong = _compare(trainer, newest, read_ledger(folder.ledger), watchdog)
        # On all ranks together, since torchrun stops the others, rank 0 too, when one ends with an error.
        all_ranks(lambda: _say(wrong, folder, first, newest) if rank.rank == 0 else None)
    dist.destroy_process_group()
    return 1 if wrong else 0


def _say(wrong: str, folder: RunFolder, first: Path, newest: Path) -> None:
    span = f"steps {step_of(first) + 1:,} to {step_of(newest):,} of {folder.path}"
    verdict = f"not proven: {span}: {wrong}" if wrong else (
        f"proven: {span}, run again from {first.name}, gave the ledger's loss, norm, scale and samples and "
        f"{newest.name}'s weights and optimizer, bit for bit")
    say(verdict)
    if wrong:
        with contextlib.suppress(OSError):  # on a full disk a restart runs the steps again
            folder.not_proven.write_text(verdict, encoding="utf-8")


def _compare(trainer: Trainer, newest: Path, ledger: list[dict[str, Any]], watchdog: Watchdog) -> str:
    """Collective: run the steps again and describe the first difference; "" if there is none."""
    recorded = {line["step"]: line for line in ledger if "step" in line}
    while trainer.finished < step_of(newest):
        watchdog.report(f"step {trainer.finished + 1}, again")
        again = as_line(trainer.run_step())
        before = recorded.get(trainer.finished, {})
        for key, value in again.items():
            if key not in before or before[key] != value:
                return f"{key} of step {trainer.finished} was {before.get(key, 'not recorded')}, is {value}"
    watchdog.report("the comparison of the states")
    again_hash = state_hash(trainer)
    load_checkpoint(trainer, newest)
    hash_before = state_hash(trainer)
    if again_hash != hash_before:
        return f"the losses agree, but the state's hash was {hash_before[:16]}, is {again_hash[:16]}"
    return ""
