"""Search the kernels' tile shapes on the GPU at hand, and write what wins to kernels/tuned/gpus/.

Each operation of the benchmarks' registry runs at phi-1's shapes, forward and backward, and what its kernels look up in
the tables is noted. Then each candidate tile of each of these kernels is forced in turn: what the operation computes,
gradients included, is held against the reference in float64, and the pass that looks the tile up is timed: a forward as
in training, where it also writes what the backward needs. The fastest tile that is right goes into the GPU's table at
once, so that a search that is stopped has lost nothing; the same command goes on with it. After a tile that has taken
the GPU away from the process the exit code is 3: the same command goes on behind that tile. A second search of the same
GPU into the same folder is refused.

`phi1 bench static --check` refuses what is written here until `phi1 bench static --update` has compiled it.
"""

from __future__ import annotations

import argparse
import importlib
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import phi1.kernels
from phi1.arguments import path_option
from phi1.bench.harness import check
from phi1.bench.harness.case import Case, Inputs
from phi1.bench.harness.counting import lookups_on_paper
from phi1.bench.harness.parser import MakeParser, plain_parser
from phi1.bench.harness.processes import end_with_parent, sigterm_as_ctrl_c
from phi1.bench.harness.runner import DeviceLostError, one_line, release, still_there
from phi1.bench.harness.timing import Call, CudaClock, quantile
from phi1.bench.tune.cases import Task, chosen_cases, tasks_of, tunable
from phi1.bench.tune.compile_ahead import compile_ahead
from phi1.bench.tune.store import Store, Tile, trial_key, when_of
from phi1.kernels.core import tiles as _tuned
from phi1.kernels.core.tiles import Lookup

TABLES = Path(phi1.kernels.__path__[0]) / "tuned" / "gpus"
WORTH = 0.99  # a tile must take under 99 % of the table's time to replace it: less is noise
ROUNDS = 7
COMPILE_SHARE = 0.4  # of the time budget, at most, for compiling all candidates at once
LOST, INTERRUPTED = 3, 130
# Not LookupError: Triton's compiler ends in "IndexError: map::at" on some tiles.
NO_TILES_FAULT = (TypeError, AttributeError, NameError, KeyboardInterrupt)
Timer = Callable[[Call], float]


def _name(lookup: Lookup) -> str:
    return " ".join([lookup.op, lookup.kernel, *(f"{name}={value}" for name, value in lookup.shape)])


class Tuner:
    """Tries tiles.

    Args:
        device: where.
        store: what is known already, and where the winners go.
        timer: milliseconds of a call; injected in tests.
        deadline: time.monotonic() after which no trial starts.
        say: called with a line at each result.
    """

    def __init__(self, device: torch.device, store: Store, timer: Timer, deadline: float,
                 say: Callable[[str], None] = print) -> None:
        self.device, self.store, self.timer, self.deadline, self.say = device, store, timer, deadline, say
        self.versions = f"torch {torch.__version__} triton {importlib.import_module('triton').__version__}"

    def run(self, tasks: Sequence[Task]) -> bool:
        """Search; returns whether all tasks were finished before the deadline."""
        finished = [self._search(task) for task in tasks]
        return all(finished)

    def _search(self, task: Task) -> bool:
        keys = [trial_key(task.lookup, tile, task.timed, self.versions) for tile in task.tiles]
        trials = [self.store.trial(key) for key in keys]
        if not all(trials) and time.monotonic() < self.deadline:
            try:
                inputs = task.case.draw(self.device)
                judge = _judge(task.case, inputs)
            except NO_TILES_FAULT:
                raise
            except Exception as error:  # most likely memory that another program holds: the next kernel may need less
                self.say(f"{_name(task.lookup)}: nothing to hold its tiles against, none was tried: {one_line(error)}")
                still_there(self.device)
                return False
            for i, (key, tile) in enumerate(zip(keys, task.tiles, strict=True)):
                if not trials[i] and time.monotonic() < self.deadline:
                    trials[i] = self._try(task, key, tile, inputs, judge)
            release(self.device)
        finished = [(trial, tile) for trial, tile in zip(trials, task.tiles, strict=True) if trial]
        self._conclude(task, [(trial["ms"], tile) for trial, tile in finished if "ms" in trial],
                       sum("error" in trial for trial, _ in finished), len(finished))
        return len(finished) == len(task.tiles)

    def _try(self, task: Task, key: str, tile: Tile, inputs: Inputs, judge: Callable[[], str]) -> dict[str, Any]:
        """The outcome of a tile, as it is noted. Its start is noted first: one without an end has ended the process."""
        facts = {"op": task.lookup.op, "kernel": task.lookup.kernel, "shape": dict(task.lookup.shape),
                 "tile": dict(tile), "case": task.timed}
        broke = False
        try:
            self.store.note(key, **facts)
            with _tuned.forced(task.lookup.op, task.lookup.kernel, tile):
                try:
                    outcome = self._measured(task, inputs, judge)
                except NO_TILES_FAULT:
                    raise
                except Exception as error:  # out of shared memory, registers or patience: the next tile may do
                    outcome, broke = {"error": one_line(error)}, True
            noted = self.store.note(key, **facts, **outcome)
        except BaseException:  # a mistake of ours, or Ctrl-C at any line
            self.store.forget(key)
            raise
        if broke:
            still_there(self.device)
        return noted

    def _measured(self, task: Task, inputs: Inputs, judge: Callable[[], str]) -> dict[str, Any]:
        if complaint := judge():
            return {"error": f"wrong: {complaint}"}
        return {"ms": float(f"{self.timer(task.call(self.device, inputs)):.4g}")}

    def _conclude(self, task: Task, timed: list[tuple[float, Tile]], failed: int, finished: int) -> None:
        """Write the winner of what was tried, if the table's own tile is among it."""
        own = next((ms for ms, tile in timed if tile == task.tiles[0]), None)
        if own is None:
            self.say(f"{_name(task.lookup)}: the table's own tile was not timed, nothing is written")
            return
        ms, best = min(timed, key=lambda item: item[0])
        if ms > WORTH * own:
            ms, best = own, task.tiles[0]
        self.store.write_winner(task.lookup, when_of(task.lookup, task.row), best, _tuned.architecture(self.device))
        left = f", {len(task.tiles) - finished} not tried" if finished < len(task.tiles) else ""
        self.say(f"{_name(task.lookup)}: {dict(best)} {ms:.4g} ms, the table's {own:.4g} ms ({own / ms:.2f}x); "
                 f"{finished} tiles, {failed} of them failed{left}")


def _judge(case: Case, inputs: Inputs) -> Callable[[], str]:
    """The fault of the results that the forced tile gives; "" if there is none. Against float64 where that fits into
    memory, and else against the table's own tile, which the tests have checked."""
    function = case.providers[0].prepare(case, next(x.device for x in inputs.values() if hasattr(x, "device")))
    try:
        exact = check.Exact(case, inputs)
        return lambda: exact.judge(function, "phi1").complaint
    except torch.OutOfMemoryError:
        release(inputs[case.leaves[0]].device)
    expected = check.results(case, function, inputs)

    def compare() -> str:
        for name, out in check.results(case, function, inputs).items():
            allowed = 4 * torch.finfo(out.dtype).eps * expected[name].abs().max()
            if not (out - expected[name]).abs().max() <= allowed:
                return f"{name} is not what the table's tile gives"
        return ""

    return compare


def cuda_timer(call: Call) -> float:
    """Median of CUDA events, the host's time hidden."""
    clock = CudaClock(hide_host=True)
    clock.prepare(call)
    return quantile([ms for turn in range(ROUNDS) for ms in clock.sample(call, turn)], 0.5)


def _compile_ahead(options: argparse.Namespace, seconds: float) -> None:
    command = [sys.executable, __file__, "--dtype", options.dtype, "--minutes", str(seconds / 60)]
    command += [word for op in options.op for word in ("--op", op)]
    if complaint := compile_ahead(command, options.compilers, seconds + 30):
        print(f"phi1 tune: {complaint}", file=sys.stderr)


def _compile_share(share: str, tasks: Sequence[Task], device: torch.device, deadline: float) -> int:
    number, of = map(int, share.split("/"))
    trials = [(task, tile) for task in tasks for tile in task.tiles]
    for task, tile in trials[number::of]:
        if time.monotonic() > deadline:
            break
        with _tuned.forced(task.lookup.op, task.lookup.kernel, tile):
            try:
                task.call(device, task.case.draw(device))(0)
            except NO_TILES_FAULT:
                raise
            except Exception:  # the search meets it again and notes it
                still_there(device)
    return 0


def _parse(argv: Sequence[str], make_parser: MakeParser) -> argparse.Namespace:
    parser = make_parser("phi1 tune", (__doc__ or "").partition("\n")[0])
    parser.add_argument("--op", action="append", default=[], choices=tunable(), metavar="OP",
                        help=f"tune this one alone; may be repeated: {', '.join(tunable())}")
    parser.add_argument("--minutes", type=float, default=30.0, help="start no trial after this long (%(default)s)")
    parser.add_argument("--dtype", default="float16", choices=("float16", "bfloat16"), help="(%(default)s)")
    parser.add_argument("--out", type=path_option, default=TABLES, help="folder of the tables (%(default)s)")
    parser.add_argument("--compilers", type=int, default=4, help="processes that compile ahead (%(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="list what would be tried; needs no GPU")
    parser.add_argument("--compile-share", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if not 0 < options.minutes < math.inf or options.compilers < 0:
        parser.error("--minutes must be over 0 and finite, and --compilers at least 0")
    if not chosen_cases("cuda", options.op, options.dtype):
        parser.error(f"--dtype {options.dtype}: there is no case of {', '.join(options.op)} in it")
    return options


def _dry_run(options: argparse.Namespace) -> int:
    found = _tasks(options, "sm_90")
    for task in found:
        print(f"{_name(task.lookup)}: {len(task.tiles)} tiles, timed as {task.timed}")
    tiles = sum(len(task.tiles) for task in found)
    print(f"phi1 tune: {len(found)} kernels and shapes, {tiles} tiles; nothing was run")
    return 0


def _tasks(options: argparse.Namespace, arch: str) -> list[Task]:
    cases = chosen_cases("cuda", options.op, options.dtype)
    return tasks_of(cases, arch, lambda case: lookups_on_paper(case, arch))


def main(argv: Sequence[str], make_parser: MakeParser = plain_parser) -> int:
    options = _parse(argv, make_parser)
    if options.dry_run:
        return _dry_run(options)
    if not torch.cuda.is_available():
        print("phi1 tune: error: tiles are timed on a GPU, and there is none; --dry-run lists what would be tried",
              file=sys.stderr)
        return 2
    try:
        with sigterm_as_ctrl_c():  # which takes the trial under way back, and ends the processes that compile
            return _tune(options, torch.device("cuda"), time.monotonic() + 60 * options.minutes)
    except DeviceLostError as error:
        print(f"phi1 tune: {error}; the same command goes on behind this tile", file=sys.stderr)
        return LOST
    except KeyboardInterrupt:
        print("phi1 tune: stopped; the same command goes on", file=sys.stderr)
        return INTERRUPTED
    except OSError as error:
        print(f"phi1 tune: error: {error}", file=sys.stderr)
        return 2


def _tune(options: argparse.Namespace, device: torch.device, deadline: float) -> int:
    if options.compile_share:  # the files are of the search that has started this process
        end_with_parent()
        return _compile_share(options.compile_share, _tasks(options, _tuned.architecture(device)), device, deadline)
    gpu = torch.cuda.get_device_name()
    with Store(options.out, gpu) as store:
        found = _tasks(options, _tuned.architecture(device))
        if options.compilers:
            _compile_ahead(options, COMPILE_SHARE * 60 * options.minutes)
        done = Tuner(device, store, cuda_timer, deadline, lambda line: print(line, flush=True)).run(found)
    print(f"phi1 tune: {gpu}, {len(found)} kernels and shapes, {'all tried' if done else 'not all tried'}; "
          f"{store.table}{'' if done else '; the same command goes on'}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
