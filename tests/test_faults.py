"""What happens to a run of two processes when things go wrong: real processes, really killed, stopped and restarted.

Each fault must end with the weights and the ledger of the run that nothing disturbed. At the end a table of faults,
outcomes and seconds lost is printed: `pytest --slow tests/test_faults.py`.
"""

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest

from phi1.train import testing
from phi1.train.testing import evaluations, make_corpus, steps, wait_for, weights

pytestmark = pytest.mark.slow

CHANGES = {"train__steps": 66, "eval__every": 30, "eval__sequences": 64, "eval__completions": 0, "run__watchdog": 4}
LAUNCHER = ("--max-restarts", "1", "--shutdown-timeout", "2")
TABLE = []


@pytest.fixture(scope="module")
def place(tmp_path_factory, request):
    folder = tmp_path_factory.mktemp("faults")
    make_corpus(folder, val_fraction=0.2)
    yield folder
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        width = max((len(fault) for fault, _, _ in TABLE), default=0)
        print(f"\n\n{'fault':<{width}}  seconds lost  outcome")
        for fault, lost, outcome in TABLE:
            print(f"{fault:<{width}}  {lost:12.1f}  {outcome}")


@pytest.fixture(scope="module")
def undisturbed(place):
    """Seconds that a run takes where nothing happens."""
    began = time.monotonic()
    process = start(place, "whole")
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return time.monotonic() - began


def start(place, run):
    return testing.start(place, run, 2, launcher=LAUNCHER, **CHANGES)


def worker(process, rank):
    """The process id of a rank, by its environment."""
    for status in Path("/proc").glob("[0-9]*/environ"):
        try:
            environment = status.read_bytes().split(b"\0")
            parent = int((status.parent / "stat").read_text().rsplit(") ", 1)[1].split()[1])
        except (OSError, IndexError):
            continue
        if parent == process.pid and f"RANK={rank}".encode() in environment:
            return int(status.parent.name)
    raise AssertionError(f"rank {rank} is not there")


def finished(place, run):
    """The newest step in a ledger that is being written."""
    try:
        lines = (place / run / "ledger.jsonl").read_text().splitlines()
    except OSError:
        return 0
    return max((json.loads(line).get("step", 0) for line in lines if line.startswith('{"step"') and line.endswith("}")),
               default=0)


def hurt_in_a_step(place, run, process):
    wait_for(process, lambda: finished(place, run) >= 33)
    os.kill(worker(process, 1), signal.SIGKILL)


def hurt_in_a_save(place, run, process):
    wait_for(process, lambda: (place / run / "checkpoints" / ".step-40.tmp").exists())
    os.kill(worker(process, 0), signal.SIGKILL)


def hurt_in_an_evaluation(place, run, process):
    wait_for(process, lambda: finished(place, run) == 60)  # the evaluation follows at once
    os.kill(worker(process, 1), signal.SIGKILL)


def hang(place, run, process):
    wait_for(process, lambda: finished(place, run) >= 33)
    os.kill(worker(process, 1), signal.SIGSTOP)


def end_all(place, run, process):
    wait_for(process, lambda: finished(place, run) >= 45)
    os.killpg(process.pid, signal.SIGKILL)


FAULTS = {
    "SIGKILL of a rank in a step": (hurt_in_a_step, "restarted by torchrun"),
    "SIGKILL of a rank in a save": (hurt_in_a_save, "restarted by torchrun"),
    "SIGKILL of a rank in an evaluation": (hurt_in_an_evaluation, "restarted by torchrun"),
    "a rank that hangs": (hang, "found by the watchdog, restarted by torchrun"),
    "SIGKILL of everything": (end_all, "the same command again"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_run_ends_as_if_nothing_had_happened(place, undisturbed, fault):
    disturb, way_out = FAULTS[fault]
    run = "-".join(fault.split())
    began = time.monotonic()
    process = start(place, run)
    try:
        disturb(place, run, process)
        if disturb is end_all:
            process.communicate()
            process = start(place, run)
        _, err = process.communicate(timeout=300)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, err
    if disturb is hang:
        assert re.search(r"rank 0 has been in step \d+ for \d+ s, where run.watchdog allows 4: it hangs, or waits", err)
        assert "_accumulate" in err or "agreed_to_stop" in err or "run_step" in err
    assert steps(place, run) == steps(place, "whole")
    assert evaluations(place, run) == evaluations(place, "whole")
    assert weights(place, run) == weights(place, "whole")
    assert not list((place / run / "checkpoints").glob(".*"))
    TABLE.append((fault, time.monotonic() - began - undisturbed, f"the same weights and ledger; {way_out}"))
