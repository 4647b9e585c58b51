"""Files of the benchmarks that two processes write at once, or that a process is killed over."""

import os
import threading

import pytest

from phi1.bench import files, static_table


@pytest.fixture
def meanwhile(monkeypatch):
    """Has another process do something the moment before a file is replaced, and lets it get on; it is to be joined."""
    def arrange(act):
        real, other = os.replace, threading.Thread(target=act)  # a lock keeps threads apart as it does processes

        def replace(source, target):
            monkeypatch.setattr(os, "replace", real)
            other.start()
            other.join(0.2)
            real(source, target)

        monkeypatch.setattr(os, "replace", replace)
        return other

    return arrange


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_text_that_cannot_be_put_in_place_changes_nothing(tmp_path, monkeypatch):
    path = tmp_path / "table.json"
    files.replace(path, "before")

    def interrupted(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        files.replace(path, "after")
    assert path.read_text() == "before"
    assert names(tmp_path) == ["table.json"]


def test_two_that_replace_a_file_at_once_do_not_meet(tmp_path, meanwhile):
    path = tmp_path / "r.json"
    meanwhile(lambda: files.replace(path, "theirs"))
    files.replace(path, "ours")
    assert path.read_text() == "ours"
    assert names(tmp_path) == ["r.json"]


@pytest.mark.parametrize(("version", "arch"), [("3.6.0", "sm_90"), ("3.9.0", "sm_80"), ("3.9.0", "sm_90")])
def test_what_two_processes_compile_for_the_table_at_once_is_kept(tmp_path, meanwhile, version, arch):
    path = tmp_path / "table.json"
    theirs = meanwhile(lambda: static_table.save(version, {arch: {"theirs": {"key": "1"}}}, path))
    static_table.save("3.9.0", {"sm_90": {"ours": {"key": "2"}}}, path)
    theirs.join(10)
    assert static_table.load(version, path)[arch]["theirs"] == {"key": "1"}
    assert static_table.load("3.9.0", path)["sm_90"]["ours"] == {"key": "2"}
    assert names(tmp_path) == ["table.json"]
