"""Reports of a run that is out of memory: one line with the setting to change, a file with the plan's table and the
measured peak, and on a GPU PyTorch's record of its allocations.
"""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch

from phi1.gpus import Gpu
from phi1.train.data.batch_plan import BatchPlan
from phi1.train.plan.plan import FRAGMENTATION, GIB, Cluster, largest_micro_batch, memory, memory_lines
from phi1.train.recipe.recipe import Recipe
from phi1.train.runtime.engine import Engine, peak_memory_gib
from phi1.train.runtime.launch import Rank, RunError

EVENTS = 100_000  # number of the last allocations and releases that are recorded


@contextmanager
def explained(recipe: Recipe, engine: Engine, folder: Path, rank: Rank) -> Iterator[None]:
    """Turn running out of memory into a RunError, and write the reports into `folder`."""
    if engine.device.type == "cuda":
        torch.cuda.memory._record_memory_history(stacks="python", max_entries=EVENTS)
    try:
        yield
    except Exception as error:
        if not is_shortage(error):
            raise
        raise RunError(_explanation(recipe, engine, folder / f"out-of-memory-{rank.rank}", rank, error)) from None


def is_shortage(error: Exception) -> bool:
    """Return True for the errors by which CUDA's allocator, Python, the system and PyTorch's CPU allocator run out."""
    return (isinstance(error, torch.OutOfMemoryError | MemoryError)
            or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
            or (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)))


def _explanation(recipe: Recipe, engine: Engine, stem: Path, rank: Rank, error: Exception) -> str:
    micro_batch = BatchPlan.of(recipe.train.batch_size, recipe.train.micro_batch_size, rank.rank,
                            rank.world_size).micro_batch
    has, on_gpu = _memory_gib(engine), engine.device.type == "cuda"
    recipe = replace(recipe, train=replace(recipe.train, precision=cast(Any, engine.precision)))
    cluster = Cluster(Gpu(engine.environment()["hardware"], "", has, 1, 1, 1, 1, "this machine"),  # type: ignore[arg-type]
                      engine.world_size, engine.replicas, of="GPU" if on_gpu else "process")
    table = memory_lines(recipe, cluster, micro_batch, largest_micro_batch(recipe, cluster))
    # The plan may be too optimistic: for the advice, pretend that memory is a little less than the plan needs.
    takes = sum(memory(recipe, cluster, micro_batch).values()) / GIB - FRAGMENTATION * has
    less = replace(cluster, gpu=replace(cluster.gpu, memory_gib=min(has, 0.999999 * takes / (1 - FRAGMENTATION))))
    advice = memory_lines(recipe, less, micro_batch, largest_micro_batch(recipe, less))[-1]
    left = []
    try:
        text = [*table, f"held at most{' by tensors' if on_gpu else ''}: {peak_memory_gib(engine):.2f} GiB", advice, "",
                str(error)]
        stem.with_suffix(".txt").write_text("\n".join(text) + "\n", encoding="utf-8")
        left.append(f"the plan's table is in {stem.with_suffix('.txt')}")
        if on_gpu:
            torch.cuda.memory._dump_snapshot(str(stem.with_suffix(".pickle")))
            left.append(f"the record of allocations, for https://pytorch.org/memory_viz, in {stem}.pickle")
    except OSError as failure:
        left.append(f"no more could be written: {failure.strerror}")
    return f"out of memory: {advice}; {', '.join(left)}"


def _memory_gib(engine: Engine) -> float:
    """Return the memory this process may use: its GPU's, or its share of the host's."""
    if engine.device.type == "cuda":
        return torch.cuda.get_device_properties(engine.device).total_memory / GIB
    share = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / engine.world_size
    allowed, _ = resource.getrlimit(resource.RLIMIT_AS)  # ulimit -v
    return (share if allowed == resource.RLIM_INFINITY else min(share, allowed)) / GIB
