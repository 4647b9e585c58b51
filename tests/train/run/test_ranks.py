"""The meeting of processes that differ: one line on all of them, before any waits for another."""

import copy
import re
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from training_runs import in_processes

from phi1.train.recipe.file import read_recipe
from phi1.train.run import ranks
from phi1.train.run.ranks import check_alike, meet
from phi1.train.runtime.launch import Rank, RunError


def met(rank, store, per_machine, changes, version):
    """Return the number of replicas of the engine on which the processes agree, or the line of the refusal."""
    own = {"run.device": "cpu", "train.precision": "fp32", "train.batch_size": "12"}
    own |= changes.get("all", changes.get(rank.rank, {}))
    if version and rank.rank == 1:
        torch.__version__ = version
    try:
        engine, _ = meet(read_recipe(None, own), replace(rank, local_world_size=per_machine[rank.rank]), store)
        dist.destroy_process_group()
        return engine.replicas
    except RunError as error:
        return str(error)


@pytest.mark.parametrize(("per_machine", "changes", "version", "told"), [
    ((2, 2, 1, 1), {}, "", r"ranks 2, 3 on \S+: 1 processes on the machine, rank 0's has 2 \(start as many on every "
                           r"machine, or give --run.shard_group the number that shares a copy of the model\)$"),
    ((2, 2, 4, 4, 4, 4), {}, "", r"ranks 2, 3, 4, 5 on \S+: 4 processes on the machine, rank 0's has 2 "),
    ((2, 2, 1, 1), {"all": {"run.shard_group": "2"}}, "", 2),
    ((2, 2), {1: {"train.steps": "50"}}, "", r"rank 1 on \S+: train\.steps is 50, rank 0's is 1250$"),
    ((2, 2), {}, "2.99", r"rank 1 on \S+: torch is 2\.99, rank 0's is 2\.[\d.+cpu]+$"),
], ids=["2 + 1 + 1", "2 + 4", "the remedy", "recipe", "torch"])
def test_processes_that_differ_are_named_by_all_of_them(tmp_path, per_machine, changes, version, told):
    count = len(per_machine)
    first, *others = in_processes(count, met, tmp_path, per_machine, changes, version)
    assert others == [first] * (count - 1)
    assert first == told if told == 2 else re.match(f"the processes differ: {told}", first), first


def test_another_corpus_precision_or_variable_is_named(tmp_path, monkeypatch):
    facts = {"host": "a", "environment": {"precision": "bf16", "variables": {}, "hardware": "x", "threads": 1},
             "recipe": {"train.lr": 0.1}, "per_machine": 1, "corpus": "f" * 64}
    other = copy.deepcopy(facts)
    other |= {"host": "b", "corpus": "e" * 64}
    other["environment"] |= {"precision": "fp32", "variables": {"NCCL_ALGO": "Ring"}, "hardware": "y", "threads": 2}
    check_alike([facts, facts])
    with pytest.raises(RunError) as error:
        check_alike([facts, facts, other])
    assert str(error.value) == (
        "the processes differ: rank 2 on b: precision is fp32, rank 0's is bf16; rank 2 on b: NCCL_ALGO is Ring, "
        "rank 0's is unset; rank 2 on b: the corpus in data.folder has the fingerprint eeeeeeeeeeee, rank 0's "
        "ffffffffffff")


def test_the_hardware_of_every_process_is_part_of_the_environment(tmp_path, monkeypatch):
    def exchanged(store, rank, facts):
        other = copy.deepcopy(facts)
        other["environment"]["hardware"] = "another card"
        return [facts, other, facts]

    monkeypatch.setattr(ranks, "exchange", exchanged)
    monkeypatch.setattr(ranks, "connect_processes", lambda *_: None)
    recipe = read_recipe(None, {"run.device": "cpu", "train.batch_size": "3", "train.threads": "1"})
    threads = torch.get_num_threads()
    _, environment = meet(recipe, Rank(0, 3, 0, 3), None)
    torch.set_num_threads(threads)
    assert environment["other hardware"] == "rank 1: another card"
