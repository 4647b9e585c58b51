"""Compile many kernels in processes of their own."""

from __future__ import annotations

import contextlib
import queue
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import Pipe, get_context
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from phi1.bench.compile.arch import Report
from phi1.bench.harness.processes import begin_worker

if TYPE_CHECKING:
    from phi1.bench.compile.launches import Case

Job = tuple[str, "Case"]
"""(architecture, what is compiled for it)."""


def compile_all(jobs: Sequence[Job], processes: int = 2) -> Iterator[tuple[Job, Report]]:
    """Compile cases in processes of their own; the report of what fails, or kills the compiler, is its error.

    All of them have ended when it returns, also where it is closed or interrupted.

    Raises:
        Exception: a mistake of ours in one of these processes.
    """
    waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
    finished: queue.SimpleQueue[tuple[Job, Report] | Exception] = queue.SimpleQueue()
    for job in jobs:
        waiting.put(job)
    threads = []
    ended, lifeline = Pipe(duplex=False)
    try:
        for _ in range(min(processes, len(jobs))):
            threads.append(threading.Thread(target=_work, args=(waiting, finished, ended), daemon=True))
            threads[-1].start()
        for _ in jobs:
            outcome = finished.get()
            if isinstance(outcome, Exception):
                raise outcome
            yield outcome
    finally:
        with contextlib.suppress(queue.Empty):
            while True:
                waiting.get_nowait()
        lifeline.close()  # nothing waits any more, so that nothing begins in place of what ends by this
        for thread in threads:
            thread.join()


def _work(waiting: queue.SimpleQueue[Job], finished: queue.SimpleQueue[tuple[Job, Report] | Exception],
          ended: Connection) -> None:
    pool = _pool(ended)
    # What the pool starts inherits it, so that Ctrl-C while a process starts gives no traceback. Only here, as
    # `multiprocessing` lets SIGINT through when it makes its first pool.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        while True:
            job = waiting.get_nowait()
            try:
                report = pool.submit(_measure, job).result()
            except BrokenProcessPool:  # LLVM aborts the process on some inputs
                pool.shutdown()
                report, pool = Report(error="the compiler crashed"), _pool(ended)
            finished.put((job, report))
    except queue.Empty:
        pass
    except Exception as error:
        finished.put(error)
    finally:
        pool.shutdown()


def _pool(ended: Connection) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, get_context("spawn"), begin_worker, (ended,))


def _measure(job: Job) -> Report:
    from phi1.bench.compile.read import measure  # PyTorch and Triton are a compiler's, not those of who starts it

    arch, case = job
    try:
        return measure(case.launch, arch)
    except Exception as error:  # whatever the compiler raises is a refusal, and the other kernels are still compiled
        return Report(error=_line(error))


def _line(error: BaseException) -> str:
    while error.__cause__ is not None:  # an error in a function that a kernel calls is the cause of one in the kernel
        error = error.__cause__
    return (" ".join(str(error).split()) or type(error).__name__)[-300:]  # Triton quotes the source first
