"""Scripts in processes that are forked from one that has imported torch, which saves each of them seconds."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

PRELOADED = ["phi1.train.checkpoint.checkpoint"]


def run_script(words: list[str], folder: Path, seconds: float = 300) -> subprocess.CompletedProcess[str]:
    """Run `python SCRIPT ARGUMENTS...` to its end in a folder, as subprocess.run with text and captured output does.

    Args:
        words: the command line; its first word is the interpreter.
        folder: the working directory.
        seconds: after which the process is killed.

    Raises:
        subprocess.TimeoutExpired: it was killed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as outputs:
        out, err = Path(outputs, "out"), Path(outputs, "err")
        process = context.Process(target=_run_here, args=(words[1:], folder, dict(os.environ), out, err))
        process.start()
        process.join(seconds)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(words, seconds, out.read_text(), err.read_text())
        return subprocess.CompletedProcess(words, process.exitcode, out.read_text(), err.read_text())


def _run_here(words: list[str], folder: Path, environment: dict[str, str], out: Path, err: Path) -> None:
    for path, descriptor in ((out, 1), (err, 2)):
        file = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(file, descriptor)
        os.close(file)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = words
    try:
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit:
        raise
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
