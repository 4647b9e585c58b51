"""Damaged files of a run and of its corpus: every one is found, whatever byte it is, and nothing is loaded."""

import random
import shutil

import pytest
from training_runs import release, start, wait_for

from phi1.train.checkpoint.files import find_damage
from phi1.train.commands.verify import verify

FLIPS = 40


def found(path):
    """Whether `phi1 verify` finds damage there."""
    return any(damage for _, damage in verify(path))


@pytest.fixture
def checkpoint(place, undisturbed, tmp_path):
    """The newest checkpoint of a real run, to be broken."""
    return shutil.copytree(place / "whole" / "checkpoints" / "step-60", tmp_path / "step-60")


@pytest.fixture
def corpus(place, tmp_path):
    return shutil.copytree(place / "data", tmp_path / "data")


def test_a_byte_that_is_flipped_under_a_run_is_named_when_it_ends(place):
    shutil.copytree(place / "data", place / "flipped")
    process = start(place, "unaware", data__folder="flipped", hold="step-40")
    wait_for(process, lambda: list((place / "unaware" / "checkpoints").glob(".step-40.*")))
    shard = place / "flipped" / "train-00000.bin"
    content = bytearray(shard.read_bytes())
    content[-100] ^= 1
    with shard.open("r+b") as file:  # the file that the run has open
        file.write(content)
    release(place, "unaware")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert ("warning: the corpus has changed since the run began, and may have been read like that: "
            "flipped/train-00000.bin: damaged: its content hash is wrong") in out
    assert (place / "unaware" / "export").is_dir()


@pytest.mark.parametrize("kind", ["checkpoint", "corpus"])
def test_one_flipped_byte_is_found_at_40_random_positions_of_each_kind_of_file(kind, request):
    folder = request.getfixturevalue(kind)
    assert not found(folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    assert len(files) >= 4
    where = random.Random(7)
    for path in files:
        whole = path.read_bytes()
        for at in where.sample(range(len(whole)), min(FLIPS, len(whole))):
            broken = bytearray(whole)
            broken[at] ^= 1 << where.randrange(8)
            path.write_bytes(broken)
            assert found(folder), (path.name, at)
        path.write_bytes(whole)
    assert not found(folder)


@pytest.mark.parametrize(("kind", "shard"), [("checkpoint", "__0_0.distcp"), ("corpus", "train-00000.bin")])
def test_a_shard_that_is_truncated_deleted_or_there_twice_is_found(kind, shard, request):
    folder = request.getfixturevalue(kind)
    path = folder / shard
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert found(folder)
    path.unlink()
    assert found(folder)
    path.write_bytes(whole)
    assert not found(folder)
    twice = folder / shard.replace("0.", "1.")
    twice.write_bytes(whole)
    assert found(folder)
    if kind == "checkpoint":
        assert find_damage(folder) == "__0_1.distcp is not one of its files"
