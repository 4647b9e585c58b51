"""The meeting of all processes of a run: they compare what must be equal before they form a group.

Processes that differ would build other groups, or wait in collectives of other sizes, until the watchdog ends them.
"""

from __future__ import annotations

import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phi1.train.data.shards import read_manifest
from phi1.train.recipe.recipe import Recipe
from phi1.train.run.resume import environment_of, start_engine
from phi1.train.runtime.engine import Engine, connect_processes
from phi1.train.runtime.environment import differences
from phi1.train.runtime.launch import Rank, RunError, exchange

if TYPE_CHECKING:
    from torch.distributed import Store

# Keys that name places, or the work of one machine. Folders are compared by their content.
_OF_A_MACHINE = {"data.folder", "data.source", "data.tokenizer", "data.workers", "eval.humaneval", "run.folder",
                 "run.device", "train.threads"}
_FREE = ("hardware", "threads", "replicas")  # the first two may differ, the last follows from the machines' processes


def meet(recipe: Recipe, rank: Rank, store: Store) -> tuple[Engine, dict[str, Any]]:
    """Collective: start this process's engine, compare it with the others', and form the process group.

    Returns:
        The engine, and the environment of the run with the hardware of every process.

    Raises:
        RunError: on every process, if they differ; one line names the processes and the differences.
    """
    engine = start_engine(recipe, rank)
    own = {"host": socket.gethostname(), "environment": environment_of(recipe, engine), "recipe": _compared(recipe),
           "per_machine": rank.local_world_size, "corpus": _fingerprint(recipe)}
    all_facts = exchange(store, rank, own)
    check_alike(all_facts, asked=recipe.run.shard_group > 0)
    connect_processes(engine, rank, store)
    first, *others = (facts["environment"] for facts in all_facts)
    different = [f"rank {number}: {other['hardware']}" for number, other in enumerate(others, 1)
                 if other["hardware"] != first["hardware"]]
    return engine, first | {"other hardware": "; ".join(different) or "none"}


def check_alike(all_facts: list[dict[str, Any]], asked: bool = False) -> None:
    """Raise RunError if processes differ in what must be equal; `asked`: the recipe sets run.shard_group."""
    first = all_facts[0]
    ranks_by_difference: dict[str, list[int]] = {}
    for number, facts in enumerate(all_facts):
        for what in _differences(first, facts, asked):
            ranks_by_difference.setdefault(what, []).append(number)
    if ranks_by_difference:
        told = "; ".join(f"{_ranks(numbers, all_facts)}: {what}" for what, numbers in ranks_by_difference.items())
        raise RunError(f"the processes differ: {told}")


def _differences(first: dict[str, Any], facts: dict[str, Any], asked: bool) -> list[str]:
    found = []
    if facts["per_machine"] != first["per_machine"] and not asked:
        found.append(f"{facts['per_machine']} processes on the machine, rank 0's has {first['per_machine']} (start as "
                     "many on every machine, or give --run.shard_group the number that shares a copy of the model)")
    before, now = ({key: value for key, value in side["environment"].items() if key not in _FREE}
                   for side in (first, facts))
    both = differences(before, now) | differences(first["recipe"], facts["recipe"])
    found += [f"{key} is {theirs}, rank 0's is {its}" for key, (its, theirs) in both.items()]
    if facts["corpus"] != first["corpus"] and facts["corpus"]:
        found.append(f"the corpus in data.folder has the fingerprint {facts['corpus'][:12]}, rank 0's "
                     f"{first['corpus'][:12]}")
    return found


def _ranks(numbers: list[int], all_facts: list[dict[str, Any]]) -> str:
    hosts = sorted({all_facts[number]["host"] for number in numbers})
    return f"rank{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))} on {', '.join(hosts)}"


def _compared(recipe: Recipe) -> dict[str, Any]:
    return {key: value for section, content in recipe.as_dict().items() for leaf, value in content.items()
            if (key := f"{section}.{leaf}") not in _OF_A_MACHINE}


def _fingerprint(recipe: Recipe) -> str:
    """Return the fingerprint of this machine's corpus, or "" if it cannot be read, which is told when it is opened."""
    try:
        return str(read_manifest(Path(recipe.data.folder))["fingerprint"])
    except (OSError, ValueError, KeyError):
        return ""
