"""Programs that a model has written: their results, and the limits that protect the process that runs them."""

import errno
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from training_runs import alive, wait_until

from phi1.evaluate.execute import PASSED, TIMED_OUT, execute

ENOUGH = 120.0  # seconds, on a machine that does other things as well


@pytest.mark.parametrize(("program", "result"), [
    ("assert 1 + 1 == 2\n", PASSED),
    ("print('x' * 10**6)\nimport math, random, re, typing", PASSED),
    ("assert 1 + 1 == 3", "failed: AssertionError: "),
    ("def f(:", "failed: SyntaxError: invalid syntax (program, line 1)"),
    ("raise KeyError('é\\n' * 400)", "failed: KeyError: "),
    ("raise KeyboardInterrupt", "failed: KeyboardInterrupt: "),
    ("import sys; sys.exit(0)", "failed: SystemExit: 0"),
    ("import os; os._exit(0)", "ended early, with exit code 0"),
    ("import ctypes; ctypes.string_at(0)", "ended early, by SIGSEGV"),
    ("import torch", "failed: ModuleNotFoundError: No module named 'torch'"),
    ("assert input() == ''", "failed: EOFError: EOF when reading a line"),
    ("from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass A:\n    v: int\n"
     "assert A(1).v == 1", PASSED),
    ("# -*- coding: latin-1 -*-\nassert len('é') == 1", PASSED),
    ("import os; assert not {'HOME', 'PATH', 'PYTHONPATH'} & os.environ.keys()", PASSED),
])
def test_a_program_passes_only_by_coming_to_its_end(program, result):
    found = execute(program, ENOUGH)
    assert found.startswith(result.rstrip())
    assert len(found) <= 320
    assert "\n" not in found


@pytest.mark.parametrize("program", ["while True: pass", "import time\nwhile True:\n    try: time.sleep(60)\n"
                                     "    except BaseException: pass"])
def test_an_endless_loop_ends(program):
    assert execute(program, 0.5) == TIMED_OUT


@pytest.mark.parametrize(("seconds", "number", "result"), [
    (0.1, signal.SIGKILL, TIMED_OUT), (ENOUGH, signal.SIGKILL, "ended early, by SIGKILL"),
    (0.1, signal.SIGSEGV, "ended early, by SIGSEGV"),
])
def test_a_program_killed_after_its_time_has_timed_out(seconds, number, result, monkeypatch):
    """The limit of CPU time may end the program while the process that runs it is delayed."""
    communicate = subprocess.Popen.communicate
    monkeypatch.setattr(subprocess.Popen, "communicate", lambda process, given, timeout: communicate(process, given))
    assert execute(f"import os, time\ntime.sleep(0.1)\nos.kill(os.getpid(), {number:d})", seconds) == result


@pytest.mark.parametrize("ending", ["", "assert False"])
def test_a_folder_of_two_thousand_levels_neither_ends_the_command_nor_stays(ending, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    found = execute(f"import os\nfor _ in range(2000): os.mkdir('d'); os.chdir('d')\n{ending}", ENOUGH)
    assert found == ("failed: AssertionError:" if ending else PASSED)
    assert not list(tmp_path.iterdir())


def test_memory_and_files_have_limits():
    assert execute("x = bytearray(1 << 29)", ENOUGH, memory=1 << 28).startswith("failed: MemoryError")
    assert execute("open('big', 'wb').write(bytes(1 << 25))", ENOUGH).startswith("failed: OSError")


def test_the_network_is_out_of_reach_where_the_system_has_user_namespaces():
    if not shutil.which("unshare") or subprocess.run(["unshare", "-U", "-n", "true"], capture_output=True).returncode:
        pytest.skip("this system gives no namespaces to a user")
    with socket.create_server(("127.0.0.1", 0)) as server:
        found = execute(f"import socket\nsocket.create_connection({server.getsockname()!r}, timeout=5)", ENOUGH)
    assert found == "failed: OSError: [Errno 101] Network is unreachable"


@pytest.mark.parametrize(("owner", "name"), [(tempfile, "TemporaryDirectory"), (subprocess, "Popen"), (os, "pipe")])
def test_a_system_that_gives_nothing_is_a_result(owner, name, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(owner, name, full)
    assert execute("pass", ENOUGH) == "not run: OSError: [Errno 28] No space left on device"


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone kills a process with its parent")
def test_a_program_dies_with_who_runs_it(tmp_path):
    there = tmp_path / "child"
    program = f"import os, time\nopen({str(there)!r}, 'w').write(f'{{os.getpid()}}\\n')\ntime.sleep(600)"
    code = f"from phi1.evaluate.execute import execute\nexecute({program!r}, 600)"
    runner = subprocess.Popen([sys.executable, "-c", code])
    wait_until(lambda: there.exists() and there.read_text().endswith("\n"))
    runner.kill()
    runner.wait()
    wait_until(lambda: not alive(int(there.read_text())))


def test_files_and_processes_do_not_outlive_it(tmp_path):
    program = f"""
import os, sys, time
open({str(tmp_path / "where")!r}, "w").write(os.getcwd())
open("left", "w").write("behind")
child = os.fork()
if child == 0:
    time.sleep(600)
open({str(tmp_path / "child")!r}, "w").write(str(child))
"""
    result = execute(program, ENOUGH)
    assert not Path((tmp_path / "where").read_text()).exists()
    if os.geteuid():  # RLIMIT_NPROC does not bind root
        assert result.startswith("failed: BlockingIOError")
        return
    assert result == PASSED
    wait_until(lambda: not alive(int((tmp_path / "child").read_text())))
