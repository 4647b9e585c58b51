"""The fault campaign: real processes that are killed, stopped, starved and restarted.

After each fault the run must end with the weights and the ledger of the run without a fault. `pytest --slow` injects
the faults of SHORT. `pytest --full tests/train/run/test_faults.py` injects all of tests/support/run_faults.py, those of
BY_PROCESSES at 1, 2 and 4 processes, and writes faults.json and the table of docs/training.md.
"""

import json
import os
import platform
import re
import signal
import subprocess
import textwrap
import time
from pathlib import Path

import pytest
import torch
import training_runs
from run_faults import BY_PROCESSES, DISKS, FAULTS, SLOW, STEPS, Victim, markdown_table
from safetensors.torch import load
from training_runs import evaluations, finished, make_corpus, starts, steps, wait_for, weights

from phi1.train.metrics.ledger import read_ledger
from phi1.train.runtime.provenance import commit

pytestmark = pytest.mark.slow

PAGE, RESULTS = Path(__file__).parents[3] / "docs" / "training.md", Path(__file__).with_name("faults.json")
LAUNCHER = ("--max-restarts", "1", "--shutdown-timeout", "3", "--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1")
WATCHDOG = {1: 6, 2: 6, 4: 20}  # four processes share the two cores of a CI machine
WHERE = (f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, commit {commit()}, "
         f"{time.strftime('%Y-%m-%d')}")
FOUND: dict[str, dict] = {}
WITHOUT_FAULT: dict[int, str] = {}


@pytest.fixture(scope="session")  # with -n, tests of other files run between these
def place(tmp_path_factory, request):
    folder = tmp_path_factory.mktemp("faults")
    make_corpus(folder, val_fraction=0.2)
    yield folder
    if not FOUND:
        return
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print("\n\n" + markdown_table(FOUND))
    if request.config.option.full:
        results = (json.loads(RESULTS.read_text()) if RESULTS.exists() else {}) | FOUND
        RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
        text = PAGE.read_text(encoding="utf-8")
        begin, end = "<!-- faults: begin -->\n", "<!-- faults: end -->"
        page = text[:text.index(begin)] + begin + markdown_table(results) + text[text.index(end):]
        PAGE.write_text(page, encoding="utf-8")


def note(fault, processes, seconds):
    FOUND[f"{fault}, {processes}"] = {"seconds": round(seconds, 1), "where": WHERE}


def start(place, run, processes, startup="", **changes):
    """Start a run; each worker of its first attempt runs the code `startup` as it starts."""
    code = f"import os\nif os.environ.get('TORCHELASTIC_RESTART_COUNT') == '0':\n{startup}"
    environment = training_runs.injected(place / f"{run}.hook", code) if startup else {}
    return training_runs.start(place, run, processes, environment=environment,
                               **{"launcher": LAUNCHER} | STEPS | changes)


def start_held(place, run, processes, startup="", **changes):
    """Start a run whose first attempt waits in its checkpoint of step 60 until it is released."""
    hold = textwrap.indent(training_runs.holding(place, run, "step-60"), "    ")
    return start(place, run, processes, startup + hold, **changes)


def without_fault(place, processes):
    """Return the folder of a run without a fault."""
    if processes not in WITHOUT_FAULT:
        process = start(place, f"whole-{processes}", processes)
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        WITHOUT_FAULT[processes] = f"whole-{processes}"
    return WITHOUT_FAULT[processes]


SHORT = [("SIGKILL of a rank in a step", 4), ("SIGKILL of a rank in a save", 2), ("a rank that hangs", 2),
         ("a flipped byte in the newest checkpoint", 2), ("a full disk", 2)]
EVERY = [(fault, processes) for fault in FAULTS for processes in ((1, 2, 4) if fault in BY_PROCESSES else (2,))]


def pytest_generate_tests(metafunc):
    if "fault" in metafunc.fixturenames:
        chosen = EVERY if metafunc.config.option.full else SHORT
        of_disks = metafunc.function is test_a_disk_that_cannot_be_written_costs_only_checkpoints
        metafunc.parametrize(("fault", "processes"), [case for case in chosen if (case[0] in DISKS) == of_disks])


def assert_same_as_without_fault(place, run, processes):
    whole = without_fault(place, processes)
    assert steps(place, run) == steps(place, whole)
    assert evaluations(place, run) == evaluations(place, whole)
    assert weights(place, run) == weights(place, whole)


def test_a_run_ends_as_without_the_fault(place, fault, processes):
    without_fault(place, processes)
    what, run = FAULTS[fault], f"{'-'.join(re.findall('[A-Za-z]+', fault))}-{processes}"
    limit = {}
    if "hangs" in fault:  # more than one restart: a busy machine may delay a process beyond the limit
        limit = {"run__watchdog": WATCHDOG[processes], "launcher": (*LAUNCHER, "--max-restarts", "3")}
    process = start_held(place, run, processes, what.startup, **limit)
    victim, printed, lost = Victim(place, run, process, processes), "", 0.0
    try:
        what.inject(victim)
        victim.release()
        reached, began = finished(place, run), time.monotonic()
        if what.again:
            printed = "".join(process.communicate(timeout=300))
            process = start(place, run, processes)
        if what.again or what.restarts:  # the loss ends when the run is as far again
            wait_for(process, lambda: starts(place, run) > 1 and finished(place, run) >= reached)
            lost = time.monotonic() - began
        out, err = process.communicate(timeout=300)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, err
    assert re.search(what.message, printed + out + err), printed + out + err
    if what.startup == SLOW:
        saves = [line["measured"] for line in read_ledger(place / run / "ledger.jsonl") if "saved" in line]
        assert saves[0]["seconds"] > 2
        assert saves[0]["stall_seconds"] < saves[0]["seconds"]
    assert_same_as_without_fault(place, run, processes)
    assert not list((place / run / "checkpoints").glob(".*"))
    note(fault, processes, lost)


def test_a_disk_that_cannot_be_written_costs_only_checkpoints(place, fault, processes):
    names = ["unshare", "--mount"] + (["--map-root-user"] if os.geteuid() else [])
    if subprocess.run([*names, "true"], capture_output=True).returncode:
        pytest.skip("mounting a small file system takes root or user namespaces")
    without_fault(place, processes)
    disk = f"disk-{fault.split()[1]}-{processes}"
    (place / disk).mkdir()
    (place / f"{disk}-after").mkdir()
    break_it, mend_it = (line.format(disk) for line in DISKS[fault])
    train = 'timeout 200 "$@"; echo "exit $?"'
    script = f"{break_it}; {train}; ls {disk}/run/checkpoints; {mend_it}; {train}; cp -r {disk}/run/. {disk}-after"
    words = training_runs.command(f"{disk}/run", processes, launcher=LAUNCHER[2:], **STEPS)
    done = subprocess.run([*names, "bash", "-c", script, "bash", *words], cwd=place, text=True, capture_output=True)
    failed = "could not be written: " + ("no disk space: it takes" if "full" in fault else "Read-only file system")
    assert re.search(rf"warning: checkpoint \S+step-\d0 {failed}.*; the run goes on$", done.stdout, re.MULTILINE), done
    assert re.search(rf"error: checkpoint \S+step-66 {failed}", done.stderr), done
    exits = re.findall(r"^exit (\d+)$", done.stdout, re.MULTILINE)
    assert exits == ["1", "0"], done  # torchrun's own code for a worker's 2
    assert_same_as_without_fault(place, f"{disk}-after", processes)
    note(fault, processes, 0.0)


def test_another_number_of_processes_goes_on_with_the_same_batches_and_masks(place):
    """Two processes are killed, four go on: shards are cut anew, sums are rounded otherwise, and no more than that."""
    whole = without_fault(place, 2)
    process = start_held(place, "resized", 2)
    victim = Victim(place, "resized", process, 2)
    victim.wait_for((victim.checkpoints / "step-40").exists)
    victim.kill()
    process.communicate()
    process = start(place, "resized", 4)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "note: same batches and masks, but perhaps other rounding from here on: world_size was 2, is 4" in out
    before, after = steps(place, whole), steps(place, "resized")
    assert [step["samples"] for step in before] == [step["samples"] for step in after]
    assert before[:40] == after[:40]
    assert before[40:] != after[40:]
    assert max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(before, after, strict=True)) <= 1e-5
    expected, got = load(weights(place, whole)), load(weights(place, "resized"))
    assert expected.keys() == got.keys()
    for name, tensor in expected.items():  # 4e-6 was the largest
        assert torch.allclose(tensor, got[name], rtol=0, atol=1e-5 * float(tensor.abs().max())), name
