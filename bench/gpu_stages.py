"""The stages of bench/gpu.sh: which commands each runs, for how long, and the short table at the end.

    python bench/gpu_stages.py STAGE --out DIR [--rehearse]
    python bench/gpu_stages.py --needs STAGE ...       names of packages that are missing, one a line
    python bench/gpu_stages.py --absent DIR STAGE      names of packages that have a wheel in DIR and are not installed

A stage ends within nine minutes, or five times as long when it is rehearsed: each command has a limit of its own, and
none starts when the stage's time is up. A command at its limit is interrupted, so that it can say what it knows, and
killed later. What a command prints goes to DIR/STAGE/NAME.log as it comes.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from phi1.bench.processes import end_session, signals_later

BENCH = Path(__file__).resolve().parent
ROOT = BENCH.parent
STAGE_SECONDS = 525
LAST_WORDS_SECONDS = 10
REHEARSAL_TIMES = 5  # as long, since the CPU may be a slow one, and busy
LOST = "GPU lost"  # the tuner's exit code 3: a tile took the GPU's context with it; another process goes on behind it
WORTH_SECONDS = 60  # for another process to find something
SHOWN_LINES = 12
# A line a test, so that what ran is known where the time was not enough.
PYTEST = ("-m", "pytest", "-v", "-rf", "--tb=short", "-p", "no:cacheprovider", "-p", "phi1.bench.print_failures",
          "-o", "addopts=--import-mode=importlib")
LAYER = "parallel_block N=16384 T=2048 D=2048 F=8192 H=32 float16 forward+backward"
SMALL_LAYER = "parallel_block N=256 T=128 D=256 F=1024 H=4 float32 forward+backward cpu"
LAYER_PEERS = ("torch", "torch+sdpa-cudnn", "liger+cudnn", "transformers-max")

NEEDS = {
    "check": ("pytest", "pytest_benchmark", "hypothesis", "transformers", "phi1.weights", "phi1.train.run",
              "phi1.train.prepare", "datasets", "setuptools"),
    "kernels": ("phi1.bench.runner",), "block": ("phi1.bench.runner", "transformers"),
    "train": ("phi1.train.run", "phi1.train.prepare", "datasets"),
    "decode": ("phi1.generation", "transformers"), "tune": ("phi1.bench.runner",),
    "profile": ("phi1.bench.runner",),
}
"""Stage -> modules that must import."""


@dataclass(frozen=True)
class Command:
    """One command of a stage.

    Args:
        name: of its log and its row.
        words: the command; Python's where it starts with a script or an option.
        seconds: its limit.
        program: skipped, and said so, where this program is not on the PATH.
        environment: added to the stage's.
        minutes: of the tuner: its last word is these or, where the stage has less left, that.
    """

    name: str
    words: tuple[str, ...]
    seconds: int = STAGE_SECONDS
    program: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    minutes: float = 0.0


def commands(stage: str, out: Path, rehearse: bool, scratch: Path) -> list[Command]:
    """The commands of a stage; a rehearsal runs the same scripts on a CPU, with little work.

    `scratch` is for what is needed while the stage runs.
    """
    script = {name: str(BENCH / f"gpu_{name}.py") for name in ("train", "profile", "sanitize")}
    tiny = ("--rehearse",) if rehearse else ()
    if stage == "check":
        return _rehearsed_check(script["sanitize"]) if rehearse else _check(script["sanitize"])
    if stage in ("kernels", "block", "decode"):
        return _bench(stage, out, rehearse)
    if stage == "train":
        minutes = ("--minutes", "2.5"), ("--minutes", "4.5")
        folders = ("--out", str(out), "--corpus", str(scratch / "corpus"))
        return [Command(part, (script["train"], part, *folders, *limit, *tiny), seconds)
                for part, limit, seconds in zip(("search", "run"), minutes, (230, 330), strict=True)]
    if stage == "tune":
        tune = (str(BENCH / "tune.py"), "--out", str(out / "tuned"))
        search = Command("search", (*tune, "--compilers", "6", "--minutes"), minutes=8.0)
        dry = Command("list", (*tune, "--dry-run"), 60)
        return [dry, *([] if rehearse else [search])]
    return [Command("trace", (script["profile"], "trace", "--out", str(out), *tiny), 200),
            Command("counters", (script["profile"], "counters", "--out", str(out), *tiny), 300)]


def _check(sanitize: str) -> list[Command]:
    tests = sorted((ROOT / "tests").glob("test_*.py"))
    kernels = [str(path) for path in tests if path.name.endswith("_kernels.py")]
    # The interpreter's tests say nothing here, nor do those of packaging; the rest is what users run.
    rest = [str(path) for path in tests if str(path) not in kernels
            and path.name not in ("test_interpreter.py", "test_packaging.py", "test_gpu_rehearsal.py")]
    return [
        Command("kernels", (*PYTEST, *_side_by_side(6), *kernels), 240),
        Command("sanitizer", ("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9", sys.executable,
                              sanitize), 100, program="compute-sanitizer",
                # PyTorch's allocator cuts tensors out of large blocks, within which memcheck sees no bounds.
                environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}),
        Command("suite", (*PYTEST, *_side_by_side(6), *rest), 250),
    ]


def _side_by_side(workers: int) -> tuple[str, ...]:
    return ("-n", str(workers)) if importlib.util.find_spec("xdist") else ()


def _rehearsed_check(sanitize: str) -> list[Command]:
    tests = ROOT / "tests"
    return [
        Command("kernels", (*PYTEST, str(tests / "test_layer_norm_kernels.py"), "-k", "widest or empty"), 100,
                environment={"TRITON_INTERPRET": "1"}),
        Command("sanitizer", (sanitize, "--rehearse"), 60),
        Command("suite", (*PYTEST, str(tests / "test_config.py"), str(tests / "test_philox.py")), 100),
    ]


def _bench(stage: str, out: Path, rehearse: bool) -> list[Command]:
    """The benchmarks of a stage: the short selection first, then all of it as far as the time goes."""
    start = ("-c", "import sys; from phi1.cli import main; sys.exit(main())", "bench")
    chosen = {"kernels": ("--unit", "kernel"), "block": ("--unit", "block"),
              "decode": ("--op", "decode", "prefill")}[stage]
    model = ("--op", "micro-step", "--quick")

    def json(name: str) -> tuple[str, str]:
        return "--json", str(out / f"{name}.json")

    # The figure for a whole layer: its peer that is tuned for minutes has a command of its own.
    layer = ("--case", SMALL_LAYER if rehearse else LAYER, "--peers", *LAYER_PEERS, *json("max"))
    if rehearse:
        little = ("--device", "cpu", "--seconds", "0.01")
        alone = (*little, "--peers")
        quick = Command("quick", (*start, *chosen, "--quick", *json("quick"), *alone), 150)
        rest = (*start, *chosen, "--case", "gelu", "--last", str(out / "quick.json"), *json("all"), *alone)
        beside = [Command("max", (*start, *layer, *little), 150), Command("model", (*start, *model, *alone), 60)]
        return [quick, *{"block": beside, "kernels": [Command("all", rest, 60)]}.get(stage, [])]
    # `--minutes` starts no case too late to end before the limit, which would lose it. The whole model beside its peers
    # belongs to the block: it is what the block is for.
    minutes, seconds = ("2", 165) if stage == "block" else ("3.5", 260)
    quick = Command("quick", (*start, *chosen, "--quick", "--minutes", minutes, *json("quick")), seconds)
    beside = [Command("max", (*start, *layer), 185),
              Command("model", (*start, *model, "--minutes", "2", *json("model")), 165)] if stage == "block" else []
    return [quick, *beside,
            Command("all", (*start, *chosen, "--seconds", "1", "--minutes", "1" if beside else "3.5", "--last",
                            str(out / "quick.json"), *json("all")))]


@dataclass
class Row:
    """What came of a command."""

    name: str
    outcome: str
    seconds: float
    last: list[str]


def run(command: Command, folder: Path, seconds: float) -> Row:
    """Run one command within its limit, and then as long as its last words take; its session ends with it."""
    if command.program and shutil.which(command.program) is None:
        return Row(command.name, "skipped", 0.0, [f"{command.program} is not installed"])
    if seconds < 10:
        return Row(command.name, "no time", 0.0, [])
    words = command.words if command.program else (sys.executable, *command.words)
    if command.minutes:
        words = (*words, f"{min(command.minutes, seconds / 60 - 0.5):.2f}")
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
    return Row(command.name, outcome, time.monotonic() - begin, text[-SHOWN_LINES:])


def run_stage(stage: str, out: Path, rehearse: bool, scratch: Path | None = None) -> int:
    """Run a stage and print its table; 1 if a command failed or found no time, 2 if the stage runs there already."""
    from phi1.bench.files import lock

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
                   for command in commands(stage, folder, rehearse, scratch or folder)]
        return _run_commands(stage, folder, waiting, times * STAGE_SECONDS)
    finally:
        os.close(held)


def _run_commands(stage: str, folder: Path, waiting: list[Command], seconds: float) -> int:
    end = time.monotonic() + seconds
    rows = []
    while waiting:
        command = waiting.pop(0)
        rows.append(run(command, folder, end - time.monotonic()))
        if command.minutes and rows[-1].outcome == "exit 3":
            rows[-1].outcome = LOST
        print(f"-- {stage} {rows[-1].name}: {rows[-1].outcome}, {rows[-1].seconds:.0f} s", flush=True)
        for line in rows[-1].last:
            print(f"   {line[:160]}")
        if rows[-1].outcome == LOST and end - time.monotonic() > WORTH_SECONDS:
            waiting.insert(0, replace(command, name=f"{command.name}+"))
    print(f"\n{stage:10} {'outcome':10} {'s':>4}  last line")
    for row in rows:
        print(f"{row.name:10} {row.outcome:10} {row.seconds:4.0f}  {(row.last or [''])[-1][:110]}")
    print(f"results in {folder}", flush=True)
    # The long selection ends with the stage's time as a rule; what it has done is in its file.
    bad = [row for row in rows if row.outcome not in ("ok", "skipped", LOST) and not
           (row.name == "all" and row.outcome in ("time out", "no time"))]
    return 1 if bad else 0


def missing(stages: Sequence[str]) -> list[str]:
    """Packages without which the stages cannot run, as they are named at installation."""
    names = {}
    for module in dict.fromkeys(module for stage in stages for module in NEEDS[stage]):
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or error.name.startswith("phi1"):
                raise
            names[error.name.partition(".")[0].replace("_", "-")] = module
    return sorted(names)


def absent(wheels: Path) -> list[str]:
    """Distributions that have a wheel in the folder and are not installed."""
    from phi1.bench.providers import installed_version

    names = sorted({path.name.partition("-")[0].replace("_", "-") for path in wheels.glob("*.whl")})
    return [name for name in names if installed_version(name) is None]


def main() -> int:
    # SIGINT too, which a shell lets its background processes ignore, and they theirs.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    parser = argparse.ArgumentParser(prog="gpu.sh", description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("stages", nargs="+", choices=list(NEEDS), metavar="STAGE", help=", ".join(NEEDS))
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--scratch", type=Path, help="folder for what only the stage needs (the results')")
    parser.add_argument("--needs", action="store_true")
    parser.add_argument("--absent", type=Path, metavar="WHEELS")
    options = parser.parse_args()
    if options.needs or options.absent:
        for name in absent(options.absent) if options.absent else missing(options.stages):
            print(name)
        return 0
    from phi1.bench.environment import commit  # only here: what the package needs may be missing above

    if commit() == "unknown":
        print("gpu.sh: the sources' commit is unknown, as there is no git here: set PHI1_COMMIT, or results name none",
              flush=True)
    return max([run_stage(stage, options.out, options.rehearse, options.scratch) for stage in options.stages])


if __name__ == "__main__":
    sys.exit(main())
