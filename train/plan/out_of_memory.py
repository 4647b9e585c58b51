"""What a run leaves behind where memory was not enough: a line with the setting to change, the plan's table beside what
was really held, and on a GPU PyTorch's record of its allocations.
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

EVENTS = 100_000  # the last so many allocations and releases are recorded


@contextmanager
def explained(recipe: Recipe, engine: Engine, folder: Path, rank: Rank) -> Iterator[None]:
    """Turn running out of memory into a RunError. Args: the run's folder, and this process."""
    if engine.device.type == "cuda":
        torch.cuda.memory._record_memory_history(stacks="python", max_entries=EVENTS)
    try:
        yield
    except Exception as error:
        if not is_shortage(error):
            raise
        raise RunError(_explanation(recipe, engine, folder / f"out-of-memory-{rank.rank}", rank, error)) from None


def is_shortage(error: Exception) -> bool:
    """Whether memory was not enough, as CUDA's allocator, Python, the system and PyTorch's CPU allocator say it."""
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
    # The plan may have been too hopeful: here it has a little less than the step takes by its own count.
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
    """Of this process's GPU, or its share of the machine's, as far as it may use that."""
    if engine.device.type == "cuda":
        return torch.cuda.get_device_properties(engine.device).total_memory / GIB
    share = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / engine.world_size
    allowed, _ = resource.getrlimit(resource.RLIMIT_AS)  # ulimit -v
    return (share if allowed == resource.RLIM_INFINITY else min(share, allowed)) / GIB
