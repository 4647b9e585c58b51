"""What bench/gpu.sh and its stages have begun ends with them, whenever they are stopped."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from training_runs import alive, wait_until, write_files

from phi1.bench.gpu import stages
from phi1.bench.gpu.stages import Command
from phi1.bench.harness.processes import end_session

SCRIPT = Path(__file__).parents[3] / "bench" / "gpu.sh"

if sys.platform != "linux":
    pytest.skip("the script is for Linux", allow_module_level=True)

IN_A_GROUP_OF_ITS_OWN = """import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {child!r}], process_group=0)
print(child.pid, flush=True)
{then}
"""


def test_a_command_leaves_no_process_in_another_group(tmp_path):
    """As the processes that tokenise are."""
    code = IN_A_GROUP_OF_ITS_OWN.format(child="import time; time.sleep(600)", then="")
    row = stages.run(Command("parent", ("-c", code)), tmp_path, 100)
    assert row.outcome == "ok"
    assert not alive(int(row.last[0])), "it could still write"


BEGINS_MORE = """import subprocess, time
while True:
    print(subprocess.Popen(["sleep", "600"], process_group=0).pid, flush=True)
    time.sleep(0.01)
"""


def test_what_a_process_begins_while_it_is_killed_ends_as_well(tmp_path, monkeypatch):
    log = tmp_path / "log"

    def kill_later(pid, number, kill=os.kill):
        count = len(log.read_text().splitlines())
        wait_until(lambda: len(log.read_text().splitlines()) > count or not alive(process.pid))
        kill(pid, number)

    with log.open("w") as file:
        process = subprocess.Popen([sys.executable, "-c", BEGINS_MORE], stdout=file, start_new_session=True)
    wait_until(log.read_text)
    monkeypatch.setattr(os, "kill", kill_later)
    end_session(process, 300)
    assert process.returncode == -signal.SIGKILL
    assert not any(alive(int(pid)) for pid in log.read_text().split())


PYTHON = """#!/usr/bin/env bash
case "$*" in *"--out"*) exec sleep 600 ;; esac
"""
# bash reads it before the script, and does what DEBUG says before each command.
STOPPED_BEFORE = """
trap 'case "$BASH_COMMAND" in "running=\\$!") kill -TERM $$ ;; esac' DEBUG
"""


def test_a_script_terminated_before_it_knows_the_stages_number_ends_it(tmp_path):
    write_files(tmp_path, {"python": PYTHON, "hook": STOPPED_BEFORE})
    (tmp_path / "python").chmod(0o755)
    variables = os.environ | {"PYTHON": str(tmp_path / "python"), "OUT": str(tmp_path / "out"),
                              "BASH_ENV": str(tmp_path / "hook")}
    script = subprocess.Popen([SCRIPT, "tune"], env=variables, start_new_session=True)
    try:
        assert script.wait(300) == 128 + signal.SIGTERM
        with pytest.raises(ProcessLookupError):  # nothing of it is left
            os.killpg(script.pid, 0)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(script.pid, signal.SIGKILL)


def test_a_temporary_folder_that_cannot_be_removed_is_no_failure(tmp_path):
    write_files(tmp_path, {"python": "#!/usr/bin/env bash\n", "bin/rm": "#!/usr/bin/env bash\nexit 1\n"})
    for name in ("python", "bin/rm"):
        (tmp_path / name).chmod(0o755)
    variables = os.environ | {"PYTHON": str(tmp_path / "python"), "OUT": str(tmp_path / "out"), "TMPDIR": str(tmp_path),
                              "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    assert subprocess.run([SCRIPT, "tune"], env=variables).returncode == 0


def test_a_rehearsal_has_five_times_as_long(tmp_path, monkeypatch):
    limits = []

    def run(command, folder, seconds):
        limits.append((command.seconds, seconds))
        return stages.Row(command.name, "ok", 0.0, [])

    monkeypatch.setattr(stages, "run", run)
    monkeypatch.setattr(stages, "commands", lambda *_: [Command("one", (), 60)])
    for rehearse in (False, True):
        stages.run_stage("tune", tmp_path, rehearse)
    assert [seconds for seconds, _ in limits] == [60, 300]
    assert limits[0][1] <= stages.STAGE_SECONDS < limits[1][1] <= 5 * stages.STAGE_SECONDS
