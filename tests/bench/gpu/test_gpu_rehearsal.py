"""bench/gpu.sh: what it refuses, what it takes from wheels, that a stage keeps its time. CI rehearses every stage."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from training_runs import alive, wait_until

from phi1.bench.cases.registry import all_cases
from phi1.bench.cli import parse, plain_parser
from phi1.bench.gpu import commands as gpu_commands
from phi1.bench.gpu import stages
from phi1.bench.gpu.commands import Command

ROOT = Path(__file__).parents[3]
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
        (["decode"], {"CUDA_VISIBLE_DEVICES": ""}, "finds no CUDA device; --rehearse runs on a CPU"),
    ],
)
def test_wrong_use_ends_in_one_line(arguments, environment, message, tmp_path):
    done = gpu_sh(*arguments, OUT=str(tmp_path), **environment)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert message in done.stderr


def test_absent_are_the_wheels_that_are_not_installed(tmp_path):
    for name in ("torch-9.0-cp312-cp312-any", "no_such_peer-1.0-py3-none-any", "no_such_peer-1.1-py3-none-any"):
        (tmp_path / f"{name}.whl").touch()
    done = subprocess.run([sys.executable, stages.__file__, "--absent", str(tmp_path), "tune"], capture_output=True)
    assert done.stdout == b"no-such-peer\n", done.stderr


@pytest.mark.parametrize("name", [gpu_commands.LAYER, gpu_commands.SMALL_LAYER])
def test_the_layer_of_the_figure_is_a_case_with_its_peers(name):
    (case,) = (case for case in all_cases() if name in case.name)
    peers = {*gpu_commands.LAYER_PEERS, *gpu_commands.TUNED_AGAIN}
    assert peers < {provider.name for provider in case.providers}


def test_a_stage_runs_from_the_source_tree_and_leaves_it_clean(tmp_path):
    before = set((ROOT / "phi1").iterdir())
    done = gpu_sh("--rehearse", "tune", OUT=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == f"results in {tmp_path / 'tune'}"
    assert "nothing was run" in (tmp_path / "tune" / "list.log").read_text()
    assert set((ROOT / "phi1").iterdir()) == before


@pytest.mark.parametrize(("stage", "name"), [("tune", "search"), ("block", "all")])
def test_what_loses_the_gpu_goes_on_in_another_process(tmp_path, monkeypatch, capsys, stage, name):
    counts = "import sys, pathlib; log = pathlib.Path('tried'); log.open('a').write(sys.argv[-1] + '\\n')\n"
    search = Command(name, ("-c", counts + "sys.exit(3 * (len(log.read_text().split()) < 3))"), 400, minutes=8.0)
    monkeypatch.setattr(stages, "commands", lambda *_: [search])
    assert stages.run_stage(stage, tmp_path, rehearse=False) == 0
    minutes = [float(line) for line in (tmp_path / stage / "tried").read_text().split()]
    assert len(minutes) == 3
    assert 5.0 < minutes[2] <= minutes[0] == 6.17
    assert f"{name}++ " in capsys.readouterr().out


def test_what_loses_the_gpu_has_its_own_time_alone(tmp_path, monkeypatch):
    seconds = []

    def run(command, folder, left):
        seconds.append(command.seconds)
        return stages.Row(command.name, "exit 3", 90.5, [])

    monkeypatch.setattr(stages, "run", run)
    monkeypatch.setattr(stages, "commands", lambda *_: [Command("max", (), 185, minutes=2.5)])
    assert stages.run_stage("block", tmp_path, rehearse=False) == 0
    assert seconds == [185, 94]


def test_a_stage_has_nine_minutes_from_the_call_of_the_script_or_the_end_of_another(tmp_path, monkeypatch):
    limits = []

    def run(command, folder, seconds):
        limits.append(seconds)
        return stages.Row(command.name, "ok", 0.0, [])

    monkeypatch.setattr(stages, "run", run)
    monkeypatch.setattr(stages, "commands", lambda *_: [Command("one", ())])
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    began = str(time.time() - 200)
    monkeypatch.setattr(sys, "argv", ["", "tune", "profile", "--out", str(tmp_path), "--began", began])
    assert stages.main() == 0
    assert limits[0] <= 540 - 200 - stages.END_SECONDS < limits[1] <= 540 - stages.END_SECONDS
    assert stages.END_SECONDS > 2 * stages.LAST_WORDS_SECONDS


def count_time_from(happened, monkeypatch):
    """The limits of a command run from here on: its interpreters may take as long as they like to start."""
    class Process(subprocess.Popen):
        def wait(self, timeout=None):
            if timeout is not None:
                wait_until(happened)
            return super().wait(timeout)

    monkeypatch.setattr(subprocess, "Popen", Process)


def test_a_stage_is_not_run_twice_at_once_in_a_folder(tmp_path, monkeypatch, capsys):
    meanwhile = []

    def run(command, folder, seconds):
        if not meanwhile:
            meanwhile.append(folder)
            meanwhile.extend(stages.run_stage(stage, tmp_path, rehearse=True) for stage in ("tune", "profile"))
        return stages.Row(command.name, "ok", 0.0, [])

    monkeypatch.setattr(stages, "run", run)
    assert stages.run_stage("tune", tmp_path, rehearse=True) == 0
    assert meanwhile[1:] == [2, 0]
    assert capsys.readouterr().err == (f"gpu.sh: error: stage tune is running already in {tmp_path / 'tune'}: wait "
                                       "until it ends, or set another OUT\n")
    assert stages.run_stage("tune", tmp_path, rehearse=True) == 0


def test_a_command_that_takes_too_long_is_killed_with_its_children(tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "LAST_WORDS_SECONDS", 1)
    pid_file = tmp_path / "pid"
    count_time_from(lambda: pid_file.exists() and pid_file.read_text(), monkeypatch)
    child = f"import os, time; open({str(pid_file)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    parent = ("import signal, subprocess, sys; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
              f"print('begun', flush=True); subprocess.run([sys.executable, '-c', {child!r}])")
    row = stages.run(Command("slow", ("-c", parent), 1), tmp_path, 100)
    assert row.seconds < 300, "it was waited for"
    assert (row.outcome, row.last) == ("time out", ["begun"])
    assert not alive(int(pid_file.read_text())), "it could still write"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_command_does_not_outlive_a_signal_that_comes_while_it_starts(tmp_path, monkeypatch, number):
    started = []

    class Process(subprocess.Popen):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            started.append(self)
            signal.raise_signal(number)

    monkeypatch.setattr(subprocess, "Popen", Process)
    before = signal.signal(number, lambda number, frame: sys.exit(128 + number))
    try:
        with pytest.raises(SystemExit):
            stages.run(Command("begun", ("-c", "import time; time.sleep(600)")), tmp_path, 100)
    finally:
        signal.signal(number, before)
    assert [process.returncode for process in started] == [-signal.SIGKILL]


TESTS = """
import time

def test_wrong():
    seven = 7
    assert seven == 8

def test_long():
    time.sleep(600)
"""


@pytest.mark.slow
def test_tests_that_take_too_long_leave_the_failures_so_far(tmp_path, monkeypatch):
    log = tmp_path / "tests.log"
    monkeypatch.setattr(stages, "LAST_WORDS_SECONDS", 60)
    count_time_from(lambda: "test_long" in log.read_text(), monkeypatch)
    (tmp_path / "test_it.py").write_text(TESTS)
    row = stages.run(Command("tests", (*gpu_commands.PYTEST, "test_it.py"), 1), tmp_path, 100)
    assert row.outcome == "time out"
    begun, ended = log.read_text().split("test_it.py::test_long", 1)
    assert "assert 7 == 8" in begun, "at once, as what follows may not end"
    assert "FAILED test_it.py::test_wrong" in ended
    assert row.last[-1].endswith("KeyboardInterrupt)") or "1 failed" in row.last[-1]


@pytest.mark.slow
def test_a_terminated_script_ends_what_it_runs(tmp_path):
    variables = os.environ | {"PYTHON": sys.executable, "OUT": str(tmp_path), "TMPDIR": str(tmp_path)}
    script = subprocess.Popen([SCRIPT, "--rehearse", "train"], env=variables, stdout=subprocess.DEVNULL)
    log = tmp_path / "train" / "search.log"
    wait_until(log.is_file)
    script.terminate()
    assert script.wait(300) == 143
    wait_until(lambda: not any(str(tmp_path) in line for line in command_lines()))
    assert [path.name for path in tmp_path.iterdir()] == ["train"], "the temporary folder is gone"


def command_lines():
    """Of every process that runs."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            yield (folder / "cmdline").read_text()
        except OSError:
            continue


def test_no_command_starts_when_the_time_is_up_and_a_missing_program_is_skipped(tmp_path):
    assert stages.run(Command("late", ("-c", "print(1)")), tmp_path, 5).outcome == "no time"
    skipped = stages.run(Command("tool", ("no-such-tool",), program="no-such-tool"), tmp_path, 100)
    assert (skipped.outcome, skipped.last) == ("skipped", ["no-such-tool is not installed"])


@pytest.mark.parametrize(("code", "expected"), [(0, 0), (3, 1)])
def test_the_table_is_last_and_a_failure_shows(monkeypatch, tmp_path, capsys, code, expected):
    command = Command("one", ("-c", f"print('the result'); raise SystemExit({code})"))
    monkeypatch.setattr(stages, "commands", lambda *arguments: [command])
    assert stages.run_stage("tune", tmp_path, True) == expected
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].split()[:2] == ["one", "ok" if code == 0 else "exit"]
    assert lines[-2].endswith("the result")


@pytest.mark.parametrize("stage", list(gpu_commands.NEEDS))
@pytest.mark.parametrize("rehearse", [True, False])
def test_every_stage_names_scripts_that_are_there(stage, rehearse, tmp_path):
    commands = gpu_commands.commands(stage, tmp_path, rehearse)
    assert commands
    for command in commands:
        assert (command.words[-1] == "--minutes") == bool(command.minutes), "which the time left completes"
        if "bench" in command.words:
            options = parse([*command.words[3:], *["1"] * bool(command.minutes)], plain_parser)
            assert options.device == ("cpu" if rehearse else "cuda")
        for word in command.words:
            if word.endswith(".py"):
                assert Path(word).is_file(), word
