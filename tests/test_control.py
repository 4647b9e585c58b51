"""How processes agree to stop: the time limit, counted from the launch, and where in the data a run goes on."""

import os
import subprocess
import sys
import time

import pytest
import torch.distributed as dist
from torch.distributed import HashStore

from phi1.train.batches import Layout, micro_batches, samples_of_step
from phi1.train.control import Control, _age
from phi1.train.data import Corpus
from phi1.train.launch import Place
from phi1.train.recipe_file import read_recipe
from phi1.train.shards import Shard, ShardHeader
from phi1.train.testing import SCRIPT, start, steps, train, weights


@pytest.fixture
def alone():
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_the_time_limit_counts_from_the_launch(alone):
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    time.sleep(0.3)
    assert 0.2 < _age(process.pid) < 60
    process.communicate(b"\n")
    assert _age(process.pid) == 0.0  # gone, so that the system does not say
    minutes = _age(os.getpid()) / 60
    assert not Control(Place()).agreed_to_stop()
    assert not Control(Place(), minutes + 1).agreed_to_stop()
    over = Control(Place(), minutes / 2)
    assert over.agreed_to_stop()
    assert over.signal_name == "run.time_limit"


def test_a_run_at_its_time_limit_saves_and_the_same_command_goes_on(place, undisturbed):
    process = start(place, "limited", run__time_limit=0.0001)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "stopped by run.time_limit after step 0 of 60, which is saved in limited/checkpoints/step-0; go on" in out
    train(place, "limited")
    assert steps(place, "limited") == steps(place, "whole")
    assert weights(place, "limited") == weights(place, "whole")


def test_the_data_are_positioned_at_any_step_within_a_second(tmp_path):
    recipe = read_recipe(SCRIPT.parent / "configs" / "phi1-base.toml", {})
    seq_len, batch, n_tokens = recipe.data.seq_len, recipe.train.batch_size, 7_000_000_000
    header = ShardHeader(ShardHeader.size(n_tokens, 1 << 30), n_tokens, "0" * 64, 1 << 30, (0,) * 7)
    (tmp_path / "shard").write_bytes(header.pack())
    os.truncate(tmp_path / "shard", header.header_bytes + 2 * n_tokens)  # 14 GB that take no room
    corpus = Corpus(tmp_path, "train", "", n_tokens, 0, 51200, 50256, (Shard(tmp_path / "shard", "0" * 64),))
    layout = Layout.of(batch, 16, 3, 8)
    began = time.process_time()  # of this process: what else the machine does has no part in it
    samples = samples_of_step(24_000, batch, 1, corpus.n_samples(seq_len))
    _, rows = next(micro_batches(corpus, samples, layout, seq_len))
    assert time.process_time() - began < 1
    assert rows.shape == (16, seq_len + 1)
    assert len(set(samples.tolist())) == batch
