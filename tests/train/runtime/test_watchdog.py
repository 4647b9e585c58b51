"""The heartbeat, and the end of what hangs; the run's provenance and its MFU."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from training_runs import wait_until

import phi1.kernels
from phi1.train.metrics.mfu import Mfu
from phi1.train.recipe.file import read_recipe
from phi1.train.run import build as build_module
from phi1.train.run import run as run_module
from phi1.train.run.folder import RunFolder
from phi1.train.run.start import Start
from phi1.train.runtime import provenance
from phi1.train.runtime import watchdog as watch_module
from phi1.train.runtime.engine import Engine
from phi1.train.runtime.launch import Rank, RunError
from phi1.train.runtime.provenance import changed, commit, versions
from phi1.train.runtime.watchdog import HUNG, Watchdog

BASE = read_recipe(Path(__file__).parents[3] / "train" / "configs" / "phi1-base.toml", {})


def look_on(watchdog, looks, between):
    """What the watchdog's thread does, with something that is done between its looks in place of pauses."""
    over = iter([False] * (looks - 1) + [True])

    def wait(pause):
        between()
        return next(over)

    watchdog._over = SimpleNamespace(wait=wait)
    watchdog._look_on()


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
    assert done.returncode == HUNG
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


@pytest.mark.parametrize("hangs", ["connect_processes", "open_on_all_ranks", "make_trainer"])
def test_a_process_that_hangs_before_the_first_step_is_found(tmp_path, monkeypatch, hangs):
    said = []

    def hang(*_, **__):
        end = time.monotonic() + 60
        while not said and time.monotonic() < end:
            time.sleep(0.01)
        raise RunError("enough")

    monkeypatch.setattr(watch_module, "_end", said.append)
    monkeypatch.setattr(build_module, "connect_processes", lambda *_: None)
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


def test_what_changed_between_two_starts():
    before = {"train": {"lr": 1e-3, "steps": 10}, "run": {"folder": "a"}}
    now = {"train": {"lr": 1e-3, "steps": 20, "clip": 1.0}}
    assert changed(before, now) == {"run.folder": ["a", None], "train.clip": [None, 1.0], "train.steps": [10, 20]}
    assert changed(now, now) == {}


def test_versions_and_commit_are_those_of_this_process():
    assert versions()["torch"] == torch.__version__
    head = commit()
    assert head is None or len(head.removesuffix("+changes")) >= 7


@pytest.mark.parametrize("name", ["new.py", "tuned/op.json", "tuned/gpus/one.json"])
def test_a_change_of_the_code_is_another_environment(tmp_path, monkeypatch, name):
    def now():
        provenance.sources.cache_clear()
        return Engine(torch.device("cpu"), "fp32", 1, 1).environment()["phi1"]

    monkeypatch.setattr(phi1.kernels, "__path__", [str(tmp_path)])
    found = [now(), now()]
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    for text in ("1", "2"):
        path.write_text(text)
        found.append(now())
    path.rename(path.with_stem("renamed"))
    found.append(now())
    provenance.sources.cache_clear()
    assert found[0] == found[1]
    assert len(set(found)) == 4


def test_the_cpu_is_more_than_its_architecture():
    assert torch.backends.cpu.get_cpu_capability() in provenance.cpu()
    assert provenance.cpu().split()[0] not in ("", torch.backends.cpu.get_cpu_capability())


def test_a_repository_around_an_installation_is_not_its_commit(tmp_path, monkeypatch):
    inside = tmp_path / "venv" / "provenance.py"
    inside.parent.mkdir()
    inside.write_text("")
    commands = "init -q", "-c user.name=a -c user.email=a@b commit -q --allow-empty -m a"
    for words in map(str.split, commands):
        subprocess.run(["git", "-C", tmp_path, *words], check=True)
    monkeypatch.setattr(provenance, "__file__", str(inside))
    assert commit() is None
    subprocess.run(["git", "-C", tmp_path, "add", inside], check=True)
    assert commit()


@pytest.mark.parametrize(("precision", "expected"), [("fp16", 0.505), ("fp32", 0.505 * 312 / 19.5)])
def test_mfu_of_a_known_gpu_and_of_none(monkeypatch, precision, expected):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    engine = Engine(torch.device("cuda", 0), precision, 1, 8)
    found = Mfu.of_run(BASE.phi1_config(), BASE.data.seq_len, engine).of(8 * 0.505 * 312e12 / 9.0884e9)
    assert found["mfu"] == pytest.approx(expected, rel=1e-3)
    assert found["mfu_causal"] == pytest.approx(expected * 8.484 / 9.088, rel=1e-3)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    assert Mfu.of_run(BASE.phi1_config(), BASE.data.seq_len, engine).of(1e5) == {}
    assert Mfu.of_run(BASE.phi1_config(), BASE.data.seq_len, Engine(torch.device("cpu"), "fp32", 2, 1)).of(1e5) == {}
