"""Atomic folders and files: stopped or killed at every line, and beside other processes that write the same path."""

import contextlib
import fcntl
import os
import sys
import threading
from pathlib import Path

import pytest

from phi1 import atomic
from phi1.atomic import NEW, publish, sweep, workspace, write_file
from phi1.testing import ends_early


def make(path, text, check=lambda old: None):
    with workspace(path) as work:
        (work / NEW).mkdir()
        for name in "ab":
            (work / NEW / name).write_text(text)
        return publish(work, path, check)


def held(path):
    """Return the texts of the folder's files, or None if there is no folder."""
    return sorted(file.read_text() for file in path.iterdir()) if path.exists() else None


def interrupted_at(line, act, how):
    """Run `act` in a forked process and call `how` at the given line of the module. Return True if it got there."""
    left = [line]

    def trace(frame, event, arg):
        if frame.f_code.co_filename != atomic.__file__:
            return None
        left[0] -= event == "line"
        if left[0] == 0 and event == "line":
            how()
        return trace

    def traced():
        sys.settrace(trace)
        with contextlib.suppress(KeyboardInterrupt):
            act()
        sys.settrace(None)
        if left[0] <= 0:
            os._exit(0)

    return ends_early(traced)


def stop():
    raise KeyboardInterrupt


@pytest.mark.parametrize(("how", "before"), [
    ("stopped", "a folder"), ("killed", "a folder"), ("killed", "nothing"), ("killed, then removed", "a folder"),
])
def test_interrupted_at_any_line_the_folder_is_old_or_new(tmp_path, how, before):
    path, outcomes = tmp_path / "m", []
    was = ["1", "1"] if before == "a folder" else None
    for line in range(1, 1000):
        if was:
            make(path, "1")
        came = interrupted_at(line, lambda: make(path, "2"), stop if how == "stopped" else lambda: os._exit(0))
        if how == "stopped":
            assert held(path) in (was, ["2", "2"])  # even before a sweep
        removed = how == "killed, then removed" and held(path) == ["2", "2"]
        if removed:  # then no sweep may bring the old folder back
            atomic.shutil.rmtree(path)
        sweep(path)
        assert not removed or held(path) is None
        outcomes.append(["2", "2"] if removed else held(path))
        assert os.listdir(tmp_path) == ["m"] * path.exists()
        if path.exists():
            atomic.shutil.rmtree(path)
        if not came:
            break
    published = outcomes.index(["2", "2"])
    assert 20 < published < len(outcomes) - 1
    assert outcomes == [was] * published + [["2", "2"]] * (len(outcomes) - published)


def test_a_second_stop_during_the_cleanup_loses_nothing(tmp_path, monkeypatch):
    """Every rename after the first is stopped. The next sweep puts the old folder back."""
    path, renames = tmp_path / "m", []

    def rename(source, target, rename=os.rename):
        renames.append(target)
        if len(renames) > 1:
            raise KeyboardInterrupt
        rename(source, target)

    make(path, "1")
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", rename)
        with pytest.raises(KeyboardInterrupt):
            make(path, "2")
    assert len(renames) == 4
    assert not path.exists()
    sweep(path)
    assert held(path) == ["1", "1"]
    assert os.listdir(tmp_path) == ["m"]


def test_a_rewritten_file_is_old_or_new(tmp_path):
    """The file is reached by a symbolic link, which stays."""
    (tmp_path / "here").symlink_to(tmp_path / "there")
    outcomes = []
    for line in range(1, 1000):
        (tmp_path / "there").write_text("old")
        came = interrupted_at(line, lambda: write_file(tmp_path / "here", "new"), lambda: os._exit(0))
        outcomes.append((tmp_path / "here").read_text())
        sweep(tmp_path / "there")
        assert sorted(os.listdir(tmp_path)) == ["here", "there"]
        if not came:
            break
    assert outcomes == sorted(outcomes, reverse=True)
    assert outcomes.count("old") > 20
    assert outcomes[-1] == "new"
    assert (tmp_path / "here").is_symlink()


def test_a_half_removed_folder_is_never_put_back(tmp_path, monkeypatch):
    """Another process has taken the name, so `old` and `new` are removed; a kill comes after each file."""
    path, left = tmp_path / "m", [0]

    def unlink(*args, unlink=os.unlink, **options):
        unlink(*args, **options)
        left[0] -= 1
        if left[0] == 0:
            os._exit(0)

    @contextlib.contextmanager
    def scandir(folder, scandir=os.scandir):  # `old` comes first, as in some file systems
        with scandir(folder) as entries:
            yield sorted(entries, key=lambda entry: entry.name, reverse=True)

    for files in range(1, 5):
        make(path, "1")
        left[0] = files
        with monkeypatch.context() as patch:
            patch.setattr(os, "unlink", unlink)
            patch.setattr(os, "scandir", scandir)
            assert ends_early(lambda: make(path, "2", lambda old: (path / "taken").mkdir(parents=True)))
        atomic.shutil.rmtree(path)
        sweep(path)
        assert held(path) in (["1", "1"], None)
        assert os.listdir(tmp_path) == ["m"] * path.exists()


@pytest.mark.parametrize("error", [OSError("no"), KeyboardInterrupt()])
def test_a_folder_that_must_stay_is_put_back(tmp_path, error):
    """The check runs on the folder after it was moved aside, where nobody can add files."""
    path = tmp_path / "m"
    make(path, "1")

    def check(old):
        assert not path.exists()
        assert held(old) == ["1", "1"]
        raise error

    with pytest.raises(type(error)):
        make(path, "2", check)
    assert held(path) == ["1", "1"]
    assert os.listdir(tmp_path) == ["m"]


def test_a_name_that_is_taken_is_left(tmp_path):
    make(tmp_path / "m", "1")
    (tmp_path / "file").write_text("mine")
    assert not make(tmp_path / "m", "2", None)
    assert not make(tmp_path / "file", "2")
    (tmp_path / "empty").mkdir()
    assert make(tmp_path / "empty", "2", None)
    assert [held(tmp_path / name) for name in ("m", "empty")] == [["1", "1"], ["2", "2"]]
    assert (tmp_path / "file").read_text() == "mine"
    assert len(os.listdir(tmp_path)) == 3


def test_a_sweep_removes_only_abandoned_workspaces_of_its_own_path(tmp_path):
    for name in (".m.0123abcd.tmp", ".m.5.0123abcd.tmp", ".m.mine.tmp", ".n.0123abcd.tmp"):
        (tmp_path / name / "old").mkdir(parents=True)
    with workspace(tmp_path / "m") as work:
        sweep(tmp_path / "m")
        assert sorted(os.listdir(tmp_path)) == sorted([".m.5.0123abcd.tmp", ".m.mine.tmp", ".n.0123abcd.tmp",
                                                       work.name])


def test_a_lock_that_somebody_holds_for_long_is_not_waited_for(tmp_path, monkeypatch):
    """Such a lock is that of `flock FOLDER phi1 convert ...`, which its own command inherits."""
    waits = []
    monkeypatch.setattr(atomic.time, "sleep", waits.append)
    folder = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    assert make(tmp_path / "m", "1")
    os.close(folder)
    assert 0.5 < sum(waits) < 5
    assert held(tmp_path / "m") == ["1", "1"]


@pytest.mark.parametrize("moment", ["before it is opened", "before it is locked"])
def test_a_folder_swept_before_it_is_locked_is_made_again(tmp_path, monkeypatch, moment):
    """Another process that starts at the same time may sweep the folder at either moment."""
    swept = []

    def remove(path):
        if not swept and str(path).endswith(".tmp"):
            swept.append(Path(path))
            os.rmdir(path)

    def swept_before_or_after(path, *args, open_=os.open, **options):
        if moment == "before it is opened":
            remove(path)
        descriptor = open_(path, *args, **options)
        remove(path)
        return descriptor

    monkeypatch.setattr(os, "open", swept_before_or_after)
    with workspace(tmp_path / "out") as work:
        assert [work] == list(tmp_path.iterdir()) != swept
    assert os.listdir(tmp_path) == []


def test_concurrent_writers_do_not_break_each_other(tmp_path, monkeypatch):
    """Each writer sweeps as it starts, at any moment of the others."""
    monkeypatch.setattr(atomic, "_LOCK_LOOKS", 6000)  # a rename takes seconds where a disk is busy
    failed = []

    def repeat(name):
        try:
            for _ in range(50):
                assert make(tmp_path / "out", name)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=repeat, args=(str(i),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    first, second = held(tmp_path / "out")
    assert first == second
    assert os.listdir(tmp_path) == ["out"]
