"""The time of a call: CUDA events on a GPU, the wall clock on a CPU.

On a GPU a batch of calls is queued behind a short spin of the device, so that the events measure the device's time and
not the host's. If the host's time is part of a unit, as in a decoding step, the wall clock runs until the device has
finished instead. Each call takes the next of several sets of inputs, which together exceed the cache.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

Call = Callable[[int], Any]
"""Runs the work on one set of inputs, chosen by a number that only grows."""

SPIN_CLOCK = 2e9  # cycles a second; above the boost clock of data-centre GPUs, so a spin is never too short by much
LONGEST_SPIN = 0.1
MAX_QUEUED = 10  # calls; a GPU's queue holds about 1,000 launches, and then the host's time shows again
SHORTEST_SAMPLE = 10e-3  # seconds: a few turns of the scheduler, which other processes share with a CPU


class Clock(Protocol):
    """Takes samples of a call's time."""

    def prepare(self, call: Call) -> float:
        """Warm the call up and return roughly the seconds of one round."""

    def sample(self, call: Call, first: int) -> list[float]:
        """One round: the milliseconds of each of a few calls, the first of which has the number `first`."""


class CpuClock:
    """The wall clock; short calls are repeated and averaged."""

    def __init__(self) -> None:
        self._repeats: dict[Call, int] = {}

    def prepare(self, call: Call) -> float:
        call(0)
        seconds = _seconds(call, 1)
        if seconds < SHORTEST_SAMPLE:  # a short call that was interrupted is not taken for a long one
            seconds = min(seconds, *(_seconds(call, number) for number in (2, 3, 4)))
        self._repeats[call] = max(1, min(2000, int(SHORTEST_SAMPLE / max(seconds, 1e-6))))
        return seconds * self._repeats[call]

    def sample(self, call: Call, first: int) -> list[float]:
        repeats = self._repeats[call]
        begin = time.perf_counter()
        for i in range(first, first + repeats):
            call(i)
        return [(time.perf_counter() - begin) / repeats * 1e3]


def _seconds(call: Call, number: int) -> float:
    begin = time.perf_counter()
    call(number)
    return time.perf_counter() - begin


class CudaClock:
    """CUDA events.

    Args:
        hide_host: spin the device while the host queues a batch of calls.
        cuda: torch.cuda, or what stands in for it in a test.
    """

    def __init__(self, hide_host: bool, cuda: Any = torch.cuda) -> None:
        self.hide_host, self.cuda = hide_host, cuda
        self._host: dict[Call, float] = {}

    def prepare(self, call: Call) -> float:
        for i in range(3):
            call(i)
        self.cuda.synchronize()
        begin = time.perf_counter()
        call(3)
        self._host[call] = time.perf_counter() - begin
        self.cuda.synchronize()
        return (time.perf_counter() - begin) * self._queued(call)

    def host_ms(self, call: Call) -> float:
        """Milliseconds that the host takes to queue one call."""
        return self._host[call] * 1e3

    def sample(self, call: Call, first: int) -> list[float]:
        if not self.hide_host:
            return [self._wall(call, first)]
        numbers = range(first, first + self._queued(call))
        events = [(self.cuda.Event(enable_timing=True), self.cuda.Event(enable_timing=True)) for _ in numbers]
        self.cuda.synchronize()
        self.cuda._sleep(int(SPIN_CLOCK * min(LONGEST_SPIN, 1.5 * self._host[call] * len(events))))
        for number, (start, end) in zip(numbers, events, strict=True):
            start.record()
            call(number)
            end.record()
        self.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in events]

    def _queued(self, call: Call) -> int:
        # Calls of many launches are queued in smaller batches: at some 5 us a launch, 4 ms are 800 of them.
        return max(2, min(MAX_QUEUED, int(4e-3 / max(self._host[call], 1e-6)))) if self.hide_host else 1

    def _wall(self, call: Call, number: int) -> float:
        self.cuda.synchronize()
        begin = time.perf_counter()
        call(number)
        self.cuda.synchronize()
        return (time.perf_counter() - begin) * 1e3


def clock_for(device: torch.device, hide_host: bool) -> Clock:
    """The clock of a device."""
    return CudaClock(hide_host) if device.type == "cuda" else CpuClock()


def cache_bytes(device: torch.device) -> int:
    """Size of the cache that rotating inputs must exceed: a GPU's L2, a CPU core's L2."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    try:
        return os.sysconf("SC_LEVEL2_CACHE_SIZE") or 1 << 20
    except (ValueError, OSError):
        return 1 << 20


def quantile(values: list[float], q: float) -> float:
    """The q-quantile by nearest rank."""
    ordered = sorted(values)
    return ordered[round(q * (len(ordered) - 1))]


def spread(values: list[float]) -> list[float]:
    """[median, p20, p80], to four digits."""
    return [float(f"{quantile(values, q):.4g}") for q in (0.5, 0.2, 0.8)]


def peak_mb(call: Call) -> float:
    """Megabytes that a call on the GPU allocates at most at one time, beyond what was there before it."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call(0)
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6
