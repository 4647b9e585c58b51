"""The next step's batch: read while this one runs, the same as without, and one line where it cannot be read."""

import threading

import numpy as np
import pytest
import torch
import torch.distributed as dist

from phi1.config import preset
from phi1.train.batches import Layout, micro_batches, samples_of_step
from phi1.train.data import Corpus, open_corpus
from phi1.train.engine import build_model, connect_processes, start
from phi1.train.launch import RunError
from phi1.train.prefetch import Batch, Prefetch
from phi1.train.recipe import Train
from phi1.train.step import Trainer
from phi1.train.testing import in_processes

TINY = preset("nano", vocab_size=512, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1,
              max_position_embeddings=64)


def test_it_reads_one_step_ahead_in_another_thread_and_no_further():
    read, allowed = [], threading.Event()

    def reader(step):
        if step > 3:
            allowed.wait(30)
        read.append((step, threading.current_thread().name))
        return step

    ahead = Prefetch(reader, torch.device("cpu"))
    assert ahead.take(3) == 3  # step 4 is being read, and nobody waits for it
    assert [step for step, _ in read] == [3]
    allowed.set()
    assert ahead.take(4) == 4
    assert ahead.take(9) == 9  # as after a checkpoint was loaded
    assert [step for step, _ in read[:4]] == [3, 4, 5, 9]
    assert all(name.startswith("prefetch") for _, name in read)


def test_what_it_reads_is_the_steps_batch(place):
    corpus, layout = open_corpus(place / "data", verify=False), Layout.of(8, 2, 1, 2)
    samples = samples_of_step(5, 8, 1, corpus.n_samples(32))
    batch = Batch.read(corpus, samples, layout, 32, torch.device("cpu"))
    expected = list(micro_batches(corpus, samples, layout, 32))
    assert len(batch.micro_batches) == len(expected) == 2
    for (ids, rows), (ids_expected, rows_expected) in zip(batch.micro_batches, expected, strict=True):
        assert np.array_equal(ids, ids_expected)
        assert np.array_equal(rows, rows_expected)
    assert batch.n_targets == 4 * 32


def losses_before_and_after_another_batch(rank, store, data):
    engine = start(rank, "cpu", "fp32", 1)
    connect_processes(engine, rank, store)
    corpus, found = open_corpus(data, verify=False), []
    for first in (2, 4):
        trainer = Trainer(build_model(TINY, engine, 1), Train(batch_size=first, lr=1e-9), 32, corpus,
                          Layout.of(first, 0, 0, 1), engine)
        trainer.run_step()
        trainer.set_batch(4, 2)
        found.append(trainer.run_step())
    dist.destroy_process_group()
    return found


def test_what_was_read_ahead_is_given_up_for_another_batch(place, tmp_path):
    [[changed, steady]] = in_processes(1, losses_before_and_after_another_batch, tmp_path, place / "data")
    assert changed.samples == steady.samples
    assert changed.loss == pytest.approx(steady.loss, rel=1e-6)


class Unreadable(Corpus):
    """A corpus whose disk fails after some reads."""

    def rows(self, indices, seq_len):
        self.reads.append(len(indices))
        if len(self.reads) > 2:
            raise OSError(5, "Input/output error", "train-00000.bin")
        return super().rows(indices, seq_len)


def third_step_with_a_broken_disk(rank, store, data):
    engine = start(rank, "cpu", "fp32", 1)
    connect_processes(engine, rank, store)
    corpus = open_corpus(data, verify=False)
    if rank.rank == 1:
        corpus = Unreadable(**vars(corpus))
        object.__setattr__(corpus, "reads", [])
    model, layout = build_model(TINY, engine, 1), Layout.of(4, 0, rank.rank, 2)
    trainer = Trainer(model, Train(batch_size=4), 32, corpus, layout, engine)
    trainer.run_step()
    trainer.run_step()
    with pytest.raises(RunError) as raised:
        trainer.run_step()
    dist.destroy_process_group()
    return str(raised.value)


def test_what_one_process_cannot_read_stops_all_in_the_step_that_needs_it(place, tmp_path):
    for line in in_processes(2, third_step_with_a_broken_disk, tmp_path, place / "data"):
        assert line == "data of step 3 could not be read: [Errno 5] Input/output error: 'train-00000.bin'"
