"""Help for the tests of corpora and runs: files, a tiny corpus and recipe, and runs of them as real processes."""

from __future__ import annotations

import inspect
import itertools
import json
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any

from forked_scripts import PRELOADED, run_script
from torch import Tensor

from phi1.config import preset
from phi1.train.checkpoint.checkpoint import Saver, gather_weights
from phi1.train.data.batch_plan import BatchPlan
from phi1.train.data.corpus import Corpus
from phi1.train.metrics.ledger import read_ledger
from phi1.train.recipe.recipe import Train
from phi1.train.runtime.engine import Engine, build_model
from phi1.train.runtime.launch import Rank
from phi1.train.step.trainer import Trainer

SCRIPT = Path(__file__).parents[2] / "train" / "pretrain.py"
STEPS = 60
TINY = {"model.vocab_size": 512, "model.hidden_size": 64, "model.intermediate_size": 128, "model.num_hidden_layers": 2,
        "model.num_attention_heads": 2, "data.folder": "data", "data.vocab_size": 512, "data.seq_len": 64,
        "train.steps": STEPS, "train.warmup_steps": 10, "train.dropout": 0.1, "train.precision": "fp32",
        "train.threads": 1, "checkpoint.every": 20, "eval.sequences": 8, "eval.completions": 1, "run.device": "cpu",
        "run.tensorboard": "false"}
_CHANGES = ("open", "write", "truncate", "mkdir", "replace", "rename", "unlink", "rmdir")
SMALL = preset("nano", vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
               num_attention_heads=2, max_position_embeddings=64, rotary_dim=8, attention_dropout=0.1,
               residual_dropout=0.1)
FUNCTION = '''def scale_{i}_{j}(values, factor={j}):
    """Multiply every value by the factor."""
    result = []
    for value in values:
        result.append(value * factor + {i})
    return result


'''


def make_corpus(place: Path, val_fraction: float = 0.1) -> None:
    """Write 40 files of functions to place/source, and prepare them in place/data."""
    from phi1.train.prepare.prepare import (
        prepare,  # imported here, because not every test needs a corpus or has datasets
    )

    (place / "source").mkdir()
    for i in range(40):
        (place / "source" / f"m{i}.py").write_text("".join(FUNCTION.format(i=i, j=j) for j in range(12)))
    prepare(str(place / "source"), place / "data", tokenizer="train", vocab_size=512, val_fraction=val_fraction,
            workers=1)


def write_files(folder: Path, files: dict[str, str | bytes]) -> Path:
    """Write files into a folder, by their paths in it, and return the folder."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def folder_content(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file in a folder, by its path in it."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def command(run: str, processes: int = 0, script: Path = SCRIPT, launcher: tuple[str, ...] = (),
            **changes: object) -> list[str]:
    """Return the command line of a run in the folder `run`.

    Args:
        run: the run's folder.
        processes: the number of processes under torchrun; 0 takes plain Python.
        script: pretrain.py or finetune.py.
        launcher: options of torchrun.
        changes: keys of the recipe, `train__steps` for train.steps.
    """
    words = [sys.executable]
    if processes:
        words += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), *launcher]
    options = TINY | {"run.folder": run} | {key.replace("__", "."): value for key, value in changes.items()}
    return [*words, str(script), *(word for key, value in options.items() for word in (f"--{key}", str(value)))]


def start(place: Path, run: str, *args: Any, hold: str = "", environment: dict[str, str] | None = None,
          **changes: Any) -> subprocess.Popen[str]:
    """Start a run in a process group of its own, so that a test can end all processes of the run.

    With `hold`, the run waits in that checkpoint until `release`.
    """
    held = injected(place / f"{run}.hook", holding(place, run, hold)) if hold else {}
    return subprocess.Popen(command(run, *args, **changes), cwd=place, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, start_new_session=True, env=os.environ | held | (environment or {}))


def injected(folder: Path, code: str) -> dict[str, str]:
    """Write `code` to `folder` and return an environment in which every Python runs it at its start."""
    write_files(folder, {"sitecustomize.py": code})
    return {"PYTHONPATH": os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))}


def holding(place: Path, run: str, checkpoint: str) -> str:
    """Return code to inject into a run, which makes it wait for `release` as it begins to save the checkpoint.

    Without it, on a busy machine the run could end before the test acts.
    """
    return f"""import os, time
make = os.mkdir
def make_and_wait(path, *args, **options):
    make(path, *args, **options)
    while "/.{checkpoint}." in str(path) and not os.path.exists({str(place / f"{run}.released")!r}):
        time.sleep(0.02)
os.mkdir = make_and_wait
"""


def release(place: Path, run: str) -> None:
    """Let a run go on that waits in `hold`, or will."""
    (place / f"{run}.released").touch()


def run(place: Path, *args: Any, preexec_fn: Callable[[], None] | None = None,
        **changes: Any) -> subprocess.CompletedProcess[str]:
    """Run to the end; a process without torchrun is forked from one that has imported torch."""
    words = command(*args, **changes)
    if words[1] != "-m" and preexec_fn is None:
        return run_script(words, place)
    return subprocess.run(words, cwd=place, text=True, capture_output=True, timeout=300, preexec_fn=preexec_fn)


def train(place: Path, *args: Any, **changes: Any) -> str:
    """Run to the end, which must succeed, and return the output."""
    done = run(place, *args, **changes)
    assert done.returncode == 0, done.stderr
    return done.stdout


def wait_for(process: subprocess.Popen[str], happened: Callable[[], bool], seconds: float = 300) -> None:
    """Wait until something has happened while the process runs."""
    def has_happened() -> bool:
        code = process.poll()  # polled first: a run that ends now may have done it just before
        if not happened():
            assert code is None, process.communicate()
            return False
        return True

    wait_until(has_happened, seconds)


def wait_until(happened: Callable[[], object], seconds: float = 300) -> None:
    """Wait until something has happened."""
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.002)


def alive(pid: int) -> bool:
    """Return True if a process runs; one that is dead but not reaped does not."""
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def in_processes(count: int, action: Callable[..., Any], folder: Path, *args: Any, seconds: float = 240) -> list[Any]:
    """Return the results of `action(rank, store, *args)` in `count` processes, which a FileStore in `folder` connects.

    The processes are forked from one that has imported torch already, which saves each of them two seconds.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    store = folder / f"store-{time.monotonic_ns()}"
    with ProcessPoolExecutor(count, context) as pool:
        # Actions go by file and name, because other processes do not know the names under which pytest imports tests.
        jobs = [pool.submit(_in_process, inspect.getfile(action), action.__name__,
                            Rank(rank, count, rank, count), store, args) for rank in range(count)]
        try:
            return [job.result(seconds) for job in jobs]
        except BaseException:
            for process in multiprocessing.active_children():  # the others wait for the process that has failed
                process.kill()
            raise


def _in_process(file: str, name: str, rank: Rank, store: Path, args: tuple[Any, ...]) -> Any:
    from torch import distributed as dist

    return runpy.run_path(file)[name](rank, dist.FileStore(str(store), rank.world_size), *args)


def killed_before(call: int, action: Callable[..., Any], *args: Any) -> bool:
    """Run `action(*args)` in a forked process, which is killed before its call number `call` that changes a file.

    Return True if it was killed, and False if it ended before.
    """
    process = os.fork()
    if process:
        return os.WIFSIGNALED(os.waitpid(process, 0)[1])
    calls = itertools.count()

    def look_on(frame: FrameType, event: str, function: Any) -> None:
        if event == "c_call" and function.__name__ in _CHANGES and next(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(look_on)
    try:
        action(*args)
    finally:  # the forked copy of the test ends too
        os._exit(0)


def finished(place: Path, name: str) -> int:
    """Return the newest step in a ledger that is being written, or 0 before the first."""
    return max((line.get("step", 0) for line in _whole_lines(place, name)), default=0)


def starts(place: Path, name: str) -> int:
    """Return how often a run has started, from a ledger that is being written."""
    return sum("start" in line for line in _whole_lines(place, name))


def _whole_lines(place: Path, name: str) -> list[dict[str, Any]]:
    try:
        text = (place / name / "ledger.jsonl").read_text()
    except OSError:
        return []
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("}\n")]


def steps(place: Path, name: str) -> list[dict[str, Any]]:
    """Return the steps in a run's ledger, without the measured times."""
    return [{key: value for key, value in line.items() if key != "measured"}
            for line in read_ledger(place / name / "ledger.jsonl") if "step" in line]


def evaluations(place: Path, name: str) -> list[dict[str, Any]]:
    """Return the evaluations in a run's ledger."""
    return [line["eval"] for line in read_ledger(place / name / "ledger.jsonl") if "eval" in line]


def weights(place: Path, name: str) -> bytes:
    """Return the exported weights of a finished run."""
    return (place / name / "export" / "model.safetensors").read_bytes()


def error_line(done: subprocess.CompletedProcess[str], program: str = "pretrain") -> str:
    """Return the one line that a refused command prints."""
    assert done.returncode == 2, (done.stdout, done.stderr)
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith(f"{program}: error: ")
    return lines[0]


def make_trainer(corpus: Corpus, engines: dict[str, Engine], precision: str = "fp32", **changes: Any) -> Trainer:
    """Return a trainer of two layers with dropout, in this process alone; `changes` are keys of Train."""
    train = Train(**({"steps": 20, "warmup_steps": 2, "batch_size": 4, "micro_batch_size": 2, "lr": 1e-2} | changes))
    model = build_model(SMALL, engines[precision], seed=1)
    return Trainer(model, train, 32, corpus, BatchPlan.of(4, 2, 0, 1), engines[precision])


def save_checkpoint(trainer: Trainer, folder: Path, facts: dict[str, Any], keep: int) -> Path:
    """Write `folder`/step-N on all ranks, wait for it and return its path. Arguments and errors are `Saver`'s."""
    saver = Saver(folder, keep)
    saver.begin(trainer, facts)
    return saver.finish().path


def weights_of(trainer: Trainer) -> dict[str, Tensor]:
    """Return a copy of the parameters."""
    return {name: tensor.clone() for name, tensor in gather_weights(trainer.model).items()}
