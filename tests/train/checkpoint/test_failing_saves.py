"""Saves that fail in the thread of one process, before or after any of their collectives."""

import time
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch.distributed as dist
import torch.distributed.checkpoint.utils as dcp_utils
from training_runs import SMALL, in_processes, make_trainer, save_checkpoint

from phi1.train.checkpoint import checkpoint as checkpoint_module
from phi1.train.checkpoint.checkpoint import Saver
from phi1.train.checkpoint.files import checkpoints, find_damage
from phi1.train.data.batch_plan import BatchPlan
from phi1.train.data.corpus import open_corpus
from phi1.train.recipe.recipe import Train
from phi1.train.runtime.engine import build_model, connect_processes, start
from phi1.train.runtime.launch import RunError
from phi1.train.step.trainer import Trainer

COLLECTIVES = ("gather_object", "scatter_object", "gather_object", "broadcast_object")
"""The collectives of a save, in their order: of the plans, of their division, of what was written, of the end."""
SHORT, LONG = timedelta(seconds=0.3), timedelta(minutes=2)  # a busy machine may delay a save that is to succeed


def failing_saves(rank, store, data, folder):
    """Return the lines of the saves that failed; after each of them another one must be written."""
    engine = start(rank, "cpu", "fp32", 1)
    connect_processes(engine, rank, store)
    trainer = Trainer(build_model(SMALL, engine, seed=1), Train(batch_size=4), 32, open_corpus(data, verify=False),
                      BatchPlan.of(4, 2, rank.rank, 2), engine)
    saver, lines = Saver(folder, keep=2), []
    for when in ("before", "after"):
        for at, error in enumerate((MemoryError(), SystemExit(3), OSError(5, "Input/output error"), MemoryError())):
            trainer.run_step()
            saver._patience = SHORT
            saver._group = saver._new_group()
            saver._patience = LONG
            calls = iter(range(9))

            def failing(own, given, of, when=when, at=at, error=error, calls=calls):
                number, fails = next(calls), rank.rank == at % 2
                if fails and number == at and when == "before":
                    raise error
                result = of(own, given)
                if fails and number == at:
                    raise error
                return result

            with pytest.MonkeyPatch.context() as patch:
                for name in set(COLLECTIVES):
                    of = getattr(dcp_utils._DistWrapper, name)
                    patch.setattr(dcp_utils._DistWrapper, name, lambda own, given, of=of: failing(own, given, of))
                saver.begin(trainer, {})
                began = time.monotonic()
                with pytest.raises(RunError) as failure:
                    saver.finish()
                lines.append(str(failure.value))
                assert time.monotonic() - began < 60
            trainer.run_step()
            saver.begin(trainer, {})
            assert find_damage(saver.finish().path) is None
    dist.destroy_process_group()
    return lines


def test_a_save_that_fails_on_one_process_costs_that_save_alone(small_corpus, tmp_path):
    folder = tmp_path / "checkpoints"
    one, other = in_processes(2, failing_saves, tmp_path, small_corpus.folder, folder)
    assert one == other
    reasons = ["MemoryError", "SystemExit 3", "Input/output error", "MemoryError"]
    for number, (line, reason) in enumerate(zip(one, 2 * reasons, strict=True)):
        assert line.startswith(f"checkpoint {folder}/step-{2 * number + 1} could not be written: "), line
        # Under load the other process may notice first that this one has given its group up.
        assert reason in line or "imed out" in line or "Connection closed" in line, line
    assert [path.name for path in checkpoints(folder)] == ["step-14", "step-16"]
    assert not list(folder.glob(".*"))


def test_a_disk_without_inodes_says_so(small_corpus, engines, tmp_path, monkeypatch):
    full = SimpleNamespace(f_files=16, f_favail=2, f_frsize=4096, f_blocks=9**9, f_bfree=9**9, f_bavail=9**9)
    monkeypatch.setattr(checkpoint_module.os, "statvfs", lambda path: full)
    with pytest.raises(RunError, match=r"step-0 could not be written: no inodes: it takes 5 files, the disk has room "
                                       r"for 2 \(df -i\); remove 3 files, or give another --run\.folder$"):
        save_checkpoint(make_trainer(small_corpus, engines), tmp_path, {}, keep=2)
