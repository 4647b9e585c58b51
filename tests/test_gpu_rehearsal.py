"""bench/gpu.sh: what it refuses, what it takes from wheels, that a stage keeps its time. CI rehearses every stage."""

import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from phi1.bench import gpu_stages
from phi1.bench.gpu_stages import Command

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "bench" / "gpu.sh"

if sys.platform != "linux":
    pytest.skip("the script is for Linux", allow_module_level=True)


def gpu_sh(*arguments, **environment):
    variables = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run([SCRIPT, *arguments], capture_output=True, text=True, env=variables, timeout=280)


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        ([], {}, "give a stage: check kernels block train decode tune profile"),
        (["kernel"], {}, "there is no stage 'kernel'"),
        (["tune"], {"PYTHON": "/nowhere/python"}, "/nowhere/python has no torch and triton"),
    ],
)
def test_wrong_use_ends_in_one_line(arguments, environment, message, tmp_path):
    done = gpu_sh(*arguments, OUT=str(tmp_path), **environment)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert message in done.stderr


def without_tomli_w(folder):
    """A folder for PYTHONPATH on which the package looks as if it were not installed."""
    folder.mkdir()
    (folder / "tomli_w.py").write_text("raise ModuleNotFoundError(\"No module named 'tomli_w'\", name='tomli_w')\n")
    return str(folder)


def test_a_missing_package_is_named_in_one_line(tmp_path):
    done = gpu_sh("train", OUT=str(tmp_path / "out"), PYTHONPATH=without_tomli_w(tmp_path / "shim"))
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "stage train needs Python packages that are missing: tomli-w; put their wheels" in done.stderr


@pytest.mark.slow
def test_a_missing_package_is_taken_from_the_wheels(tmp_path):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "tomli_w-9.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tomli_w.py", "def dumps(data): return ''\n")
        wheel.writestr("tomli_w-9.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tomli-w\nVersion: 9.0\n")
        wheel.writestr("tomli_w-9.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("tomli_w-9.0.dist-info/RECORD", "")
    done = gpu_sh("--rehearse", "train", OUT=str(tmp_path / "out"), WHEELS=str(wheels),
                  PYTHONPATH=without_tomli_w(tmp_path / "shim"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "out" / "train" / "train.json").is_file()


def test_a_stage_runs_from_the_source_tree_and_leaves_it_clean(tmp_path):
    before = set((ROOT / "phi1").iterdir())
    done = gpu_sh("--rehearse", "tune", OUT=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == f"results in {tmp_path / 'tune'}"
    assert "nothing was run" in (tmp_path / "tune" / "list.log").read_text()
    assert set((ROOT / "phi1").iterdir()) == before


def alive(pid):
    """Whether a process runs; one that is dead and not reaped does not."""
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_command_that_takes_too_long_is_killed_with_its_children(tmp_path):
    pid_file = tmp_path / "pid"
    child = f"import os, time; open({str(pid_file)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    parent = f"import subprocess, sys; print('begun', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"
    begin = time.monotonic()
    row = gpu_stages.run(Command("slow", ("-c", parent), 11), tmp_path, 100)
    assert time.monotonic() - begin < 20
    assert (row.outcome, row.last) == ("time out", ["begun"])
    end = time.monotonic() + 10  # a killed process is gone a little later
    while alive(int(pid_file.read_text())):
        assert time.monotonic() < end
        time.sleep(0.05)


def test_no_command_starts_when_the_time_is_up_and_a_missing_program_is_skipped(tmp_path):
    assert gpu_stages.run(Command("late", ("-c", "print(1)")), tmp_path, 5).outcome == "no time"
    skipped = gpu_stages.run(Command("tool", ("no-such-tool",), program="no-such-tool"), tmp_path, 100)
    assert (skipped.outcome, skipped.last) == ("skipped", ["no-such-tool is not installed"])


@pytest.mark.parametrize(("code", "expected"), [(0, 0), (3, 1)])
def test_the_table_is_last_and_a_failure_shows(monkeypatch, tmp_path, capsys, code, expected):
    command = Command("one", ("-c", f"print('the result'); raise SystemExit({code})"))
    monkeypatch.setattr(gpu_stages, "commands", lambda stage, out, rehearse: [command])
    assert gpu_stages.run_stage("tune", tmp_path, True) == expected
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].split()[:2] == ["one", "ok" if code == 0 else "exit"]
    assert lines[-2].endswith("the result")


@pytest.mark.parametrize("stage", list(gpu_stages.NEEDS))
@pytest.mark.parametrize("rehearse", [True, False])
def test_every_stage_names_scripts_that_are_there(stage, rehearse, tmp_path):
    commands = gpu_stages.commands(stage, tmp_path, rehearse)
    assert commands
    for command in commands:
        for word in command.words:
            if word.endswith(".py"):
                assert Path(word).is_file(), word
