"""Checkpoints' folders, of which a whole one is there whenever a process is killed, and another looks on meanwhile."""

import itertools
import os
import signal
from pathlib import Path

import pytest

from phi1.train.checkpoint_files import choose, commit, describe, find_damage, remove_after
from phi1.train.runfolder import RunFolder


def fill(folder, content):
    """What a save has written before its commit."""
    folder.mkdir(parents=True)
    (folder / "trainer.json").write_text(content)
    return {"trainer.json": describe(folder / "trainer.json")}


def save(folder, name, content):
    files = fill(folder / f".{name}.tmp", content)
    commit(folder / f".{name}.tmp", folder / name, files)


def killed_before(call, action, *args):
    """Do `action(*args)` in a process of its own that is killed before its call number `call` that changes a folder.

    Returns whether there was such a call.
    """
    process = os.fork()
    if process:
        return os.WIFSIGNALED(os.waitpid(process, 0)[1])
    calls = itertools.count()

    def or_die(change):
        def do_or_die(*args, **options):
            if next(calls) == call:
                os.kill(os.getpid(), signal.SIGKILL)
            change(*args, **options)
        return do_or_die

    for name in ("rename", "replace", "unlink", "rmdir"):
        setattr(os, name, or_die(getattr(os, name)))
    try:
        action(*args)
    finally:  # of the test's copy as well
        os._exit(0)


def test_a_step_that_is_saved_again_is_there_whenever_the_save_is_killed(tmp_path):
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
            assert call >= 4  # two renames, two removals
            return


def test_a_step_whose_second_save_cannot_get_its_name_keeps_the_first(tmp_path, monkeypatch):
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
