"""What happens to a run when things go wrong: real processes, really killed, stopped, starved and restarted.

Each fault must end with the weights and the ledger of the run that nothing disturbed. `pytest --slow` runs those of
SHORT, `pytest --full tests/train/run/test_faults.py` all of tests/support/run_faults.py, those of BY_PROCESSES at 1, 2
and 4 processes. A table of faults, outcomes and seconds lost is printed; --full also brings faults.json and the README
up to date.
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
from run_faults import BY_PROCESSES, DISKS, FAULTS, SLOW, STEPS, Victim
from safetensors.torch import load
from training_runs import evaluations, finished, make_corpus, starts, steps, wait_for, weights

from phi1.train.metrics.ledger import read_ledger
from phi1.train.runtime.provenance import commit

pytestmark = pytest.mark.slow

README, RESULTS = Path(__file__).parents[3] / "README.md", Path(__file__).with_name("faults.json")
LAUNCHER = ("--max-restarts", "1", "--shutdown-timeout", "3", "--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1")
WATCHDOG = {1: 6, 2: 6, 4: 20}  # four processes share the two cores of a CI machine
WHERE = (f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, commit {commit()}, "
         f"{time.strftime('%Y-%m-%d')}")
TABLE: dict[str, dict] = {}
WHOLE: dict[int, str] = {}


@pytest.fixture(scope="session")  # side by side, tests of other files come between these
def place(tmp_path_factory, request):
    folder = tmp_path_factory.mktemp("faults")
    make_corpus(folder, val_fraction=0.2)
    yield folder
    if not TABLE:
        return
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print("\n\n" + table(TABLE))
    if request.config.option.full:
        found = (json.loads(RESULTS.read_text()) if RESULTS.exists() else {}) | TABLE
        RESULTS.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
        text = README.read_text()
        begin, end = "<!-- faults: begin -->\n", "<!-- faults: end -->"
        README.write_text(text[:text.index(begin)] + begin + table(found) + text[text.index(end):])


def table(found):
    """What was found, as the README has it."""
    lines = ["| fault | ends by | seconds lost, 1, 2, 4 processes |", "|---|---|---|"]
    for fault, what in FAULTS.items():
        lost = [f"{found[key]['seconds']:.0f}" if (key := f"{fault}, {n}") in found else "-" for n in (1, 2, 4)]
        if set(lost) != {"-"}:
            lines.append(f"| {fault} | {what.way_out} | {', '.join(lost)} |")
    where = sorted({each["where"] for each in found.values()})
    return "\n".join(lines) + f"\n\n{'; '.join(where)}.\n"


def note(fault, processes, seconds):
    TABLE[f"{fault}, {processes}"] = {"seconds": round(seconds, 1), "where": WHERE}


def start(place, run, processes, inject="", **changes):
    """A run; its first attempt's workers run `inject` as they start."""
    code = f"import os\nif os.environ.get('TORCHELASTIC_RESTART_COUNT') == '0':\n{inject}"
    environment = training_runs.injected(place / f"{run}.hook", code) if inject else {}
    return training_runs.start(place, run, processes, environment=environment,
                               **{"launcher": LAUNCHER} | STEPS | changes)


def start_held(place, run, processes, inject="", **changes):
    """A run whose first attempt comes no further than to its checkpoint of step 60 before it is released."""
    hold = textwrap.indent(training_runs.holding(place, run, "step-60"), "    ")
    return start(place, run, processes, inject + hold, **changes)


def undisturbed(place, processes):
    """The folder of a run in which nothing happens."""
    if processes not in WHOLE:
        process = start(place, f"whole-{processes}", processes)
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        WHOLE[processes] = f"whole-{processes}"
    return WHOLE[processes]


SHORT = [("SIGKILL of a rank in a step", 4), ("SIGKILL of a rank in a save", 2), ("a rank that hangs", 2),
         ("a flipped byte in the newest checkpoint", 2), ("a full disk", 2)]
EVERY = [(fault, processes) for fault in FAULTS for processes in ((1, 2, 4) if fault in BY_PROCESSES else (2,))]


def pytest_generate_tests(metafunc):
    if "fault" in metafunc.fixturenames:
        chosen = EVERY if metafunc.config.option.full else SHORT
        of_disks = metafunc.function is test_a_disk_that_cannot_be_written_costs_checkpoints_alone
        metafunc.parametrize(("fault", "processes"), [case for case in chosen if (case[0] in DISKS) == of_disks])


def assert_as_undisturbed(place, run, processes):
    whole = undisturbed(place, processes)
    assert steps(place, run) == steps(place, whole)
    assert evaluations(place, run) == evaluations(place, whole)
    assert weights(place, run) == weights(place, whole)


def test_a_run_ends_as_if_nothing_had_happened(place, fault, processes):
    undisturbed(place, processes)
    what, run = FAULTS[fault], f"{'-'.join(re.findall('[A-Za-z]+', fault))}-{processes}"
    limit = {}
    if "hangs" in fault:  # more restarts than one, as a busy machine may keep a process waiting for as long
        limit = {"run__watchdog": WATCHDOG[processes], "launcher": (*LAUNCHER, "--max-restarts", "3")}
    process = start_held(place, run, processes, what.inject, **limit)
    victim, said, lost = Victim(place, run, process, processes), "", 0.0
    try:
        what.disturb(victim)
        victim.release()
        reached, began = finished(place, run), time.monotonic()
        if what.again:
            said = "".join(process.communicate(timeout=300))
            process = start(place, run, processes)
        if what.again or what.restarts:  # lost until the run is as far again
            wait_for(process, lambda: starts(place, run) > 1 and finished(place, run) >= reached)
            lost = time.monotonic() - began
        out, err = process.communicate(timeout=300)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, err
    assert re.search(what.said, said + out + err), said + out + err
    if what.inject == SLOW:
        saves = [line["measured"] for line in read_ledger(place / run / "ledger.jsonl") if "saved" in line]
        assert saves[0]["seconds"] > 2
        assert saves[0]["stall_seconds"] < saves[0]["seconds"]
    assert_as_undisturbed(place, run, processes)
    assert not list((place / run / "checkpoints").glob(".*"))
    note(fault, processes, lost)


def test_a_disk_that_cannot_be_written_costs_checkpoints_alone(place, fault, processes):
    names = ["unshare", "--mount"] + (["--map-root-user"] if os.geteuid() else [])
    if subprocess.run([*names, "true"], capture_output=True).returncode:
        pytest.skip("mounting a small file system takes root or user namespaces")
    undisturbed(place, processes)
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
    assert_as_undisturbed(place, f"{disk}-after", processes)
    note(fault, processes, 0.0)


def test_another_number_of_processes_goes_on_with_the_same_batches_and_masks(place):
    """Two processes are killed, four go on: shards are cut anew, sums are rounded otherwise, and no more than that."""
    whole = undisturbed(place, 2)
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
    for name, tensor in expected.items():  # 4e-6 was the most
        assert torch.allclose(tensor, got[name], rtol=0, atol=1e-5 * float(tensor.abs().max())), name
