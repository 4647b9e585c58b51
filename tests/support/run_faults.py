"""Ways to disturb a run, and how it comes to its end all the same: what tests/train/run/test_faults.py tries out."""

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
    """A run under torchrun that goes on: the folder with its corpus, its name, the launcher and its workers' number."""

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
        """Let it go on: tests/train/run/test_faults.py holds it at step 60, so that nobody comes too late."""
        training_runs.release(self.place, self.run)

    def wait_for_step(self, step: int = 33) -> None:
        self.wait_for(lambda: self.finished >= step)

    def worker(self, rank: int) -> int:
        """The process id of a rank, by its environment."""
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
        """Everything, at once: the workers too, which are in sessions of their own and would save."""
        for process in [self.worker(rank) for rank in range(self.processes)] + [self.launcher.pid]:
            os.kill(process, signal.SIGKILL)


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong.

    Args:
        disturb: does it.
        way_out: how the run comes to its end.
        inject: Python that each worker of the first attempt runs at its start.
        said: pattern in what the run prints.
    """

    disturb: Callable[[Victim], object]
    way_out: str
    inject: str = ""
    said: str = ""

    @property
    def restarts(self) -> bool:
        return RESTARTED in self.way_out

    @property
    def again(self) -> bool:
        return AGAIN in self.way_out


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
    # Alone, a process that is stopped has nobody to find it; one that sleeps has its own watchdog.
    victim.signal(victim.processes - 1, signal.SIGSTOP if victim.processes > 1 else signal.SIGUSR2)


def kill_everything(victim: Victim) -> None:
    victim.wait_for_step(45)
    victim.kill()


def send(number: int) -> Callable[[Victim], None]:
    def disturb(victim: Victim) -> None:
        victim.wait_for_step()
        victim.launcher.send_signal(number)
    return disturb


def kill_the_launcher(victim: Victim) -> None:
    victim.wait_for_step()
    workers = [victim.worker(rank) for rank in range(victim.processes)]
    victim.launcher.kill()
    victim.release()
    training_runs.wait_until(lambda: not any(map(training_runs.alive, workers)))
    assert find_damage(checkpoints(victim.checkpoints)[-1]) is None


def damage(change: Callable[[Path], object]) -> Callable[[Victim], None]:
    """Kill everything, then change a shard of the newest checkpoint."""
    def disturb(victim: Victim) -> None:
        victim.wait_for((victim.checkpoints / "step-40").exists)
        victim.kill()
        victim.launcher.wait()
        change(checkpoints(victim.checkpoints)[-1] / "__0_0.distcp")
    return disturb


def flip(shard: Path) -> None:
    content = bytearray(shard.read_bytes())
    content[len(content) // 3] ^= 16
    shard.write_bytes(content)


def cut_the_corpus(victim: Victim) -> None:
    """While it is read; it is whole again once the run has ended."""
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
FAULTS = {
    "SIGKILL of a rank in a step": Fault(kill_in_a_step, RESTARTED),
    "SIGKILL of a rank in a save": Fault(kill_in_a_save, RESTARTED),
    "SIGKILL of a rank in an evaluation": Fault(kill_in_an_evaluation, RESTARTED),
    "SIGKILL before a checkpoint's rename": Fault(dies_by_itself, RESTARTED, inject=dying("before")),
    "a rank that hangs": Fault(hang, f"the watchdog and {RESTARTED}", inject=SLEEP,
                               said=r"rank \d has been in .+ for \d+ s, where run.watchdog allows \d+: it hangs"),
    "SIGKILL of everything": Fault(kill_everything, AGAIN),
    "SIGTERM to torchrun": Fault(send(signal.SIGTERM), SAVED, said="stopped by SIGTERM after"),
    "SIGKILL after a checkpoint's rename": Fault(dies_by_itself, RESTARTED, inject=dying("after")),
    "SIGINT to torchrun": Fault(send(signal.SIGINT), SAVED, said="stopped by SIGINT after"),
    "SIGUSR1 to torchrun": Fault(send(signal.SIGUSR1), SAVED, said="stopped by SIGUSR1 after"),
    "SIGKILL of torchrun": Fault(kill_the_launcher, SAVED),
    "a flipped byte in the newest checkpoint": Fault(damage(flip), BEFORE,
                                                     said="is damaged: .*; it is now damaged-step-"),
    "a truncated shard": Fault(damage(lambda shard: os.truncate(shard, 1000)), BEFORE, said="has 1000 bytes where"),
    "a deleted shard": Fault(damage(Path.unlink), BEFORE, said="distcp is missing"),
    "a duplicated shard": Fault(damage(lambda shard: (shard.parent / "__9_0.distcp").write_bytes(shard.read_bytes())),
                                BEFORE, said="__9_0.distcp is not one of its files"),
    "a file of the corpus cut short in place": Fault(
        cut_the_corpus, BEFORE, said=r"rank \d could not read its data of step \d+: \S+: cut short since it"),
    "a second run in the folder": Fault(second_run, "a refusal of the second in one line"),
    "a clock that jumps back a day": Fault(Victim.wait_for_step, "nothing: only monotonic clocks are asked",
                                           inject=CLOCK),
    "a slow disk": Fault(Victim.wait_for_step, "training that goes on meanwhile", inject=SLOW),
    "a full disk": Fault(Victim.wait_for_step, WARNED),
    "a read-only disk": Fault(Victim.wait_for_step, WARNED),
}
BY_PROCESSES = list(FAULTS)[:7]
"""What becomes of these depends on how many processes there are."""
DISKS = {"a full disk": ("mount -t tmpfs -o size=2500k tmpfs {0}", "mount -o remount,size=100m {0}"),
         "a read-only disk": ("mkdir -p {0}/run/checkpoints; mount --bind {0}/run/checkpoints {0}/run/checkpoints; "
                              "mount -o remount,ro,bind {0}/run/checkpoints",
                              "mount -o remount,rw,bind {0}/run/checkpoints")}
"""What breaks the disk that is mounted in a folder, and what mends it."""
