"""Prefetching: the next batch is read during a step, is the same as without, and a failure is one line."""

import errno
import os
import re
import threading

import numpy as np
import pytest
import torch
import torch.distributed as dist
from training_runs import in_processes

from phi1.config import preset
from phi1.train.data.batch_plan import BatchPlan, micro_batches, samples_of_step
from phi1.train.data.corpus import open_corpus
from phi1.train.data.prefetch import Batch, Prefetch
from phi1.train.evaluate.validation import HeldOut
from phi1.train.recipe.recipe import Train
from phi1.train.runtime.engine import build_model, connect_processes, start
from phi1.train.runtime.launch import RunError
from phi1.train.step.trainer import Trainer

TINY = preset("nano", vocab_size=512, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1,
              max_position_embeddings=64)


def test_it_reads_one_step_ahead_in_another_thread_and_no_further():
    read, allowed = [], threading.Event()

    def reader(step):
        if step > 3:
            allowed.wait(300)
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
    corpus, batch_plan = open_corpus(place / "data", verify=False), BatchPlan.of(8, 2, 1, 2)
    samples = samples_of_step(5, 8, 1, corpus.n_samples(32))
    batch = Batch.read(corpus, samples, batch_plan, 32, torch.device("cpu"))
    expected = list(micro_batches(corpus, samples, batch_plan, 32))
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
                          BatchPlan.of(first, 0, 0, 1), engine)
        trainer.run_step()
        trainer.set_batch(4, 2)
        found.append(trainer.run_step())
    dist.destroy_process_group()
    return found


def test_what_was_read_ahead_is_given_up_for_another_batch(place, tmp_path):
    [[changed, steady]] = in_processes(1, losses_before_and_after_another_batch, tmp_path, place / "data")
    assert changed.samples == steady.samples
    assert changed.loss == pytest.approx(steady.loss, rel=1e-6)


def third_step_with_a_broken_disk(rank, store, data):
    engine, reads, preadv = start(rank, "cpu", "fp32", 1), [], os.preadv

    def breaking(file, *where):
        reads.append(file)
        if rank.rank == 1 and len(reads) > 5:  # a block, and two rows a step
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(file, *where)

    os.preadv = breaking  # in this process, which ends with the test
    connect_processes(engine, rank, store)
    corpus, validation = (open_corpus(data, split, verify=False) for split in ("train", "val"))
    model, batch_plan = build_model(TINY, engine, 1), BatchPlan.of(4, 0, rank.rank, 2)
    trainer = Trainer(model, Train(batch_size=4), 32, corpus, batch_plan, engine)
    trainer.run_step()
    trainer.run_step()
    with pytest.raises(RunError) as in_a_step:
        trainer.run_step()
    with pytest.raises(RunError) as held_out:
        HeldOut(validation, corpus.load_tokenizer(), 32, 8)
    dist.destroy_process_group()
    return str(in_a_step.value), str(held_out.value)


def test_what_one_process_cannot_read_stops_all_in_the_step_that_needs_it(place, tmp_path):
    data = place / "data"
    for in_a_step, held_out in in_processes(2, third_step_with_a_broken_disk, tmp_path, data):
        assert re.fullmatch(f"rank 1 could not read its data of step 3: {data}/train-00000.bin: cannot be read at byte "
                            rf"[\d,]+: Input/output error; phi1 verify {data} says more", in_a_step)
        assert held_out == f"{data}/val-00000.bin: cannot be read at byte 4,096: Input/output error"
