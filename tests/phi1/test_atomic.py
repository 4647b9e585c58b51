"""Folders that appear complete or not at all: stopped or killed at every line, and while other processes make, sweep
and abandon theirs."""

import contextlib
import fcntl
import os
import sys
import threading
from pathlib import Path

import pytest
from crashes import ends_early

from phi1 import atomic
from phi1.atomic import NEW, publish, sweep, workspace, write_file


def make(path, text, check=lambda old: None):
    with workspace(path) as work:
        (work / NEW).mkdir()
        for name in "ab":
            (work / NEW / name).write_text(text)
        return publish(work, path, check)


def held(path):
    """What the folder's files hold; None if there is no folder."""
    return sorted(file.read_text() for file in path.iterdir()) if path.exists() else None


def broken_off(act, line, how):
    """Do it in another process, until the given line of the module, and there `how`; whether it came to that line."""
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


@pytest.mark.parametrize(("how", "before"), [("stopped", "a folder"), ("killed", "a folder"), ("killed", "nothing")])
def test_broken_off_at_any_line_it_is_as_it_was_or_as_it_was_to_be(tmp_path, how, before):
    path, outcomes = tmp_path / "m", []
    was = ["1", "1"] if before == "a folder" else None
    for line in range(1, 1000):
        if was:
            make(path, "1")
        came = broken_off(lambda: make(path, "2"), line, stop if how == "stopped" else lambda: os._exit(0))
        if how == "stopped":
            assert held(path) in (was, ["2", "2"])  # already
        sweep(path)
        outcomes.append(held(path))
        assert os.listdir(tmp_path) == ["m"] * path.exists()
        if path.exists():
            atomic.shutil.rmtree(path)
        if not came:
            break
    published = outcomes.index(["2", "2"])
    assert 20 < published < len(outcomes) - 1
    assert outcomes == [was] * published + [["2", "2"]] * (len(outcomes) - published)


def test_stopped_once_more_while_it_puts_the_old_one_back_nothing_is_lost(tmp_path, monkeypatch):
    """Each rename but the first is stopped; what is not put back by its owner is so by the next one."""
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


def test_a_file_written_anew_is_the_old_one_or_the_new_one(tmp_path):
    """Reached by a symbolic link, which stays."""
    (tmp_path / "here").symlink_to(tmp_path / "there")
    outcomes = []
    for line in range(1, 1000):
        (tmp_path / "there").write_text("old")
        came = broken_off(lambda: write_file(tmp_path / "here", "new"), line, lambda: os._exit(0))
        outcomes.append((tmp_path / "here").read_text())
        sweep(tmp_path / "there")
        assert sorted(os.listdir(tmp_path)) == ["here", "there"]
        if not came:
            break
    assert outcomes == sorted(outcomes, reverse=True)
    assert outcomes.count("old") > 20
    assert outcomes[-1] == "new"
    assert (tmp_path / "here").is_symlink()


def test_a_folder_that_was_replaced_and_then_removed_stays_away(tmp_path):
    path = tmp_path / "m"
    for line in range(1, 1000):
        make(path, "1")
        came = broken_off(lambda: make(path, "2"), line, lambda: os._exit(0))
        if held(path) == ["2", "2"]:
            atomic.shutil.rmtree(path)
            sweep(path)
            assert os.listdir(tmp_path) == []
        if not came:
            break


def test_what_is_left_of_a_removal_is_never_put_back(tmp_path, monkeypatch):
    """Killed after each file, where `old` and `new` are to go because another process has taken the name."""
    path, left = tmp_path / "m", [0]

    def unlink(*args, unlink=os.unlink, **options):
        unlink(*args, **options)
        left[0] -= 1
        if left[0] == 0:
            os._exit(0)

    @contextlib.contextmanager
    def scandir(folder, scandir=os.scandir):  # `old` first, as some file systems have it
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
def test_what_must_stay_is_put_back(tmp_path, error):
    """Files that came while the new folder was filled are seen once nobody can add any more."""
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


def test_a_sweep_takes_only_what_was_abandoned_on_the_way_to_its_own_path(tmp_path):
    for name in (".m.0123abcd.tmp", ".m.5.0123abcd.tmp", ".m.mine.tmp", ".n.0123abcd.tmp"):
        (tmp_path / name / "old").mkdir(parents=True)
    with workspace(tmp_path / "m") as work:
        sweep(tmp_path / "m")
        assert sorted(os.listdir(tmp_path)) == sorted([".m.5.0123abcd.tmp", ".m.mine.tmp", ".n.0123abcd.tmp",
                                                       work.name])


def test_a_lock_that_somebody_holds_for_long_is_not_waited_for(tmp_path, monkeypatch):
    """As that of `flock FOLDER phi1 convert ...`, which its own command inherits."""
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
    """What another process that starts at the same time can do to it, at each moment at which it can."""
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


def test_many_at_once_do_not_disturb_one_another(tmp_path, monkeypatch):
    """Each sweeps as it starts, at whatever moment the others are, and the folder is whole at every moment."""
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
