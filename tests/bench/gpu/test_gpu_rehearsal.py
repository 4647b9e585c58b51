"""bench/gpu.sh: refusals, wheels, time limits, lost GPUs and signals. CI rehearses every stage.

Most tests give the script a `python` of their own, which claims a GPU and stands in for the commands.
"""

import os
import re
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from training_runs import alive, wait_until

from phi1.bench.cases.registry import all_cases

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "bench" / "gpu.sh"

if sys.platform != "linux":
    pytest.skip("the script is for Linux", allow_module_level=True)

PYTHON = """#!/usr/bin/env bash
case "$*" in
    *phi1.cli.main*) {command} ;;
    *xdist* | *instafail*) exit 1 ;;
    *current_device*) [ -z "$NO_GPU" ] ;;
esac
"""
# Ignores Ctrl-C and has a child in a process group of its own, as processes that tokenise are.
STUBBORN = """trap '' INT; echo begun; bash -c 'set -m; sleep 600 & echo $! >> {pids}; wait' & """ \
           """echo $! >> {pids}; wait"""
SHORT = """#!/usr/bin/env bash
shift 5
exec /usr/bin/timeout -s INT -k 1 1 "$@"
"""


def executable(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


def variables(tmp_path, **changes):
    (tmp_path / "tmp").mkdir(exist_ok=True)
    return os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "OUT": str(tmp_path / "out"), "WHEELS": "",
                         "TMPDIR": str(tmp_path / "tmp")} | changes


def gpu_sh(tmp_path, *arguments, **changes):
    return subprocess.run([SCRIPT, *arguments], capture_output=True, text=True, timeout=280,
                          env=variables(tmp_path, **changes))


@pytest.mark.parametrize(
    ("arguments", "changes", "message"),
    [
        ([], {}, "give a stage: check kernels block train decode tune profile; or --rehearse"),
        (["kernel"], {}, "there is no stage 'kernel'; there are check"),
        (["tune"], {"PYTHON": "/nowhere/python"}, "/nowhere/python has no torch, triton and numpy"),
        (["decode"], {"NO_GPU": "1"}, "finds no CUDA device; --rehearse runs on a CPU"),
        (["tune"], {"WHEELS": "/nowhere"}, "WHEELS=/nowhere is no folder"),
        (["tune"], {"OUT": "/dev/null/out"}, "/dev/null"),
    ],
)
def test_wrong_use_ends_in_one_line(arguments, changes, message, tmp_path):
    python = executable(tmp_path / "python", PYTHON.format(command="true"))
    done = gpu_sh(tmp_path, *arguments, **{"PYTHON": python} | changes)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert message in done.stderr


def test_the_layers_of_the_block_stage_are_cases_with_its_peers():
    text = SCRIPT.read_text()
    layers, peers = re.findall(r"layer='(.+)'", text), re.findall(r'--case "\$layer" --peers (.+)', text)
    assert (len(layers), len(peers)) == (2, 2)
    for layer in layers:
        (case,) = (case for case in all_cases() if layer in case.name)
        assert {*" ".join(peers).split()} < {provider.name for provider in case.providers}


def test_a_stage_runs_from_the_sources_and_with_the_wheels_that_pip_takes(tmp_path):
    """The wheel's module is one that every Python imports as it starts."""
    before = {*(ROOT / "phi1").iterdir(), ROOT / "phi1" / "__pycache__"}
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "sitecustomize-9.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("sitecustomize.py", f"open({str(tmp_path / 'imported')!r}, 'w').close()\n")
        wheel.writestr("sitecustomize-9.0.dist-info/METADATA",
                       "Metadata-Version: 2.1\nName: sitecustomize\nVersion: 9.0\n")
        wheel.writestr("sitecustomize-9.0.dist-info/WHEEL",
                       "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("sitecustomize-9.0.dist-info/RECORD", "")
    (wheels / "cut_short-9.0-py3-none-any.whl").write_text("PK")
    (wheels / "torch-9.0-py3-none-any.whl").write_text("installed, so it is not looked at")
    done = gpu_sh(tmp_path, "--rehearse", "tune", WHEELS=str(wheels))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == f"results in {tmp_path / 'out'}"
    assert "nothing was run" in (tmp_path / "out" / "tune" / "list.log").read_text()
    assert (tmp_path / "imported").exists()
    assert "cut" in done.stderr
    assert "torch" not in done.stderr
    assert set((ROOT / "phi1").iterdir()) <= before
    assert not list((tmp_path / "tmp").glob("tmp.*"))


def test_a_relative_python_is_that_of_the_folder_where_the_script_was_called(tmp_path):
    executable(tmp_path / "bin" / "python", PYTHON.format(command='echo "$0"'))
    done = subprocess.run([SCRIPT, "tune"], cwd=tmp_path, capture_output=True, text=True,
                          env=variables(tmp_path, PYTHON="bin/python"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out/tune/list.log").read_text() == f"{tmp_path}/bin/python\n"


def test_what_loses_the_gpu_goes_on_with_the_minutes_that_are_left(tmp_path):
    tried = tmp_path / "tried"
    python = executable(tmp_path / "python", PYTHON.format(
        command=f'case "$*" in *dry-run*) ;; *) echo "${{@: -1}}" >> {tried}; sleep 1.1; '
                f'exit $((3 * ($(wc -l < {tried}) < 3))) ;; esac'))
    assert gpu_sh(tmp_path, "tune", PYTHON=python).returncode == 0
    minutes = [float(line) for line in tried.read_text().split()]
    assert len(minutes) == 3
    assert 6.0 < minutes[2] < minutes[1] < minutes[0] <= 7.2, "four fifths of nine minutes"


def test_all_stages_of_a_call_have_nine_minutes(tmp_path):
    """The clock of bash goes on from SECONDS."""
    python = executable(tmp_path / "python", PYTHON.format(command="echo ran"))
    done = gpu_sh(tmp_path, "kernels", PYTHON=python, SECONDS="535")
    assert done.returncode == 1
    assert done.stderr == "gpu.sh: failed: kernels/quick\n", "the long selection ends with the time"
    assert "-- kernels quick: exit code 124, 0 s\n-- kernels all: exit code 124, 0 s\n" in done.stdout


def test_a_failure_is_shown_and_named(tmp_path):
    python = executable(tmp_path / "python", PYTHON.format(command="echo the reason; exit 1"))
    done = gpu_sh(tmp_path, "tune", PYTHON=python)
    assert done.returncode == 1
    assert done.stderr == "gpu.sh: failed: tune/list tune/search\n"
    assert "-- tune search: exit code 1, 0 s\nthe reason\n" in done.stdout


def test_a_command_that_takes_too_long_is_killed_with_all_that_it_began(tmp_path):
    pids = tmp_path / "pids"
    python = executable(tmp_path / "python", PYTHON.format(command=STUBBORN.format(pids=pids)))
    executable(tmp_path / "bin" / "timeout", SHORT)
    done = gpu_sh(tmp_path, "kernels", PYTHON=python, PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    assert done.returncode == 1
    assert "-- kernels quick: exit code 137" in done.stdout
    assert "begun" in done.stdout
    numbers = [int(pid) for pid in pids.read_text().split()]
    assert len(numbers) == 4, "of two commands"
    wait_until(lambda: not any(map(alive, numbers)))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_script_leaves_no_child(tmp_path, number):
    pids = tmp_path / "pids"
    python = executable(tmp_path / "python", PYTHON.format(command=STUBBORN.format(pids=pids)))
    script = subprocess.Popen([SCRIPT, "tune"], env=variables(tmp_path, PYTHON=python), stdout=subprocess.DEVNULL)
    wait_until(lambda: pids.exists() and len(pids.read_text().split()) == 2)
    second = gpu_sh(tmp_path, "profile", PYTHON=python)
    assert second.returncode == 2
    assert f"another gpu.sh writes to {tmp_path / 'out'}: wait until it ends" in second.stderr
    script.send_signal(number)
    assert script.wait(60) == 128 + number
    wait_until(lambda: not any(alive(int(pid)) for pid in pids.read_text().split()))
    assert not list((tmp_path / "tmp").glob("tmp.*")), "the temporary folder is gone"
