"""Rows of the compiler's table that are compiled again: those that a commit has changed, and a sample of each day."""

import functools
import json
import os
import shutil
import subprocess
import sys

import pytest

if sys.platform != "linux" or os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("Triton compiles on Linux, and not in its interpreter", allow_module_level=True)

from phi1.bench.compile import again as static_again
from phi1.bench.compile import report
from phi1.bench.compile import table as static_table
from phi1.bench.compile.table import TABLE, VERSIONS

CASES = "sum_partials"  # 9: phi-1's width in three types, and six widths
ARCH = "sm_90"


def git(folder, *words):
    settings = ("-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "commit.gpgsign=false")
    subprocess.run(["git", "-C", folder, *settings, *words], check=True, capture_output=True)


@pytest.fixture
def again(tmp_path, monkeypatch, capsys):
    """`phi1 bench static` over a copy of the table, in a repository where it is committed; the compiler says what the
    committed table says. Returns (exit code, what was printed, the cases that were compiled)."""
    version, table = VERSIONS[0], tmp_path / TABLE.name
    shutil.copy(TABLE, table)
    true = static_table.load(version, table)[ARCH]
    compiled = []

    def compile_all(jobs, processes):
        compiled.extend(case.name for _, case in jobs)
        return [(job, static_table.report_of(true[job[1].name])) for job in jobs]

    monkeypatch.setattr(static_again.triton, "__version__", version)
    monkeypatch.setattr(static_again, "compile_all", compile_all)
    monkeypatch.setattr(static_again, "load", functools.partial(static_table.load, path=table))
    monkeypatch.setattr(static_again, "load_at", functools.partial(static_table.load_at, folder=tmp_path))
    monkeypatch.setenv("TRITON_ALWAYS_COMPILE", "0")

    def run(*words, change=None):
        if change:
            content = json.loads(table.read_text())
            change(content[version][ARCH])
            table.write_text(json.dumps(content))
        compiled.clear()
        code = report.main(["--check", "--arch", ARCH, "--only", CASES, *words])
        return code, capsys.readouterr().out, sorted(compiled)

    return run


@pytest.fixture
def committed(again, tmp_path):
    """The command as in `again`, with the table committed."""
    git(tmp_path, "init")
    git(tmp_path, "add", TABLE.name)
    git(tmp_path, "commit", "-m", "the table")
    return again


def test_nothing_is_compiled_where_nothing_has_changed(committed):
    code, out, compiled = committed("--changed", "HEAD")
    assert (code, compiled) == (0, [])
    assert "0 rows are not as they were there" in out


def test_a_row_that_the_compiler_did_not_write_is_found(committed):
    code, out, compiled = committed("--changed", "HEAD",
                                    change=lambda rows: rows["sum_partials train fp16"].update(registers=11))
    assert (code, compiled) == (1, ["sum_partials train fp16"])
    said = "changed since HEAD, Triton 3.9.0: sum_partials train fp16 on sm_90: REFUSED: it is now Report(registers="
    assert said in out
    assert "in the table Report(registers=11" in out


def test_a_row_that_the_commit_lacks_is_compiled_and_one_of_todays_is_kept(committed, tmp_path):
    def without(rows):
        del rows["sum_partials train bf16"]

    kept = (tmp_path / TABLE.name).read_text()
    committed(change=without)
    git(tmp_path, "commit", "-a", "-m", "fewer")
    (tmp_path / TABLE.name).write_text(kept)
    code, out, compiled = committed("--changed", "HEAD", "--sample", "1")
    assert code == 0
    assert "sum_partials train bf16" in compiled
    assert len(compiled) == 2, "the sample is of the other rows"
    assert "changed since HEAD, Triton 3.9.0: sum_partials train bf16 on sm_90: as in the table" in out


def test_what_there_is_no_time_for_is_counted(committed, monkeypatch):
    monkeypatch.setattr(static_again, "CHANGED_SECONDS", static_again.COMPILE_SECONDS)
    code, out, compiled = committed("--changed", "HEAD", "--jobs", "2",
                                    change=lambda rows: [row.update(warps=5) for row in rows.values()])
    assert (code, len(compiled)) == (1, 2)
    assert "9 rows are not as they were there, 2 of them compiled again, 7 left out for want of time" in out


@pytest.mark.parametrize("reason", ["no repository", "no commit", "no git", "no JSON"])
def test_where_the_commit_cannot_be_read_the_sample_alone_is_taken_and_one_line_says_so(again, tmp_path, monkeypatch,
                                                                                        reason):
    if reason != "no repository":
        git(tmp_path, "init")
    if reason == "no JSON":
        (tmp_path / TABLE.name).write_text("<<<<<<< HEAD")
        git(tmp_path, "add", TABLE.name)
        git(tmp_path, "commit", "-m", "half merged")
        shutil.copy(TABLE, tmp_path)
    if reason == "no git":
        monkeypatch.setenv("PATH", str(tmp_path))
    code, out, compiled = again("--changed", "HEAD" if reason == "no JSON" else "HEAD~1", "--sample", "3")
    assert (code, len(compiled)) == (0, 3)
    lines = [line for line in out.splitlines() if line.startswith("--changed")]
    assert len(lines) == 1
    said = {"no git": "there is no git", "no JSON": "is no JSON"}.get(reason, "git: fatal: ")
    assert said in lines[0]


def test_a_sample_that_differs_from_the_table_is_refused(again):
    code, out, compiled = again("--sample", "99",
                                change=lambda rows: rows["sum_partials train fp16"].update(registers=11))
    assert code == 1
    assert len(compiled) == 9
    assert out.count("as in the table") == 8
    assert "sum_partials train fp16 on sm_90: REFUSED: it is now Report(registers=" in out


def test_the_sample_of_another_day_is_another(again, monkeypatch):
    class Clock:
        day = "2030-01-01"

        now = classmethod(lambda cls, zone: cls)
        date = classmethod(lambda cls: cls)
        isoformat = classmethod(lambda cls: cls.day)

    monkeypatch.setattr(static_again, "datetime", Clock)
    samples = []
    for Clock.day in ("2030-01-01", "2030-01-01", "2030-01-02"):
        samples.append(again("--sample", "3")[2])
    assert len(samples[0]) == 3
    assert samples[0] == samples[1] != samples[2]
