"""What happens to a run when things go wrong: real processes, really killed, stopped, starved and restarted.

Each fault must end with the weights and the ledger of the run that nothing disturbed. `pytest --slow` runs those of
SHORT, `pytest --full tests/test_faults.py` each at 1, 2 and 4 processes. A table of faults, outcomes and seconds lost
is printed; --full also writes it into the README.
"""

import os
import platform
import re
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from phi1.train import testing
from phi1.train.checkpoint_files import checkpoints, find_damage
from phi1.train.ledger import read_ledger
from phi1.train.provenance import commit
from phi1.train.testing import error_line, evaluations, finished, make_corpus, starts, steps, wait_for, weights

pytestmark = pytest.mark.slow

README = Path(__file__).parents[1] / "README.md"
CHANGES = {"train__steps": 66, "eval__every": 30, "eval__sequences": 64, "eval__completions": 0}
LAUNCHER = ("--max-restarts", "1", "--shutdown-timeout", "3", "--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1")
WATCHDOG = {1: 6, 2: 6, 4: 20}  # four processes share the two cores of a CI machine
TABLE: dict[tuple[str, int], float] = {}
WHOLE: dict[int, str] = {}


@pytest.fixture(scope="module")
def place(tmp_path_factory, request):
    folder = tmp_path_factory.mktemp("faults")
    make_corpus(folder, val_fraction=0.2)
    yield folder
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print("\n\n" + table())
    if len(TABLE) == len(EVERY):
        text = README.read_text()
        begin, end = "<!-- faults: begin -->\n", "<!-- faults: end -->"
        README.write_text(text[:text.index(begin)] + begin + table() + text[text.index(end):])


def table():
    """What was found, as the README has it."""
    sizes = sorted({processes for _, processes in TABLE})
    lines = [f"| fault | ends by | seconds lost, {', '.join(map(str, sizes))} processes |", "|---|---|---|"]
    for fault, found in FAULTS.items():
        lost = [f"{TABLE[fault, n]:.0f}" if (fault, n) in TABLE else "-" for n in sizes]
        if set(lost) != {"-"}:
            lines.append(f"| {fault} | {found.way_out} | {', '.join(lost)} |")
    return "\n".join(lines) + (f"\n\n{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, commit "
                               f"{commit()}, {time.strftime('%Y-%m-%d')}.\n")


def start(place, run, processes, inject="", **changes):
    """A run; its first attempt's workers run `inject` as they start."""
    environment = {}
    if inject:
        hook = place / f"{run}.hook"
        hook.mkdir()
        (hook / "sitecustomize.py").write_text(
            f"import os\nif os.environ.get('TORCHELASTIC_RESTART_COUNT') == '0':\n{inject}")
        environment = {"PYTHONPATH": os.pathsep.join(filter(None, (str(hook), os.environ.get("PYTHONPATH"))))}
    return testing.start(place, run, processes, launcher=LAUNCHER, environment=environment, **CHANGES | changes)


def undisturbed(place, processes):
    """The folder of a run in which nothing happens."""
    if processes not in WHOLE:
        process = start(place, f"whole-{processes}", processes)
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        WHOLE[processes] = f"whole-{processes}"
    return WHOLE[processes]


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


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong.

    Args:
        disturb: does it to a run: its place, name, process and number of processes.
        way_out: how the run comes to its end all the same.
        again: whether the same command has to be given again.
        inject: Python that each worker of the first attempt runs at its start.
        said: pattern in what the run prints.
    """

    disturb: Callable
    way_out: str
    again: bool = False
    inject: str = ""
    said: str = ""


def at_step(place, run, process, step=33):
    wait_for(process, lambda: finished(place, run) >= step)


def kill_in_a_step(place, run, process, processes):
    at_step(place, run, process)
    os.kill(worker(process, processes - 1), signal.SIGKILL)


def kill_in_a_save(place, run, process, processes):
    wait_for(process, lambda: (place / run / "checkpoints" / ".step-40.tmp").exists())
    os.kill(worker(process, 0), signal.SIGKILL)


def kill_in_an_evaluation(place, run, process, processes):
    at_step(place, run, process, 60)  # the evaluation follows at once
    os.kill(worker(process, processes - 1), signal.SIGKILL)


def dies_by_itself(place, run, process, processes):
    wait_for(process, (place / "died").exists)
    (place / "died").unlink()


def hang(place, run, process, processes):
    at_step(place, run, process)
    # Alone, a process that is stopped has nobody to find it; one that sleeps has its own watchdog.
    os.kill(worker(process, processes - 1), signal.SIGSTOP if processes > 1 else signal.SIGUSR2)


def kill_everything(place, run, process, processes):
    at_step(place, run, process, 45)
    os.killpg(process.pid, signal.SIGKILL)


def send(number):
    def disturb(place, run, process, processes):
        at_step(place, run, process)
        process.send_signal(number)
    return disturb


def kill_the_launcher(place, run, process, processes):
    at_step(place, run, process)
    workers = [worker(process, rank) for rank in range(processes)]
    process.kill()
    end = time.monotonic() + 120
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < end, "the workers run on"
        time.sleep(0.02)
    assert find_damage(checkpoints(place / run / "checkpoints")[-1]) is None


def second_run(place, run, process, processes):
    at_step(place, run, process, 1)
    assert f"run.folder {run} is in use by process" in error_line(testing.run(place, run, **CHANGES))


def nothing_more(place, run, process, processes):
    at_step(place, run, process)


def damage(change):
    """Kill everything, then change a shard of the newest checkpoint."""
    def disturb(place, run, process, processes):
        wait_for(process, (place / run / "checkpoints" / "step-40").exists)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        newest = checkpoints(place / run / "checkpoints")[-1]
        change(newest / "__0_0.distcp")
    return disturb


def flip(shard):
    content = bytearray(shard.read_bytes())
    content[len(content) // 3] ^= 16
    shard.write_bytes(content)


def dying(when):
    """Ends rank 0 as it renames step-40's folder."""
    rename, die = "rename(source, target)", "open('died', 'w').close(); os.kill(os.getpid(), 9)"
    first, second = (die, rename) if when == "before" else (rename, die)
    return ("    rename = os.rename\n    def dying(source, target):\n        if str(target).endswith('/step-40'):\n"
            f"            {first}; {second}\n        rename(source, target)\n    os.rename = dying\n")


SLEEP = ("    import signal, time\n    def forever(*_):\n        while True:\n            time.sleep(9)\n"
         "    signal.signal(signal.SIGUSR2, forever)\n")
CLOCK = ("    import time\n    began, clock = time.monotonic(), time.time\n"
         "    time.time = lambda: clock() - (86400 if time.monotonic() > began + 6 else 0)\n")
SLOW = ("    import time\n    fsync = os.fsync\n    def slow(file):\n        time.sleep(0.7)\n        fsync(file)\n"
        "    os.fsync = slow\n")
RESTARTED, AGAIN = "torchrun's restart", "the same command again"
FAULTS = {
    "SIGKILL of a rank in a step": Fault(kill_in_a_step, RESTARTED),
    "SIGKILL of a rank in a save": Fault(kill_in_a_save, RESTARTED),
    "SIGKILL of a rank in an evaluation": Fault(kill_in_an_evaluation, RESTARTED),
    "SIGKILL before a checkpoint's rename": Fault(dies_by_itself, RESTARTED, inject=dying("before")),
    "a rank that hangs": Fault(hang, f"the watchdog and {RESTARTED}", inject=SLEEP,
                               said=r"rank \d has been in step \d+ for \d+ s, where run.watchdog allows \d+: it hangs"),
    "SIGKILL of everything": Fault(kill_everything, AGAIN, again=True),
    "SIGTERM to torchrun": Fault(send(signal.SIGTERM), f"a save, {AGAIN}", again=True, said="stopped by SIGTERM after"),
    "SIGKILL after a checkpoint's rename": Fault(dies_by_itself, RESTARTED, inject=dying("after")),
    "SIGINT to torchrun": Fault(send(signal.SIGINT), f"a save, {AGAIN}", again=True, said="stopped by SIGINT after"),
    "SIGUSR1 to torchrun": Fault(send(signal.SIGUSR1), f"a save, {AGAIN}", again=True, said="stopped by SIGUSR1 after"),
    "SIGKILL of torchrun": Fault(kill_the_launcher, f"a save, {AGAIN}", again=True),
    "a flipped byte in the newest checkpoint": Fault(damage(flip), f"the one before, {AGAIN}", again=True,
                                                     said="is damaged: .*; it is now damaged-step-"),
    "a truncated shard": Fault(damage(lambda shard: os.truncate(shard, 1000)), f"the one before, {AGAIN}", again=True,
                               said="has 1000 bytes where"),
    "a deleted shard": Fault(damage(Path.unlink), f"the one before, {AGAIN}", again=True, said="distcp is missing"),
    "a duplicated shard": Fault(damage(lambda shard: (shard.parent / "__9_0.distcp").write_bytes(shard.read_bytes())),
                                f"the one before, {AGAIN}", again=True, said="__9_0.distcp is not one of its files"),
    "a second run in the folder": Fault(second_run, "a refusal of the second in one line"),
    "a clock that jumps back a day": Fault(nothing_more, "nothing: only monotonic clocks are asked", inject=CLOCK),
    "a slow disk": Fault(nothing_more, "training that goes on meanwhile", inject=SLOW),
    "a full disk": Fault(nothing_more, f"a warning, one line at the end, {AGAIN}"),
    "a read-only disk": Fault(nothing_more, f"a warning, one line at the end, {AGAIN}"),
}
DISKS = ("a full disk", "a read-only disk")
SHORT = {("SIGKILL of a rank in a step", 4), ("SIGKILL of a rank in a save", 2),
         ("SIGKILL of a rank in an evaluation", 2), ("SIGKILL before a checkpoint's rename", 2),
         ("a rank that hangs", 2), ("SIGTERM to torchrun", 2), ("a flipped byte in the newest checkpoint", 2),
         ("a full disk", 2)}
BY_PROCESSES = list(FAULTS)[:7]  # what happens to them depends on how many processes there are
EVERY = [(fault, processes) for fault in FAULTS for processes in ((1, 2, 4) if fault in BY_PROCESSES else (2,))]


def skip_unless_chosen(request, fault, processes):
    if not request.config.option.full and (fault, processes) not in SHORT:
        pytest.skip("run with --full")


def assert_as_undisturbed(place, run, processes):
    whole = undisturbed(place, processes)
    assert steps(place, run) == steps(place, whole)
    assert evaluations(place, run) == evaluations(place, whole)
    assert weights(place, run) == weights(place, whole)


@pytest.mark.parametrize(("fault", "processes"), [case for case in EVERY if case[0] not in DISKS])
def test_a_run_ends_as_if_nothing_had_happened(place, request, fault, processes):
    skip_unless_chosen(request, fault, processes)
    undisturbed(place, processes)
    what, run = FAULTS[fault], f"{'-'.join(re.findall('[A-Za-z]+', fault))}-{processes}"
    limit = {"run__watchdog": WATCHDOG[processes]} if "hangs" in fault else {}
    process = start(place, run, processes, what.inject, **limit)
    said, lost = "", 0.0
    try:
        what.disturb(place, run, process, processes)
        reached, began = finished(place, run), time.monotonic()
        if what.again:
            said = "".join(process.communicate(timeout=120))
            process = start(place, run, processes)
        if what.again or RESTARTED in what.way_out:  # lost until the run is as far again
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
    TABLE[fault, processes] = lost


PREPARE = {"a full disk": ("mount -t tmpfs -o size=2500k tmpfs {0}", "mount -o remount,size=100m {0}"),
           "a read-only disk": ("mkdir -p {0}/run/checkpoints; mount --bind {0}/run/checkpoints {0}/run/checkpoints; "
                                "mount -o remount,ro,bind {0}/run/checkpoints",
                                "mount -o remount,rw,bind {0}/run/checkpoints")}


@pytest.mark.parametrize(("fault", "processes"), [case for case in EVERY if case[0] in DISKS])
def test_a_disk_that_cannot_be_written_costs_checkpoints_alone(place, request, fault, processes):
    skip_unless_chosen(request, fault, processes)
    names = ["unshare", "--mount"] + (["--map-root-user"] if os.geteuid() else [])
    if subprocess.run([*names, "true"], capture_output=True).returncode:
        pytest.skip("mounting a small file system takes root or user namespaces")
    undisturbed(place, processes)
    disk = f"disk-{fault.split()[1]}-{processes}"
    (place / disk).mkdir()
    (place / f"{disk}-after").mkdir()
    break_it, mend_it = (line.format(disk) for line in PREPARE[fault])
    train = 'timeout 200 "$@"; echo "exit $?"'
    script = f"{break_it}; {train}; ls {disk}/run/checkpoints; {mend_it}; {train}; cp -r {disk}/run/. {disk}-after"
    words = testing.command(f"{disk}/run", processes, launcher=LAUNCHER[2:], **CHANGES)
    done = subprocess.run([*names, "bash", "-c", script, "bash", *words], cwd=place, text=True, capture_output=True)
    failed = "could not be written: " + ("no disk space: it takes" if "full" in fault else "Read-only file system")
    assert re.search(rf"warning: checkpoint \S+step-\d0 {failed}.*; the run goes on$", done.stdout, re.MULTILINE), done
    assert re.search(rf"error: checkpoint \S+step-66 {failed}", done.stderr), done
    exits = re.findall(r"^exit (\d+)$", done.stdout, re.MULTILINE)
    assert exits == ["1", "0"], done  # torchrun's own code for a worker's 2
    assert_as_undisturbed(place, f"{disk}-after", processes)
    TABLE[fault, processes] = 0.0


def test_another_number_of_processes_goes_on_with_the_same_batches_and_masks(place):
    """Two processes are killed, four go on: shards are cut anew, sums are rounded otherwise, and no more than that."""
    whole = undisturbed(place, 2)
    process = start(place, "resized", 2)
    kill_everything(place, "resized", process, 2)
    process.communicate()
    process = start(place, "resized", 4)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "note: same batches and masks, but other rounding from here on: world_size was 2, is 4" in out
    before, after = steps(place, whole), steps(place, "resized")
    assert [step["samples"] for step in before] == [step["samples"] for step in after]
    assert before[:40] == after[:40]
    assert before[40:] != after[40:]
    assert max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(before, after, strict=True)) <= 1e-5
    from safetensors.torch import load

    for (name, a), b in zip(load(weights(place, whole)).items(), load(weights(place, "resized")).values(), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-5 * float(a.abs().max())), (name, float((a - b).abs().max()))
