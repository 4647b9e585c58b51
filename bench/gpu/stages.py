"""The stages of bench/gpu.sh: which commands each runs, for how long, and the short table at the end.

    python bench/gpu/stages.py STAGE --out DIR [--rehearse]
    python bench/gpu/stages.py --needs STAGE ...       names of packages that are missing, one a line; with --wheels DIR
                                                       also what those need that have a wheel in DIR
    python bench/gpu/stages.py --absent DIR STAGE      names of packages that have a wheel in DIR and are not installed

A stage ends within nine minutes of the script's call, or of the end of the stage before it, or five times as long when
it is rehearsed: each command has a limit of its own, and none starts when the stage's time is up. A command at its
limit is interrupted, so that it can say what it knows, and killed later. One that has lost the GPU is started again for
the rest of its time. What a command prints goes to DIR/STAGE/NAME.log as it comes.
"""

from __future__ import annotations

import argparse
import contextlib
import email
import importlib
import importlib.metadata
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from phi1.bench.gpu.commands import LEFT_OUT, NEEDS, STAGE_SECONDS, Command, commands
from phi1.bench.harness.processes import end_session, signals_later

LAST_WORDS_SECONDS = 10
END_SECONDS = 2 * LAST_WORDS_SECONDS + 5  # of the last command's end and the table
REHEARSAL_TIMES = 5  # as long, since the CPU may be a slow one, and busy
LOST = "GPU lost"  # exit code 3: a tile or a peer took the GPU's context with it; another process goes on behind it
WORTH_SECONDS = 60  # for another process to find something
SHOWN_LINES = 12


@dataclass
class Row:
    """What came of a command."""

    name: str
    outcome: str
    seconds: float
    last: list[str]
    left_out: list[str] = field(default_factory=list)
    """Lines that say which tests could not run here."""


def run(command: Command, folder: Path, seconds: float) -> Row:
    """Run one command within its limit, and then as long as its last words take; its session ends with it."""
    if command.program and shutil.which(command.program) is None:
        return Row(command.name, "skipped", 0.0, [f"{command.program} is not installed"])
    if seconds < 10:
        return Row(command.name, "no time", 0.0, [])
    words = command.words if command.program else (sys.executable, *command.words)
    if command.minutes:
        words = (*words, f"{max(0.1, min(command.minutes, min(seconds, command.seconds) / 60 - 0.5)):.2f}")
    log, begin = folder / f"{command.name}.log", time.monotonic()
    process: subprocess.Popen[bytes] | None = None
    with log.open("w") as file:
        try:
            with signals_later():  # or the process would be there and its number unknown
                process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT, cwd=folder,
                                           start_new_session=True, env=os.environ | command.environment)
            code = process.wait(min(seconds, command.seconds))
            outcome = "ok" if code == 0 else f"exit {code}"
        except subprocess.TimeoutExpired:
            outcome = "time out"
            assert process
            process.send_signal(signal.SIGINT)  # at which pytest prints what has failed
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(LAST_WORDS_SECONDS)
        finally:
            if process:
                end_session(process, LAST_WORDS_SECONDS)
    text = log.read_text(errors="replace").strip().splitlines()
    return Row(command.name, outcome, time.monotonic() - begin, text[-SHOWN_LINES:],
               [line for line in text if line.startswith(LEFT_OUT)])


def run_stage(stage: str, out: Path, rehearse: bool, begun: float | None = None) -> int:
    """Run a stage and print its table; 1 if a command failed or found no time, 2 if the stage runs there already.

    Args:
        stage: its name.
        out: folder for the results of all stages.
        rehearse: on a CPU.
        begun: when its time began, on the monotonic clock (now).
    """
    from phi1.bench.harness.files import lock

    folder = (out / stage).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    held = os.open(folder, os.O_RDONLY)
    if not lock(held):  # both would write the same logs and results
        print(f"gpu.sh: error: stage {stage} is running already in {folder}: wait until it ends, or set another OUT",
              file=sys.stderr)
        os.close(held)
        return 2
    try:
        times = REHEARSAL_TIMES if rehearse else 1
        waiting = [replace(command, seconds=times * command.seconds)
                   for command in commands(stage, folder, rehearse)]
        begun = time.monotonic() if begun is None else begun
        return _run_commands(stage, folder, waiting, begun + times * STAGE_SECONDS - END_SECONDS)
    finally:
        os.close(held)


def _run_commands(stage: str, folder: Path, waiting: list[Command], end: float) -> int:
    rows = []
    while waiting:
        command = waiting.pop(0)
        rows.append(run(command, folder, end - time.monotonic()))
        if command.minutes and rows[-1].outcome == "exit 3":
            rows[-1].outcome = LOST
        print(f"-- {stage} {rows[-1].name}: {rows[-1].outcome}, {rows[-1].seconds:.0f} s", flush=True)
        for line in rows[-1].last:
            print(f"   {line[:160]}")
        left = command.seconds - rows[-1].seconds
        if rows[-1].outcome == LOST and min(left, end - time.monotonic()) > WORTH_SECONDS:
            waiting.insert(0, replace(command, name=f"{command.name}+", seconds=int(left)))
    print(f"\n{stage:10} {'outcome':10} {'s':>4}  last line")
    for row in rows:
        print(f"{row.name:10} {row.outcome:10} {row.seconds:4.0f}  {(row.last or [''])[-1][:110]}")
        for line in row.left_out:
            print(f"{'':28}{line}")
    print(f"results in {folder}", flush=True)
    # The long selection ends with the stage's time as a rule; what it has done is in its file.
    bad = [row for row in rows if row.outcome not in ("ok", "skipped", LOST) and not
           (row.name.rstrip("+") == "all" and row.outcome in ("time out", "no time"))]
    return 1 if bad else 0


def missing(stages: Sequence[str], wheels: Path | None = None) -> list[str]:
    """Packages without which the stages cannot run, as they are named at installation.

    Those for which there is a wheel bring what it says that they need and is missing as well.
    """
    names = []
    for module in dict.fromkeys(module for stage in stages for module in NEEDS[stage]):
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or error.name.startswith("phi1"):
                raise
            names.append(_package(error.name.partition(".")[0]))
    names = sorted(set(names))
    for name in names:  # which grows
        needed = (_package(other) for other in (_required(wheels, name) if wheels else ()))
        names += [other for other in dict.fromkeys(needed) if other not in names and not _is_installed(other)]
    return names


def _package(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _is_installed(package: str) -> bool:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return bool(importlib.metadata.version(package))
    return False


def _required(wheels: Path, package: str) -> list[str]:
    """What the package's wheel says that it needs wherever it is; nothing where no wheel of it can be read."""
    for path in wheels.glob("*.whl"):
        if _package(path.name.partition("-")[0]) == package:
            with contextlib.suppress(OSError, zipfile.BadZipFile), zipfile.ZipFile(path) as wheel:
                facts = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
                lines = email.message_from_bytes(wheel.read(facts[0])).get_all("Requires-Dist", []) if facts else []
                return [re.split(r"[^\w.-]", line)[0] for line in lines if ";" not in line]
    return []


def absent(wheels: Path) -> list[str]:
    """Distributions that have a wheel in the folder and are not installed."""
    names = sorted({_package(path.name.partition("-")[0]) for path in wheels.glob("*.whl")})
    return [name for name in names if not _is_installed(name)]


def main() -> int:
    # SIGINT too, which a shell lets its background processes ignore, and they theirs.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    parser = argparse.ArgumentParser(prog="gpu.sh", description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("stages", nargs="+", choices=list(NEEDS), metavar="STAGE", help=", ".join(NEEDS))
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--began", type=float, help="when the script was called, seconds since 1970 (now)")
    parser.add_argument("--needs", action="store_true")
    parser.add_argument("--wheels", type=Path, metavar="DIR")
    parser.add_argument("--absent", type=Path, metavar="WHEELS")
    options = parser.parse_args()
    if options.needs or options.absent:
        for name in absent(options.absent) if options.absent else missing(options.stages, options.wheels):
            print(name)
        return 0
    from phi1.bench.harness.environment import commit  # only here: what the package needs may be missing above

    if commit() == "unknown":
        print("gpu.sh: the sources' commit is unknown, as there is no git here: set PHI1_COMMIT, or results name none",
              flush=True)
    begun = time.monotonic() - max(0.0, time.time() - (options.began or time.time()))
    codes = []
    for stage in options.stages:
        codes.append(run_stage(stage, options.out, options.rehearse, begun))
        begun = time.monotonic()
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
