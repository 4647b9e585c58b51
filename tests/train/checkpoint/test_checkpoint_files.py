"""Checkpoint folders: at least one is whole whenever a process is killed, also for readers at the same time."""

import builtins
import contextlib
import io
import itertools
import json
import logging
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch.distributed.checkpoint as dcp
from training_runs import SMALL, killed_before

from phi1 import Phi1
from phi1.cli.main import main
from phi1.train.checkpoint.files import (
    checkpoints,
    choose,
    commit,
    describe,
    find_damage,
    prune,
    remove_after,
    step_of,
)
from phi1.train.run.folder import RunFolder
from phi1.train.runtime.launch import RunError


def fill(folder, content):
    """Write a checkpoint as a save does before its commit, and return its files."""
    folder.mkdir(parents=True)
    (folder / "trainer.json").write_text(content)
    return {"trainer.json": describe(folder / "trainer.json")}


def save(folder, name, content):
    files = fill(folder / f".{name}.tmp", content)
    commit(folder / f".{name}.tmp", folder / name, files)


def test_a_step_saved_again_is_whole_whenever_the_save_is_killed(tmp_path):
    for call in itertools.count():
        folder = RunFolder(tmp_path / f"{call}")
        save(folder.checkpoints, "step-10", "older")
        save(folder.checkpoints, "step-20", "before")
        files = fill(folder.checkpoints / ".step-20.tmp", "after")
        died = killed_before(call, commit, folder.checkpoints / ".step-20.tmp", folder.checkpoints / "step-20", files)
        folder.lock()
        chosen = choose(folder.checkpoints, "auto")
        assert chosen == folder.checkpoints / "step-20"
        assert (chosen / "trainer.json").read_text() in (("before", "after") if died else ("after",))
        remove_after(folder.checkpoints, chosen)
        assert sorted(os.listdir(folder.checkpoints)) == ["step-10", "step-20"]
        if not died:
            assert call >= 4  # two renames and two removals at least
            return


def test_a_second_save_that_cannot_be_renamed_keeps_the_first(tmp_path, monkeypatch):
    save(tmp_path, "step-20", "before")
    files = fill(tmp_path / ".step-20.tmp", "after")

    def rename(source, target, rename=os.rename):
        if Path(source) == tmp_path / ".step-20.tmp":
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(OSError, match="Input/output error"):
        commit(tmp_path / ".step-20.tmp", tmp_path / "step-20", files)
    assert find_damage(tmp_path / "step-20") is None
    assert (tmp_path / "step-20" / "trainer.json").read_text() == "before"


@pytest.mark.parametrize(("remove", "kept"), [
    (lambda folder: prune(folder, keep=1), [[10, 20, 30], [20, 30], [30]]),
    (lambda folder: remove_after(folder, folder / "step-10"), [[10, 20, 30], [10, 20], [10]]),
], ids=["prune", "remove_after"])
def test_a_killed_removal_leaves_whole_checkpoints_and_is_completed_later(tmp_path, remove, kept):
    for call in itertools.count():
        folder = tmp_path / f"{call}"
        for step in (10, 20, 30):
            save(folder, f"step-{step}", "state")
        died = killed_before(call, remove, folder)
        left = checkpoints(folder)
        assert [step_of(path) for path in left] in kept
        assert not any(find_damage(path) for path in left)
        remove(folder)
        remove_after(folder, None)
        assert [step_of(folder / name) for name in os.listdir(folder)] == kept[-1]
        if not died:
            assert call >= 8  # two checkpoints, each with a rename and three removals
            return


def test_a_worker_that_still_writes_does_not_stop_the_sweep(tmp_path, monkeypatch):
    """It is a worker of the attempt before, which torchrun has just ended."""
    unfinished = tmp_path / ".step-50.tmp"
    save(tmp_path, "step-20", "state")
    fill(unfinished, "part")

    def write_and_remove(path, *args, rmdir=os.rmdir, **options):
        with contextlib.suppress(FileNotFoundError):
            (unfinished / "__1_0.distcp").touch()
        rmdir(path, *args, **options)

    monkeypatch.setattr(os, "rmdir", write_and_remove)
    assert remove_after(tmp_path, tmp_path / "step-20") == []
    assert os.listdir(tmp_path) == ["step-20"]


def test_a_checkpoint_that_cannot_be_removed_is_one_line(tmp_path, monkeypatch):
    def rename(*_):
        raise OSError(30, "Read-only file system")

    for step in (10, 20):
        save(tmp_path, f"step-{step}", "state")
    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(RunError) as error:
        remove_after(tmp_path, tmp_path / "step-10")
    assert str(error.value) == (f"{tmp_path}/step-20 cannot be removed: Read-only file system; once that is mended, "
                                "the same command goes on")
    prune(tmp_path, keep=1)  # after a save, an old checkpoint that stays is no error
    assert [path.name for path in checkpoints(tmp_path)] == ["step-10", "step-20"]


@contextlib.contextmanager
def before_look(number, path, act):
    """Call `act` before call number `number` that stats or opens something in `path`; yield a list of its results."""
    looks, acted = itertools.count(), []

    def acting(look):
        def act_and_look(where, *args, **options):
            if f"{where}".startswith(f"{path}") and next(looks) == number:
                acted.append(act())
            return look(where, *args, **options)
        return act_and_look

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((os, "stat"), (os, "listdir"), (os, "open"), (io, "open"), (builtins, "open")):
            patch.setattr(owner, name, acting(getattr(owner, name)))
        yield acted


def test_verify_leaves_out_checkpoints_that_the_run_removes_meanwhile(tmp_path, capsys):
    folder = tmp_path / "checkpoints"
    for number in itertools.count():
        shutil.rmtree(folder, ignore_errors=True)
        for step in (10, 20):
            save(folder, f"step-{step}", "state")
        with before_look(number, folder / "step-10", lambda: prune(folder, keep=1)) as removed:
            assert main(["verify", str(tmp_path)]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines in ([f"{folder}/step-20: whole"], [f"{folder}/step-{step}: whole" for step in (10, 20)])
        if not removed:
            assert number >= 4
            break

    def save_another():
        save(folder, "step-30", "state")
        prune(folder, keep=1)

    with before_look(0, folder / "step-10", save_another):
        assert main(["verify", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{folder}/step-30: whole\n"


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_convert_names_the_newest_checkpoint_if_the_run_has_removed_the_given_one(tmp_path, capsys, caplog):
    folder, out = tmp_path / "checkpoints", tmp_path / "out"
    unfinished = folder / ".step-10.tmp"
    whole = tmp_path / "whole"
    fill(unfinished, json.dumps({"step": 10, "defining": {f"model.{key}": value for key, value in asdict(SMALL).items()
                                                          if "dropout" not in key}}))
    dcp.save({"model": Phi1(SMALL).state_dict()}, storage_writer=dcp.FileSystemWriter(unfinished), no_dist=True)
    commit(unfinished, folder / "step-10", {path.name: describe(path) for path in unfinished.iterdir()})
    save(folder, "step-20", "state")
    shutil.copytree(folder, whole)
    for number in itertools.count():
        shutil.rmtree(folder)
        shutil.copytree(whole, folder)
        with before_look(number, folder / "step-10", lambda: prune(folder, keep=1)) as removed:
            code = main(["convert", "--model", str(folder / "step-10"), "--out", str(out)])
        if code == 0:  # removed after all was read, or not at all
            shutil.rmtree(out)
        else:
            said_before, line = capsys.readouterr().err.splitlines()
            assert said_before.startswith("phi1 convert: the run's tokenizer is not found")
            assert line == (f"phi1 convert: error: checkpoint {folder}/step-10 is not there; the newest is "
                            f"{folder}/step-20")
        if not removed:
            assert number >= 10
            break
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
