"""Checkpoints: the files of a save, errors of saving and loading, and a loaded trainer that equals the saved one."""

import json
import os
import re
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from training_runs import SMALL, in_processes, make_trainer, save_checkpoint, weights_of

from phi1 import Phi1
from phi1.train.checkpoint import checkpoint as checkpoint_module
from phi1.train.checkpoint.checkpoint import Saver, gather_weights, load_checkpoint
from phi1.train.checkpoint.files import checkpoints, choose, find_damage, prune, remove_after
from phi1.train.data.batch_plan import BatchPlan
from phi1.train.data.corpus import open_corpus
from phi1.train.evaluate.samples import whole_model
from phi1.train.recipe.recipe import Train
from phi1.train.runtime import engine as engine_module
from phi1.train.runtime.all_ranks import Failed
from phi1.train.runtime.engine import build_model, connect_processes, gather, start
from phi1.train.runtime.launch import RunError
from phi1.train.step.trainer import Trainer


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_loaded_trainer_continues_bit_for_bit(small_corpus, engines, precision, tmp_path):
    straight = make_trainer(small_corpus, engines, precision)
    outcomes = [straight.run_step() for _ in range(6)]

    first = make_trainer(small_corpus, engines, precision)
    assert [first.run_step() for _ in range(3)] == outcomes[:3]
    saved = save_checkpoint(first, tmp_path, {"note": "x"}, keep=2)
    second = make_trainer(small_corpus, engines, precision, seed=1)
    assert load_checkpoint(second, saved)["note"] == "x"
    assert [second.run_step() for _ in range(3)] == outcomes[3:]

    expected, got = weights_of(straight), weights_of(second)
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)


@pytest.fixture(scope="module")
def two_saved(small_corpus, engines, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    trainer = make_trainer(small_corpus, engines)
    for _ in range(3):
        trainer.run_step()
        save_checkpoint(trainer, folder, {}, keep=2)
    return folder


def test_the_newest_are_kept_and_the_newest_is_chosen(two_saved):
    assert [path.name for path in checkpoints(two_saved)] == ["step-2", "step-3"]
    assert choose(two_saved, "auto") == two_saved / "step-3"
    assert choose(two_saved, "step-2") == two_saved / "step-2"
    assert not list(two_saved.glob(".*"))
    assert sorted(os.listdir(two_saved / "step-3")) == [".metadata", "__0_0.distcp", "manifest.json", "trainer.json"]
    notes = json.loads((two_saved / "step-3" / "trainer.json").read_text())
    assert (notes["step"], notes["skipped"]) == (3, 0)


def test_a_damaged_or_missing_checkpoint_is_one_line_with_the_way_out(two_saved, tmp_path, monkeypatch):
    folder = tmp_path / "checkpoints"
    shutil.copytree(two_saved, folder)
    with pytest.raises(RunError, match=r"there is no step-9 in .*checkpoints; there: step-2, step-3"):
        choose(folder, "step-9")
    (folder / "step-3" / "__0_0.distcp").write_bytes(b"short")
    with pytest.raises(RunError, match=r"step-3 is damaged: __0_0\.distcp has 5 bytes where \d+ were written; go on "
                                       r"from the newest that is whole with --checkpoint\.resume auto"):
        choose(folder, "step-3")
    lines = []
    assert choose(folder, "auto", lines.append) == folder / "step-2"
    assert re.fullmatch(rf"warning: checkpoint {folder}/step-3 is damaged: __0_0\.distcp has 5 bytes where \d+ were "
                        r"written; it is now damaged-step-3, and the run goes on from step-2", *lines)
    assert (folder / "damaged-step-3" / "__0_0.distcp").read_bytes() == b"short"
    (folder / "damaged-step-3").rename(folder / "step-3")
    (folder / "damaged-step-3").touch()  # neither a file nor what cannot be renamed ends in a traceback
    assert choose(folder, "auto", lines.append) == folder / "step-2"
    (folder / "damaged-step-3").rename(folder / "step-3")
    with monkeypatch.context() as refusing:
        refusing.setattr(Path, "rename", lambda path, to: os.stat(tmp_path / "none"))
        with pytest.raises(RunError, match=r"step-3 is damaged, and cannot be renamed to damaged-step-3: No such file"):
            choose(folder, "auto")
    choose(folder, "auto", lines.append)
    assert remove_after(folder, folder / "step-2") == []
    (folder / "step-2" / "manifest.json").unlink()
    with pytest.raises(RunError) as error:
        choose(folder, "auto")
    assert str(error.value).endswith("step-2 is damaged: manifest.json is missing; there is no other: give another "
                                     f"--run.folder, or remove {folder} and {tmp_path / 'ledger.jsonl'} to start over")
    assert (folder / "step-2").is_dir()


def test_every_mth_checkpoint_outlives_the_newest(tmp_path):
    for step in range(1, 10):
        (tmp_path / f"step-{step}").mkdir()
    prune(tmp_path, keep=2, keep_every=4)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-4", "step-8", "step-9"]
    prune(tmp_path, keep=1)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-9"]


def test_an_unfinished_save_is_never_a_checkpoint(two_saved, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(two_saved, folder)
    (folder / "step-3").rename(folder / ".step-7.tmp")
    assert choose(folder, "auto") == folder / "step-2"
    remove_after(folder, folder / "step-2")
    assert [path.name for path in folder.iterdir()] == ["step-2"]


def test_a_disk_without_space_is_named_before_it_is_written(small_corpus, engines, two_saved, tmp_path, monkeypatch):
    trainer = make_trainer(small_corpus, engines)
    full = shutil.disk_usage(two_saved)._replace(free=1_000_000)
    monkeypatch.setattr(checkpoint_module.shutil, "disk_usage", lambda path: full)
    with pytest.raises(RunError, match=r"step-0 could not be written: no disk space: it takes \d\.\d MB, 1\.0 MB "
                                       r"are free; free \d\.\d MB more, or give another --run\.folder; earlier "
                                       r"checkpoints are intact$"):
        save_checkpoint(trainer, two_saved, {}, keep=2)
    with pytest.raises(RunError, match=r"another --run\.folder$"):  # no word of earlier ones: none are there
        save_checkpoint(trainer, tmp_path / "checkpoints", {}, keep=2)
    assert [path.name for path in sorted(two_saved.iterdir())] == ["step-2", "step-3"]


def test_a_run_folder_that_is_gone_is_named(tmp_path):
    lack = checkpoint_module._shortage(tmp_path / "gone" / "checkpoints", 1)
    assert lack == f"{tmp_path}/gone: No such file or directory"


def test_training_goes_on_while_a_slow_disk_writes(small_corpus, engines, tmp_path, monkeypatch):
    write, go_on = checkpoint_module.describe, threading.Event()
    monkeypatch.setattr(checkpoint_module, "describe", lambda path: go_on.wait(300) and write(path))
    trainer = make_trainer(small_corpus, engines)
    trainer.run_step()
    saver = Saver(tmp_path, keep=2)
    saver.begin(trainer, {})
    before = weights_of(trainer)
    outcomes = [trainer.run_step() for _ in range(3)]
    assert saver.in_flight
    assert saver.writes()
    assert checkpoints(tmp_path) == []
    go_on.set()
    saved = saver.finish()
    assert not saver.in_flight
    assert saved.step == 1
    assert 0 < saved.stall < saved.seconds
    loaded = make_trainer(small_corpus, engines, seed=1)
    load_checkpoint(loaded, saved.path)
    assert all(torch.equal(before[name], tensor) for name, tensor in weights_of(loaded).items())
    assert [loaded.run_step() for _ in range(3)] == outcomes


def test_a_worker_of_an_earlier_attempt_writes_into_no_later_save(small_corpus, engines, tmp_path, monkeypatch):
    """The worker was suspended in its save, and wakes in the middle of another save of the same step."""
    trainer, older = (make_trainer(small_corpus, engines, lr=lr) for lr in (1e-2, 1e-3))
    wakes, write, describe = threading.Event(), Saver._write, checkpoint_module.describe
    old, new = Saver(tmp_path, keep=2), Saver(tmp_path, keep=2)

    def write_late(saver, *args):
        assert saver is new or wakes.wait(300)
        return write(saver, *args)

    def wake_and_describe(path):
        if not wakes.is_set():
            wakes.set()
            old._flying.job.result(60)
        return describe(path)

    monkeypatch.setattr(Saver, "_write", write_late)
    monkeypatch.setattr(checkpoint_module, "describe", wake_and_describe)
    for saver, its in ((old, older), (new, trainer)):
        its.run_step()
        saver.begin(its, {})
    saved = new.finish().path
    assert find_damage(saved) is None
    loaded = make_trainer(small_corpus, engines, seed=1)
    load_checkpoint(loaded, saved)
    expected = weights_of(trainer)
    assert all(torch.equal(expected[name], tensor) for name, tensor in weights_of(loaded).items())
    assert not all(torch.equal(expected[name], tensor) for name, tensor in weights_of(older).items())


def test_a_save_that_fails_midway_leaves_no_trace(small_corpus, engines, two_saved, monkeypatch):
    trainer = make_trainer(small_corpus, engines)
    full = failing(OSError(28, "No space left on device"))
    monkeypatch.setattr("phi1.train.checkpoint.files.write_manifest", full)
    with pytest.raises(RunError, match="could not be written: No space left on device; earlier checkpoints are intact"):
        save_checkpoint(trainer, two_saved, {}, keep=2)
    assert [path.name for path in sorted(two_saved.iterdir())] == ["step-2", "step-3"]


def failing(error):
    """Return a function that raises the error."""
    def fail(*_, **__):
        raise error
    return fail


def two_processes(rank, store, data):
    """Return a trainer of which each of two processes holds one half."""
    engine = start(rank, "cpu", "fp32", 1)
    connect_processes(engine, rank, store)
    return Trainer(build_model(SMALL, engine, seed=1), Train(batch_size=4), 32, open_corpus(data, verify=False),
                   BatchPlan.of(4, 2, rank.rank, 2), engine)


def gathers_for_which_one_process_lacks_memory(rank, store, data):
    """Return the errors of three gathers, and True if a fourth with enough memory gives rank 0 all parameters."""
    trainer, lines = two_processes(rank, store, data), []
    lacks = failing(MemoryError("no memory"))
    for owner, name, there in ((Phi1, "to_empty", lacks),
                               (engine_module, "torch", SimpleNamespace(Tensor=torch.Tensor, empty=lacks))):
        with pytest.MonkeyPatch.context() as patch:
            if rank.rank == 1:
                patch.setattr(owner, name, there)
            with pytest.raises(Failed) as failure:
                whole_model(trainer.model, trainer.engine)
        lines.append(str(failure.value))
    with pytest.raises(Failed) as failure:
        gather(trainer.model, lacks if rank.rank == 0 else lambda name, whole: None)
    lines.append(str(failure.value))
    whole, copy = gather_weights(trainer.model), whole_model(trainer.model, trainer.engine)
    dist.destroy_process_group()
    return lines, rank.rank or all(torch.equal(whole[name], tensor) for name, tensor in copy.named_parameters())


def test_a_gather_for_which_one_process_lacks_memory_fails_on_all(small_corpus, tmp_path):
    found = in_processes(2, gathers_for_which_one_process_lacks_memory, tmp_path, small_corpus.folder)
    assert found == [(["no memory"] * 3, True), (["no memory"] * 3, 1)]


def saves_that_cannot_begin_on_rank_1(rank, store, data, folder):
    """Return the errors of two saves, and the files of a third, which nothing hinders."""
    trainer = two_processes(rank, store, data)
    saver, lines = Saver(folder, keep=2), []
    for owner, name, error in ((threading.Thread, "start", RuntimeError("can't start new thread")),
                               (dcp.FileSystemWriter, "stage", MemoryError())):
        with pytest.MonkeyPatch.context() as patch:
            if rank.rank == 1:
                patch.setattr(owner, name, failing(error))
            with pytest.raises(RunError) as failure:
                saver.begin(trainer, {})
        lines.append((str(failure.value), saver.in_flight))
        trainer.run_step()
    saver.begin(trainer, {})
    path = saver.finish().path
    dist.destroy_process_group()
    return lines, find_damage(path), sorted(found.name for where in (folder, path) for found in where.iterdir())


def test_a_save_that_cannot_begin_on_one_process_fails_on_all_and_the_next_one_works(small_corpus, tmp_path):
    folder = tmp_path / "checkpoints"
    data = small_corpus.folder
    for lines, damage, files in in_processes(2, saves_that_cannot_begin_on_rank_1, tmp_path, data, folder):
        assert lines == [(f"checkpoint {folder}/step-0 could not be written: can't start new thread", False),
                         (f"checkpoint {folder}/step-1 could not be written: MemoryError", False)]
        assert damage is None
        assert files == [".metadata", "__0_0.distcp", "__1_0.distcp", "manifest.json", "step-2", "trainer.json"]
