"""Root pytest configuration: keep the checkout off sys.path, register `--benchmark`, `--slow` and `--full`, and divide
the machine's cores among the workers of `-n`."""

import os
import signal
import sys
from pathlib import Path

import pytest

# transformers probes for a package called `kernels`; with the checkout on sys.path it would find ours.
ROOT = Path(__file__).resolve().parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
MOST_WORKERS = 8  # each takes up to 1 GB
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if WORKERS > 1:  # before torch is imported: more threads than cores spin and wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, CORES // WORKERS)))
# A command started with `&` in a script ignores Ctrl-C, and so would the processes that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--benchmark", action="store_true", help="run the benchmarks in bench/ and nothing else")
    parser.addoption("--slow", action="store_true", help="run the tests marked slow as well")
    parser.addoption("--full", action="store_true",
                     help="run every fault at 1, 2 and 4 processes and write the table in docs/ (implies --slow)")


def pytest_configure(config: pytest.Config) -> None:
    # pytest-benchmark reads its options in a trylast hook, so they may be set here.
    if config.option.benchmark:
        config.option.benchmark_only = True
    else:
        config.option.benchmark_skip = True


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    """Write the environment into `--benchmark-json`: GPU, driver, torch, Triton, the peers' versions, the commit."""
    import torch

    from phi1.bench.harness.environment import environment

    machine_info["phi1"] = environment("cuda" if torch.cuda.is_available() else "cpu")


def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict) -> None:
    """Write the commit, which $PHI1_COMMIT names where there is no git."""
    from phi1.bench.harness.environment import commit

    commit_info["phi1"] = commit()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Return the number of workers of `-n auto`."""
    return min(MOST_WORKERS, CORES)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Let idle workers take tests from the others, unless `--dist` names another way."""
    if config.option.dist != "load":
        return None
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if WORKERS > 1:
        items.sort(key=lambda item: item.get_closest_marker("long") is None)
        for item in items:
            if "alone" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="speed: run without -n"))
    if config.option.slow or config.option.full:
        return
    skip = pytest.mark.skip(reason="slow: run with --slow")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)
