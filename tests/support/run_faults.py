"""Fault injection: what goes wrong in a run, and how the run recovers. tests/train/run/test_faults.py tries each."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import training_runs

from phi1.train.checkpoint.files import checkpoints, find_damage

STEPS: dict[str, Any] = {"train__steps": 66, "eval__every": 30, "eval__sequences": 64, "eval__completions": 0}
"""Checkpoints at 20, 40, 60 and 66, evaluations at 30, 60 and 66."""


@dataclass(frozen=True)
class Victim:
    """A run that is under way: the folder with its corpus, its name, torchrun and the number of its workers."""

    place: Path
    run: str
    launcher: subprocess.Popen[str]
    processes: int

    @property
    def checkpoints(self) -> Path:
        return self.place / self.run / "checkpoints"

    @property
    def finished(self) -> int:
        return training_runs.finished(self.place, self.run)

    def wait_for(self, happened: Callable[[], bool]) -> None:
        training_runs.wait_for(self.launcher, happened)

    def release(self) -> None:
        """Let the run go on. tests/train/run/test_faults.py holds it at step 60, so that no fault comes too late."""
        training_runs.release(self.place, self.run)

    def wait_for_step(self, step: int = 33) -> None:
        self.wait_for(lambda: self.finished >= step)

    def worker(self, rank: int) -> int:
        """Return the process id of a rank, which is found by its environment."""
        for status in Path("/proc").glob("[0-9]*/environ"):
            try:
                environment = status.read_bytes().split(b"\0")
                parent = int((status.parent / "stat").read_text().rsplit(") ", 1)[1].split()[1])
            except (OSError, IndexError):
                continue
            if parent == self.launcher.pid and f"RANK={rank}".encode() in environment:
                return int(status.parent.name)
        raise AssertionError(f"rank {rank} is not there")

    def signal(self, rank: int, number: int) -> None:
        os.kill(self.worker(rank), number)

    def kill(self) -> None:
        """Kill torchrun and its workers at once; the workers are in sessions of their own and would save."""
        for process in [self.worker(rank) for rank in range(self.processes)] + [self.launcher.pid]:
            os.kill(process, signal.SIGKILL)


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong.

    Args:
        inject: makes it go wrong.
        recovery: how the run reaches its end.
        startup: Python that each worker of the first attempt runs as it starts.
        message: a pattern that the run's output must match.
    """

    inject: Callable[[Victim], object]
    recovery: str
    startup: str = ""
    message: str = ""

    @property
    def restarts(self) -> bool:
        return RESTARTED in self.recovery

    @property
    def again(self) -> bool:
        return AGAIN in self.recovery


RESTARTED, AGAIN = "torchrun's restart", "the same command again"
SAVED, BEFORE, WARNED = f"a save, {AGAIN}", f"the one before, {AGAIN}", f"a warning, one line at the end, {AGAIN}"


def kill_in_a_step(victim: Victim) -> None:
    victim.wait_for_step()
    victim.signal(victim.processes - 1, signal.SIGKILL)


def kill_in_a_save(victim: Victim) -> None:
    victim.wait_for(lambda: any(victim.checkpoints.glob(".step-[46]0.*.tmp")))
    victim.signal(0, signal.SIGKILL)


def kill_in_an_evaluation(victim: Victim) -> None:
    victim.wait_for_step(60)  # the evaluation follows at once
    victim.signal(victim.processes - 1, signal.SIGKILL)


def dies_by_itself(victim: Victim) -> None:
    died = victim.place / "died"
    victim.wait_for(died.exists)
    died.unlink()


def hang(victim: Victim) -> None:
    victim.wait_for_step()
    # With one process, its own watchdog must find the hang: a sleeping process has a watchdog, a stopped one has none.
    victim.signal(victim.processes - 1, signal.SIGSTOP if victim.processes > 1 else signal.SIGUSR2)


def kill_everything(victim: Victim) -> None:
    victim.wait_for_step(45)
    victim.kill()


def send(number: int) -> Callable[[Victim], None]:
    def inject(victim: Victim) -> None:
        victim.wait_for_step()
        victim.launcher.send_signal(number)
    return inject


def kill_the_launcher(victim: Victim) -> None:
    victim.wait_for_step()
    workers = [victim.worker(rank) for rank in range(victim.processes)]
    victim.launcher.kill()
    victim.release()
    training_runs.wait_until(lambda: not any(map(training_runs.alive, workers)))
    assert find_damage(checkpoints(victim.checkpoints)[-1]) is None


def damage(change: Callable[[Path], object]) -> Callable[[Victim], None]:
    """Kill everything, then change a shard of the newest checkpoint."""
    def inject(victim: Victim) -> None:
        victim.wait_for((victim.checkpoints / "step-40").exists)
        victim.kill()
        victim.launcher.wait()
        change(checkpoints(victim.checkpoints)[-1] / "__0_0.distcp")
    return inject


def flip(shard: Path) -> None:
    content = bytearray(shard.read_bytes())
    content[len(content) // 3] ^= 16
    shard.write_bytes(content)


def cut_the_corpus(victim: Victim) -> None:
    """Truncate a file of the corpus while the run reads it, and restore it once the run has ended."""
    victim.wait_for_step()
    shard = victim.place / "data" / "train-00000.bin"
    content = shard.read_bytes()
    os.truncate(shard, len(content) // 2)
    victim.release()
    victim.launcher.wait()
    shard.write_bytes(content)


def second_run(victim: Victim) -> None:
    victim.wait_for_step(1)
    refused = training_runs.error_line(training_runs.run(victim.place, victim.run, **STEPS))
    assert f"run.folder {victim.run} is in use by process" in refused


def dying(when: str) -> str:
    """Return code that kills rank 0 before or after it renames the folder of step-40."""
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
FAULTS = {
    "SIGKILL of a rank in a step": Fault(kill_in_a_step, RESTARTED),
    "SIGKILL of a rank in a save": Fault(kill_in_a_save, RESTARTED),
    "SIGKILL of a rank in an evaluation": Fault(kill_in_an_evaluation, RESTARTED),
    "SIGKILL before a checkpoint's rename": Fault(dies_by_itself, RESTARTED, startup=dying("before")),
    "a rank that hangs": Fault(hang, f"the watchdog and {RESTARTED}", startup=SLEEP,
                               message=r"rank \d has been in .+ for \d+ s, where run.watchdog allows \d+: it hangs"),
    "SIGKILL of everything": Fault(kill_everything, AGAIN),
    "SIGTERM to torchrun": Fault(send(signal.SIGTERM), SAVED, message="stopped by SIGTERM after"),
    "SIGKILL after a checkpoint's rename": Fault(dies_by_itself, RESTARTED, startup=dying("after")),
    "SIGINT to torchrun": Fault(send(signal.SIGINT), SAVED, message="stopped by SIGINT after"),
    "SIGUSR1 to torchrun": Fault(send(signal.SIGUSR1), SAVED, message="stopped by SIGUSR1 after"),
    "SIGKILL of torchrun": Fault(kill_the_launcher, SAVED),
    "a flipped byte in the newest checkpoint": Fault(damage(flip), BEFORE,
                                                     message="is damaged: .*; it is now damaged-step-"),
    "a truncated shard": Fault(damage(lambda shard: os.truncate(shard, 1000)), BEFORE, message="has 1000 bytes where"),
    "a deleted shard": Fault(damage(Path.unlink), BEFORE, message="distcp is missing"),
    "a duplicated shard": Fault(damage(lambda shard: (shard.parent / "__9_0.distcp").write_bytes(shard.read_bytes())),
                                BEFORE, message="__9_0.distcp is not one of its files"),
    "a file of the corpus cut short in place": Fault(
        cut_the_corpus, BEFORE, message=r"rank \d could not read its data of step \d+: \S+: cut short since it"),
    "a second run in the folder": Fault(second_run, "a refusal of the second in one line"),
    "a clock that jumps back a day": Fault(Victim.wait_for_step, "nothing: only monotonic clocks are asked",
                                           startup=CLOCK),
    "a slow disk": Fault(Victim.wait_for_step, "training that goes on meanwhile", startup=SLOW),
    "a full disk": Fault(Victim.wait_for_step, WARNED),
    "a read-only disk": Fault(Victim.wait_for_step, WARNED),
}
BY_PROCESSES = list(FAULTS)[:7]
"""The faults whose course depends on the number of processes."""
DISKS = {"a full disk": ("mount -t tmpfs -o size=2500k tmpfs {0}", "mount -o remount,size=100m {0}"),
         "a read-only disk": ("mkdir -p {0}/run/checkpoints; mount --bind {0}/run/checkpoints {0}/run/checkpoints; "
                              "mount -o remount,ro,bind {0}/run/checkpoints",
                              "mount -o remount,rw,bind {0}/run/checkpoints")}
"""Two commands for each fault of the disk: one breaks the disk that is mounted in a folder, one mends it."""


def markdown_table(results: dict[str, dict[str, Any]]) -> str:
    """Return the table of docs/training.md for the results of a campaign, with the machine and commit below it."""
    lines = ["| fault | ends by | seconds lost, 1, 2, 4 processes |", "|---|---|---|"]
    for name, fault in FAULTS.items():
        lost = [f"{results[key]['seconds']:.0f}" if (key := f"{name}, {n}") in results else "-" for n in (1, 2, 4)]
        if set(lost) != {"-"}:
            lines.append(f"| {name} | {fault.recovery} | {', '.join(lost)} |")
    where = sorted({result["where"] for result in results.values()})
    return "\n".join(lines) + f"\n\n{'; '.join(where)}.\n"
