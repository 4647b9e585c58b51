"""Code to prepare, a prepared corpus and an uninterrupted run of it, made once for all tests."""

import contextlib
import os
import resource
import shutil
import signal
import sysconfig
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded():
    """Seed PyTorch, so that a test draws the same numbers in every run and every order."""
    torch.manual_seed(0)


@pytest.fixture
def sigterm():
    """Send this process SIGTERM, which the tested code must handle; afterwards the old handler must be back."""
    def unexpected(number, frame):
        raise AssertionError("SIGTERM would have ended the process")

    before = signal.signal(signal.SIGTERM, unexpected)
    yield lambda: os.kill(os.getpid(), signal.SIGTERM)
    after = signal.signal(signal.SIGTERM, before)
    assert after is unexpected, "SIGTERM was not given back"


@pytest.fixture
def full_disk():
    """Return a context in which no file can grow beyond 4 KiB, as on a full disk."""
    @contextlib.contextmanager
    def limited():
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited


@pytest.fixture(scope="session")
def code(tmp_path_factory):
    """A folder of 0.8 MB of real code."""
    folder = tmp_path_factory.mktemp("code")
    for name in ("json", "asyncio", "email"):
        shutil.copytree(Path(sysconfig.get_path("stdlib")) / name, folder / name,
                        ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A working directory with a prepared corpus in data/."""
    from training_runs import make_corpus  # imported here, because tests of kernels need none of its packages

    folder = tmp_path_factory.mktemp("runs")
    make_corpus(folder)
    return folder


@pytest.fixture(scope="session")
def uninterrupted(place):
    """The output of a whole run in one process; its folder is whole/."""
    from training_runs import train

    return train(place, "whole")


@pytest.fixture(scope="session")
def uninterrupted_pair(place):
    """The output of the same run in two processes; its folder is pair/."""
    from training_runs import train

    return train(place, "pair", 2)


@pytest.fixture(scope="session")
def small_corpus(tmp_path_factory):
    """The training split that `make_trainer` takes."""
    from phi1.train.data.corpus import open_corpus
    from phi1.train.prepare.prepare import prepare

    folder = tmp_path_factory.mktemp("data")
    source = folder / "source"
    source.mkdir()
    for i in range(8):
        functions = (f"def add_{i}_{j}(a, b):\n    return a + b * {j}\n" for j in range(40))
        (source / f"m{i}.py").write_text("".join(functions))
    prepare(str(source), folder / "corpus", tokenizer="train", vocab_size=320, workers=1)
    return open_corpus(folder / "corpus")


@pytest.fixture(scope="module")
def engines():
    """Engines by precision, in a group of one process."""
    from torch.distributed import HashStore

    from phi1.train.runtime.engine import connect_processes, start
    from phi1.train.runtime.launch import Rank

    threads = torch.get_num_threads()
    by_precision = {precision: start(Rank(), "cpu", precision, 1) for precision in ("fp32", "fp16", "bf16")}
    connect_processes(by_precision["fp32"], Rank(), HashStore())
    yield by_precision
    torch.distributed.destroy_process_group()
    torch.set_num_threads(threads)
