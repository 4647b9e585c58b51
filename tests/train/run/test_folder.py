"""The run's folder: one process has it at a time, also while a refused start removes it."""

import errno
import fcntl
import os

import pytest

from phi1.train.recipe.recipe import Recipe
from phi1.train.run.folder import RunFolder
from phi1.train.runtime.launch import RunError


@pytest.fixture
def refused(tmp_path):
    """The folder that a start has made, before the start is refused."""
    folder = RunFolder(tmp_path / "runs" / "x")
    folder.lock()
    return folder


def leave(folder):
    """Discard a new folder and release its lock, as a refused start and the end of its process do."""
    folder.discard_if_new()
    os.close(folder._lock)


def once(monkeypatch, owner, name, before=lambda: None, after=lambda: None):
    """Call `before` and `after` around the next call of a function, which may fail."""
    call, acts = getattr(owner, name), [before, after]

    def acting(*args, **options):
        first, last = acts or (lambda: None, lambda: None)
        acts.clear()
        first()
        try:
            return call(*args, **options)
        finally:
            last()

    monkeypatch.setattr(owner, name, acting)


def assert_has(folder):
    """Assert that a third process would be refused, and that the run can begin."""
    with pytest.raises(RunError, match=rf"is in use by process {os.getpid()}: wait"):
        RunFolder(folder.path).lock()
    folder.store(Recipe().to_toml())
    assert folder.config.exists()


@pytest.mark.parametrize(("owner", "name"), [(os, "mkdir"), (os, "open"), (fcntl, "flock")])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_folder_that_is_removed_before_it_is_locked_is_made_again(refused, monkeypatch, owner, name, when):
    if (name, when) == ("flock", "after"):  # the folder is in use until the call, which is one line and no traceback
        once(monkeypatch, fcntl, "flock", after=lambda: leave(refused))
        with pytest.raises(RunError, match=r"runs/x is in use by process unknown: wait until it ends, or give another"):
            RunFolder(refused.path).lock()
        return
    other = RunFolder(refused.path)
    once(monkeypatch, owner, name, **{when: lambda: leave(refused)})
    other.lock()
    assert_has(other)


def test_a_third_process_that_comes_between_has_the_folder_alone(refused, monkeypatch):
    third = RunFolder(refused.path)

    def come_and_go():
        leave(refused)
        third.lock()

    once(monkeypatch, fcntl, "flock", before=come_and_go)
    with pytest.raises(RunError, match=rf"is in use by process {os.getpid()}: wait"):
        RunFolder(refused.path).lock()
    assert_has(third)


@pytest.mark.parametrize("name", ["listdir", "unlink", "rmdir"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_start_during_the_removal_keeps_its_folder(refused, monkeypatch, name, when):
    other = RunFolder(refused.path)

    def come():
        try:
            other.lock()
        except RunError:
            assert name == "listdir" or (name, when) == ("unlink", "before")

    once(monkeypatch, os, name, **{when: come})
    leave(refused)
    if other._lock is None:
        assert not refused.path.exists()
        other.lock()
    assert_has(other)
    other.discard_if_new()
    assert other.config.exists()


def test_a_refused_start_removes_no_more_than_it_has_made(refused, monkeypatch, tmp_path):
    note = refused.path / "note.txt"
    once(monkeypatch, os, "listdir", after=note.touch)
    leave(refused)
    assert note.exists()
    folder = RunFolder(tmp_path / "mine")
    folder.path.mkdir()
    folder.lock()
    leave(folder)
    assert folder.path.exists()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_one_line_and_another_one_serves(tmp_path, monkeypatch, number):
    flock, without = fcntl.flock, tmp_path / "lustre"

    def no_locks(descriptor, how):
        if str(without) in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(number, os.strerror(number))
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(RunError, match=rf"^run\.folder {without}: {os.strerror(number)}: its file system has no locks "
                                       r"\(flock\), .* or give a --run\.folder on another one$"):
        RunFolder(without).lock()
    RunFolder(tmp_path / "ext4").lock()
