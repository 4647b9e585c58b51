"""Damaged files of a checkpoint and of a corpus: each is found and named, for any byte of any file."""

import random
import re
import shutil

import pytest
from training_runs import release, start, wait_for

from phi1.train.checkpoint.files import checkpoints, find_damage
from phi1.train.commands.verify import verify
from phi1.train.runtime.launch import RunError

FLIPS = 40


def damages(path):
    """Return the lines that `phi1 verify` has about damage."""
    return [damage for _, damage in verify(path) if damage]


@pytest.fixture
def checkpoint(place, uninterrupted, tmp_path):
    """A copy of the newest checkpoint of a real run."""
    return shutil.copytree(place / "whole" / "checkpoints" / "step-60", tmp_path / "step-60")


@pytest.fixture
def corpus(place, tmp_path):
    return shutil.copytree(place / "data", tmp_path / "data")


def test_a_byte_flipped_during_a_run_is_named_by_the_step_that_reads_it(place):
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
    assert process.returncode == 2, out
    assert re.search(r"error: rank 0 could not read its data of step 4\d: flipped/train-00000.bin: damaged: block 0 "
                     r"\(tokens 0 to [\d,]+\) is not as it was written; ", err)
    last = checkpoints(place / "unaware" / "checkpoints")[-1]
    assert err.rstrip().endswith(f"; saved: unaware/checkpoints/{last.name}")
    assert last.name in ("step-40", "step-41")
    assert find_damage(last) is None


@pytest.mark.parametrize(("kind", "shard", "extra"), [("checkpoint", "__0_0.distcp", "__0_1.distcp"),
                                                      ("corpus", "train-00000.bin", "train-00001.bin")])
def test_every_kind_of_damage_to_every_file_is_found(kind, shard, extra, request):
    """The damage: 40 flipped bits at random places, one byte less or more, an empty, a missing or an extra file."""
    folder = request.getfixturevalue(kind)
    assert not damages(folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    assert len(files) >= 4
    draw = random.Random(7)
    for path in files:
        whole = path.read_bytes()
        flipped = [bytearray(whole) for _ in range(min(FLIPS, len(whole)))]
        for content, at in zip(flipped, draw.sample(range(len(whole)), len(flipped)), strict=True):
            content[at] ^= 1 << draw.randrange(8)
        for number, wrong in enumerate((*flipped, whole[:-1], whole + b"\n", b"", None)):
            path.unlink(missing_ok=True)
            if wrong is not None:
                path.write_bytes(wrong)
            elif path == folder / "manifest.json" and kind == "corpus":  # then it is no corpus
                with pytest.raises(RunError, match="nor a corpus"):
                    damages(folder)
                continue
            assert path.name in "".join(damages(folder)), (path.name, number)
        path.write_bytes(whole)
    assert not damages(folder)
    (folder / extra).write_bytes((folder / shard).read_bytes())
    (line,) = damages(folder)
    assert extra in line
