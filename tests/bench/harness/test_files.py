"""Files of the benchmarks that two processes write at once, or that a process is killed over."""

import os
import threading

import pytest

from phi1.bench.compile import table
from phi1.bench.harness import files
from phi1.bench.harness.parser import plain_parser
from phi1.bench.report import report, results

FACTS = {"device": "cuda", "gpu": "A GPU", "torch": "2.11.0", "triton": "3.6.0", "commit": "abc1234"}


def record(case):
    return {key: [] for key in results.CASE} | {"case": case}


@pytest.fixture
def meanwhile(monkeypatch):
    """Has another process do something the moment before a file is replaced, and lets it get on; it is to be joined."""
    def arrange(act, seconds=0.2):
        real, other = os.replace, threading.Thread(target=act)  # a lock keeps threads apart as it does processes

        def replace(source, target):
            monkeypatch.setattr(os, "replace", real)
            other.start()
            other.join(seconds)
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
    meanwhile(lambda: files.replace(path, "theirs"), seconds=60)
    files.replace(path, "ours")
    assert path.read_text() == "ours"
    assert names(tmp_path) == ["r.json"]


@pytest.mark.parametrize(("version", "arch"), [("3.6.0", "sm_90"), ("3.9.0", "sm_80"), ("3.9.0", "sm_90")])
def test_what_two_processes_compile_for_the_table_at_once_is_kept(tmp_path, meanwhile, version, arch):
    path = tmp_path / "table.json"
    theirs = meanwhile(lambda: table.save(version, {arch: {"theirs": {"key": "1"}}}, path))
    table.save("3.9.0", {"sm_90": {"ours": {"key": "2"}}}, path)
    theirs.join(60)
    assert table.load(version, path)[arch]["theirs"] == {"key": "1"}
    assert table.load("3.9.0", path)["sm_90"]["ours"] == {"key": "2"}
    assert names(tmp_path) == ["table.json"]


def test_results_saved_at_once_get_two_names(tmp_path, meanwhile):
    one, two = (results.ResultsFile(tmp_path / "r.json", FACTS, {}, beside=True) for _ in range(2))
    theirs = meanwhile(lambda: two.add(record("theirs")))
    one.add(record("ours"))
    theirs.join(60)
    one.add(record("ours too"))
    assert [results.read(file.path)["cases"][-1]["case"] for file in (one, two)] == ["ours too", "theirs"]
    assert names(tmp_path) == ["r.2.json", "r.json"]


def test_the_page_is_whole_where_the_disk_is_full(tmp_path, full_disk):
    page = tmp_path / "page.md"
    page.write_text(f"{report.BEGIN}\n{report.END}\n" + "All the rest of it.\n" * 1000)
    before = page.read_text()
    (tmp_path / "r.json").write_text(results.as_text(
        {"format": results.FORMAT, "date": "2026-11-23", "environment": FACTS, "settings": {}, "cases": []}))
    with full_disk(), pytest.raises(OSError, match="File too large"):
        report.main([str(tmp_path / "r.json"), "--page", str(page), "--no-plots"], plain_parser)
    assert page.read_text() == before
    assert names(tmp_path) == ["page.md", "r.json"]
