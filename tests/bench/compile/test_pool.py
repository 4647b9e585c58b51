"""The processes that compile end with the one that asks, and what kills one is reported."""

import contextlib
import os
import signal
import subprocess
import sys
import threading

import pytest

if sys.platform != "linux" or os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("Triton compiles on Linux, and not in its interpreter", allow_module_level=True)

from training_runs import injected, wait_until

from phi1.bench.compile import pool


def test_a_compiler_that_kills_its_process_is_reported_and_the_rest_goes_on(monkeypatch):
    monkeypatch.setattr(pool, "_measure", os._exit)  # called with the job: an exit code
    found = list(pool.compile_all([3, 4, 5], processes=2))
    assert sorted(job for job, _ in found) == [3, 4, 5]
    assert {report.error for _, report in found} == {"the compiler crashed"}


def test_a_mistake_of_ours_in_a_process_is_raised(monkeypatch):
    monkeypatch.setattr(pool, "_measure", int)
    with pytest.raises(ValueError, match="invalid literal for int"):
        list(pool.compile_all(["no number"], processes=2))


def test_what_nobody_waits_for_any_more_is_not_compiled(monkeypatch, tmp_path):
    monkeypatch.setattr(pool, "_measure", exec)
    jobs = [f"open({str(tmp_path / str(i))!r}, 'w'); import time; time.sleep(0.02)" for i in range(20)]
    before = set(threading.enumerate())
    found = pool.compile_all(jobs, processes=1)
    next(found)
    found.close()
    wait_until(lambda: set(threading.enumerate()) <= before)
    assert len(list(tmp_path.iterdir())) <= 3


COMPILES = """import signal, sys, time
from phi1.bench.compile import pool

def stop(number, frame):  # a shell lets its background processes ignore it
    time.sleep(float(sys.argv[1]))
    signal.default_int_handler(number, frame)

signal.signal(signal.SIGINT, stop)
pool._measure = exec
try:
    list(pool.compile_all([f"open('begun{i}', 'w'); import time; time.sleep(600)" for i in range(3)]))
except KeyboardInterrupt:
    sys.exit(130)"""
STARTS_SLOWLY = """import os, sys, time
if "--multiprocessing-fork" in sys.orig_argv:
    open(f"begun{os.getpid()}", "w")
    while not os.path.exists("released"):
        time.sleep(0.02)
"""


@pytest.mark.parametrize(("stop", "late", "hook", "code"), [
    (lambda process: os.killpg(process.pid, signal.SIGINT), 0, "", 130),  # as a terminal does
    (lambda process: os.killpg(process.pid, signal.SIGINT), 0.3, "", 130),
    (lambda process: os.killpg(process.pid, signal.SIGINT), 0, STARTS_SLOWLY, 130),
    (lambda process: process.kill(), 0, "", -9),
], ids=["Ctrl-C", "Ctrl-C, of which they hear first", "Ctrl-C as they start", "kill"])
def test_the_processes_that_compile_end_quietly_with_the_one_that_asks(tmp_path, stop, late, hook, code):
    place = tmp_path / "place"
    place.mkdir()
    process = subprocess.Popen([sys.executable, "-c", COMPILES, f"{late}"], cwd=place, stderr=subprocess.PIPE,
                               text=True, start_new_session=True, env=os.environ | injected(tmp_path / "hook", hook))
    try:
        wait_until(lambda: len(list(place.iterdir())) == 2)
        stop(process)
        (place / "released").touch()
        said = process.communicate(timeout=300)[1]  # until all have closed it, those that it started as well
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert "Traceback" not in said
    assert process.returncode == code
    assert not (place / "begun2").exists(), "another has begun"
