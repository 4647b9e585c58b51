"""The heartbeat file, and the end of a process that hangs."""

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from training_runs import wait_until

from phi1.train.recipe.file import read_recipe
from phi1.train.run import build as build_module
from phi1.train.run import run as run_module
from phi1.train.run.folder import RunFolder
from phi1.train.run.start import Start
from phi1.train.runtime import watchdog as watch_module
from phi1.train.runtime.engine import Engine
from phi1.train.runtime.launch import GO_ON, Rank, RunError
from phi1.train.runtime.watchdog import Watchdog


def look_on(watchdog, looks, between):
    """Run the loop of the watchdog's thread for some looks, and call `between` in place of each pause."""
    over = iter([False] * (looks - 1) + [True])

    def wait(pause):
        between()
        return next(over)

    watchdog._over = SimpleNamespace(wait=wait)
    watchdog._watch()


def test_silence_beyond_the_limit_is_reported_with_rank_and_place():
    said = []
    watchdog = Watchdog(3, 0.2, end=said.append)
    watchdog.report("step 7")
    with watchdog:
        wait_until(lambda: said)
    assert said[0].startswith("rank 3 has been in step 7 for 0 s, where run.watchdog allows 0.2: it hangs, or waits")


def test_reports_keep_it_quiet_and_so_does_no_limit():
    said = []
    watchdog = Watchdog(0, 0.5, end=said.append)
    look_on(watchdog, 10, lambda: watchdog.report("a batch of the evaluation"))  # time and again the same
    look_on(Watchdog(0, 0, end=said.append), 10, lambda: None)
    assert said == []
    look_on(watchdog, 10, lambda: None)
    assert said


def test_the_heartbeat_says_what_the_process_does(tmp_path):
    path = tmp_path / "heartbeat.json"
    with Watchdog(0, 1.0, path, end=[].append) as watchdog:
        watchdog.report("step 12")
        wait_until(lambda: path.exists() and json.loads(path.read_text())["doing"] == "step 12")
    last = json.loads(path.read_text())
    assert set(last) == {"time", "pid", "doing", "for_seconds"}
    assert last["doing"] == "ended"
    assert list(tmp_path.iterdir()) == [path]


def test_a_heartbeat_that_cannot_be_written_does_not_matter(tmp_path):
    with Watchdog(0, 0, tmp_path / "nosuch" / "heartbeat.json", end=[].append):
        pass


def test_a_process_that_hangs_ends_with_its_stack():
    code = ("import sys, time\nsys.argv = ['train/finetune.py']\nfrom phi1.train.runtime.watchdog import Watchdog\n"
            "def wait_for_nothing():\n    time.sleep(60)\n"
            "watchdog = Watchdog(1, 0.3)\nwatchdog.report('step 2')\nwith watchdog:\n    wait_for_nothing()\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == GO_ON
    assert done.stderr.startswith("finetune: error: rank 1 has been in step 2 for ")
    assert "where run.watchdog allows 0.3: it hangs, or waits for a rank that does; its threads:" in done.stderr
    assert "in wait_for_nothing" in done.stderr


def test_a_process_that_was_suspended_is_not_one_that_hangs():
    code = ("import os, signal, time\nfrom phi1.train.runtime.watchdog import Watchdog\nwith Watchdog(0, 1.0):\n"
            "    time.sleep(0.1)\n    os.kill(os.getpid(), signal.SIGSTOP)\n    time.sleep(0.1)\n")
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    _, status = os.waitpid(process.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    time.sleep(1.2)
    process.send_signal(signal.SIGCONT)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err


@pytest.mark.parametrize("hangs", ["meet", "open_on_all_ranks", "make_trainer"])
def test_a_process_that_hangs_before_the_first_step_is_found(tmp_path, monkeypatch, hangs):
    said = []

    def hang(*_, **__):
        end = time.monotonic() + 60
        while not said and time.monotonic() < end:
            time.sleep(0.01)
        raise RunError("enough")

    monkeypatch.setattr(watch_module, "_end", said.append)
    monkeypatch.setattr(build_module, "meet", lambda *_: (Engine(torch.device("cpu"), "fp32", 1, 1), {}))
    monkeypatch.setattr(RunFolder, "check_shared", lambda *_: None)
    monkeypatch.setattr(build_module, "open_on_all_ranks", lambda *_: (None, None, None))
    monkeypatch.setattr(build_module, hangs, hang)
    recipe, folder = read_recipe(None, {"run.watchdog": "0.2", "run.device": "cpu"}), RunFolder(tmp_path)
    threads = torch.get_num_threads()
    try:
        with pytest.raises(RunError, match="enough"):
            run_module.run(recipe, folder, Rank(), None, Start())
    finally:
        torch.set_num_threads(threads)
    assert said
    assert said[0].startswith("rank 0 has been in the start for 0 s, where run.watchdog allows 0.2: it hangs")
    assert json.loads(folder.heartbeat.read_text())["doing"] == "ended by enough"
