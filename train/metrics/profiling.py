"""Profiles of steps: a Chrome trace of some steps of rank 0, and a table of the operations that take most time."""

from __future__ import annotations

import errno
import gzip
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from phi1.train.runtime.launch import RunError

ROWS = 12


def profiled_steps(text: str, last: int) -> range:
    """Parse run.profile: "" is no step, "7" one, "7-9" three.

    Raises:
        RunError: it is something else, or names steps that the run does not have.
    """
    match = re.fullmatch(r"(\d{1,12})(?:-(\d{1,12}))?", text)
    steps = range(int(match[1]), int(match[2] or match[1]) + 1) if match else range(0)
    if text and not (steps and 1 <= steps[0] <= steps[-1] <= last):
        raise RunError(f"run.profile must be a step such as 7, or steps such as 7-9, from 1 to {last}; got {text!r}")
    return steps


class Profiler:
    """Records some steps.

    Args:
        steps: numbers of the steps; empty on all ranks but the first.
        folder: for the trace.
        say: called with each line of the table.
        finished: steps that are done already; a line says so if nothing is left to record.
    """

    def __init__(self, steps: range, folder: Path, say: Callable[[str], None], finished: int = 0) -> None:
        self.steps, self.folder, self.say = steps, folder, say
        self._recording: Any = None
        self._recorded: list[int] = []
        if steps and steps[-1] <= finished:
            say(f"note: nothing is traced, since step {steps[-1]} is finished (run.profile)")

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Surround a step, and record it if it is one of the chosen ones."""
        if number not in self.steps:
            yield
            return
        import torch

        if self._recording is None:
            self._recording = torch.profiler.profile()
            self._recording.start()
        with torch.profiler.record_function(f"step {number}"):
            yield
        self._recorded.append(number)
        if number == self.steps[-1]:
            self.finish()

    def finish(self) -> None:
        """Write the recorded steps, if any, once; a later call does nothing."""
        recording, self._recording = self._recording, None
        if recording is None:
            return
        recording.stop()
        first, last = self._recorded[0], self._recorded[-1]
        for line in _table(recording.key_averages(), len(self._recorded)):
            self.say(line)
        path = self.folder / f"trace-{first}-{last}.json.gz"
        try:
            write_trace(recording, path)
            self.say(f"the trace of steps {first} to {last} is in {path}, for https://ui.perfetto.dev")
        except OSError as error:
            self.say(f"warning: the trace of steps {first} to {last} could not be written: {error.strerror}; the run "
                     "goes on")


def write_trace(recording: Any, path: Path) -> None:
    """Write a recording of torch.profiler as a Chrome trace, gzipped if the name ends in .gz, whole or not at all.

    If the profiler cannot write, it gives no error and leaves an incomplete file. Therefore it writes into a new folder
    beside `path`, and the file is checked before it is renamed.

    Raises:
        OSError: from `check_place`, or the trace cannot be written, as on a full disk.
    """
    check_place(path)
    path = path.resolve()  # replaces the target of a link, not the link
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        trace, packed = Path(folder, "trace.json"), Path(folder, path.name)
        recording.export_chrome_trace(str(trace))
        if not _is_whole(trace):
            raise OSError(errno.EIO, "the profiler has not written all of the trace; the disk may be full", str(path))
        if path.suffix == ".gz":
            with trace.open("rb") as source, gzip.open(packed, "wb", compresslevel=6) as target:
                shutil.copyfileobj(source, target)
        os.replace(packed if path.suffix == ".gz" else trace, path)


def check_place(path: Path) -> None:
    """Raise OSError if `path` is something other than a regular file, since a trace would replace it."""
    if path.exists() and not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EEXIST, "a trace cannot take the place of what is no regular file", str(path))


def _is_whole(trace: Path) -> bool:
    """Return True if a trace exists and ends in its last bracket."""
    if not trace.is_file():
        return False
    with trace.open("rb") as file:
        file.seek(max(0, trace.stat().st_size - 64))
        return file.read().rstrip().endswith(b"}")


def _table(parts: Any, n_steps: int) -> list[str]:
    """Return a table of the operations with the most time of their own per step, on the GPU if there is one."""
    parts = [part for part in parts if not part.key.startswith("step ")]
    on_gpu = any(part.self_device_time_total for part in parts)
    times = [(part.self_device_time_total if on_gpu else part.self_cpu_time_total, part) for part in parts]
    whole = sum(time for time, _ in times) or 1
    largest = sorted(times, key=lambda pair: -pair[0])[:ROWS]
    where = "GPU" if on_gpu else "CPU"
    return [f"{'ms a step':>10} {'share':>6} {'calls':>7}  on the {where}",
            *(f"{time / 1000 / n_steps:10.2f} {time / whole:6.1%} {part.count / n_steps:7g}  {part.key[:80]}"
              for time, part in largest)]
