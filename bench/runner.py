"""Runs cases: prepare every provider, check what it computes, then time them in turns on the same inputs.

A provider that is not installed, fails or computes something else is a row with its reason, never a missing row. Times
are taken in rounds that go over all providers, so that a change of the machine's speed meets all of them; ratios are
those of the rounds. Cases whose providers do not fit in memory together are timed one after another.
"""

from __future__ import annotations

import gc
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from phi1.bench import check
from phi1.bench.case import Case, Function, Inputs, Provider
from phi1.bench.providers import VERSIONS, installed_version, settings_for
from phi1.bench.roof import Roof, RoundProbes, measure
from phi1.bench.timing import Call, Clock, CudaClock, cache_bytes, clock_for, peak_mb, quantile, spread

MOST_COPIES = 16
FEWEST_ROUNDS, MOST_ROUNDS = 5, 60


class DeviceLostError(RuntimeError):
    """The GPU does not answer any more; nothing after this would be true."""


@dataclass
class Row:
    """What one provider made of a case."""

    provider: Provider
    version: str = ""
    status: str = "ok"
    """`ok`; `wrong`: it computes something else; `failed`: it raised; `not installed`."""
    reason: str = ""
    error: float | None = None
    worst: str = ""
    """Which result is furthest from exact."""
    function: Function | None = None
    rounds: list[list[float]] = field(default_factory=list)
    """Milliseconds of every call, round by round."""
    host_ms: float | None = None
    peak_mb: float | None = None
    """Memory that a call takes on a GPU beyond its inputs."""

    @property
    def medians(self) -> list[float]:
        """The median of each round."""
        return [quantile(samples, 0.5) for samples in self.rounds]

    def fail(self, error: BaseException) -> None:
        self.status, self.reason, self.function = "failed", one_line(error), None


def one_line(error: BaseException) -> str:
    """An error's type and the first line of its message that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


class Runner:
    """Runs cases on one device.

    Args:
        device: of every case.
        peers: names of providers to run beside phi1; None takes those that run by default.
        seconds: time to spend on the rounds of one case.
        quick: small roof probes, and no peers that take minutes to prepare.
    """

    def __init__(self, device: torch.device, peers: Sequence[str] | None = None, seconds: float = 4.0,
                 quick: bool = False) -> None:
        self.device, self.peers, self.seconds, self.quick = device, peers, seconds, quick
        self._roofs: dict[str, Roof] = {}

    def run(self, case: Case) -> dict[str, Any]:
        """Measure a case; the record for the results file."""
        with settings_for(case):
            return self._run(case)

    def _run(self, case: Case) -> dict[str, Any]:
        if "torch._dynamo" in sys.modules:  # its import takes seconds, and is not needed without torch.compile
            torch._dynamo.reset()  # or what earlier cases compiled counts against torch's limit of recompiles
        copies = self._inputs(case)
        rows = [self._row(case, provider) for provider in self._chosen(case)]
        note, exact = self._exact(case, copies[0])
        if exact is not None:
            self._widen(exact, rows)
        # Before the first timing, so that the probes do not run between two providers of a GPU.
        roof = None if self.device.type == "cpu" else self.roof(case.dtype)
        groups = [[row] for row in rows] if case.exclusive else [rows]
        for group in groups:
            for row in sorted(group, key=lambda row: row.provider.name != check.YARDSTICK):
                self._prepare(case, row, exact, copies[0])
            roof = self._time(case, [row for row in group if row.function], copies) or roof
            if case.exclusive:
                for row in group:
                    row.function = None
                release(self.device)
        entry = record(case, rows, roof or self.roof(case.dtype), len(copies), note)
        if exact is not None:
            entry["eager_error"] = float(f"{exact.eager_error:.2e}")
        del exact
        release(self.device)
        return entry

    def roof(self, dtype: str) -> Roof:
        """The device's roof for a dtype, measured once a run."""
        if dtype not in self._roofs:
            self._roofs[dtype] = measure(self.device, dtype, self.quick)
        return self._roofs[dtype]

    def _chosen(self, case: Case) -> list[Provider]:
        return [provider for number, provider in enumerate(case.providers)
                if self.device.type in provider.devices and (number == 0 or self._wanted(provider))]

    def _wanted(self, provider: Provider) -> bool:
        if self.peers is not None:
            return provider.name in self.peers
        return self.device.type in provider.by_default and not (self.quick and provider.slow)

    def _row(self, case: Case, provider: Provider) -> Row:
        if provider.package in ("torch", "phi1"):
            return Row(provider, torch.__version__ if provider.package == "torch" else "")
        version = installed_version(provider.package)
        if version is None:
            wanted = f"{provider.package} {VERSIONS[provider.package]}"
            return Row(provider, VERSIONS[provider.package], "not installed", f"{wanted} is not installed")
        return Row(provider, f"{provider.package} {version}")

    def _inputs(self, case: Case) -> list[Inputs]:
        """Sets of inputs that together exceed the cache three times over; two where weights alone do."""
        first = self._draw(case, 0)
        size = sum(x.numel() * x.element_size() for x in first.values() if isinstance(x, torch.Tensor))
        whole = case.unit in ("model", "host")
        count = 2 if whole else max(2, min(MOST_COPIES, math.ceil(3 * cache_bytes(self.device) / max(size, 1))))
        return [first, *(self._draw(case, seed) for seed in range(1, count))]

    def _draw(self, case: Case, seed: int) -> Inputs:
        return case.inputs(self.device, torch.Generator(self.device).manual_seed(1000 + seed))

    def _exact(self, case: Case, inputs: Inputs) -> tuple[str, check.Exact | None]:
        if case.reference is None:
            return "", None
        try:
            return "", check.Exact(case, inputs)
        except (torch.OutOfMemoryError, ImportError) as error:
            release(self.device)
            return f"unchecked: the reference could not be computed: {one_line(error)}", None

    def _widen(self, exact: check.Exact, rows: list[Row]) -> None:
        """Let PyTorch's own operation widen the limits where it is not among the rows."""
        yardsticks = [p for p in exact.case.providers if p.name == check.YARDSTICK and p.comparable]
        for yardstick in yardsticks if check.YARDSTICK not in {row.provider.name for row in rows} else []:
            try:
                exact.judge(yardstick.prepare(exact.case, self.device), check.YARDSTICK)
            except Exception:  # the limits stay those of the eager reference
                still_there(self.device)

    def _prepare(self, case: Case, row: Row, exact: check.Exact | None, inputs: Inputs) -> None:
        if row.status != "ok":
            return
        try:
            row.function = row.provider.prepare(case, self.device)
            if exact is not None and row.provider.comparable:
                verdict = exact.judge(row.function, row.provider.name)
                row.error, row.worst, row.reason = verdict.error, verdict.worst, verdict.complaint
                row.status = "wrong" if verdict.complaint else "ok"
        except Exception as error:  # a peer may raise anything; its row says what
            row.fail(error)
            still_there(self.device)

    def _time(self, case: Case, rows: list[Row], copies: list[Inputs]) -> Roof | None:
        """Fill the rows' rounds. On a CPU returns the roof of the same rounds."""
        clock = clock_for(self.device, hide_host=case.unit in ("kernel", "block"))
        calls: list[tuple[Row, Call]] = []
        seconds = 0.0
        for row in rows:
            try:
                call = bind(case, row.function, copies)
                seconds += clock.prepare(call)
                if isinstance(clock, CudaClock):
                    row.host_ms, row.peak_mb = clock.host_ms(call), peak_mb(call)
                calls.append((row, call))
            except Exception as error:
                row.fail(error)
                still_there(self.device)
        probes = RoundProbes(self.device, case.dtype, self.quick) if self.device.type == "cpu" and calls else None
        rounds = max(FEWEST_ROUNDS, min(MOST_ROUNDS, int(self.seconds / max(seconds, 1e-9))))
        for turn in range(rounds):
            for row, call in calls if turn % 2 else reversed(calls):
                self._sample(row, clock, call, turn * len(copies))
            if probes:
                probes.sample(turn)
        return probes.roof() if probes else None

    def _sample(self, row: Row, clock: Clock, call: Call, first: int) -> None:
        """One round of a row; none of one that has failed in an earlier round."""
        if row.function is None:
            return
        try:
            row.rounds.append(clock.sample(call, first))
        except Exception as error:
            row.fail(error)
            row.rounds.clear()
            still_there(self.device)


def bind(case: Case, function: Function | None, copies: list[Inputs]) -> Call:
    """The call to time: the function in the case's direction, on the copies of the inputs by turns."""
    assert function is not None
    run = function
    sets = [check.leaves_of(case, inputs) for inputs in copies]
    if case.direction == "call":
        return lambda number: run(sets[number % len(sets)])
    if case.direction == "forward":
        def forward(number: int) -> Any:
            with torch.no_grad():
                return run(sets[number % len(sets)])

        return forward
    first = check.as_tuple(run(sets[0]))
    upstream = [check.upstream_of(first, seed) for seed in range(len(sets))]
    if case.direction == "backward":
        outputs = [first, *(check.as_tuple(run(inputs)) for inputs in sets[1:])]

        def backward(number: int) -> Any:
            i = number % len(sets)
            return check.gradients(case, sets[i], outputs[i], upstream[i], keep_graph=True)

        return backward

    def both(number: int) -> Any:
        i = number % len(sets)
        return check.gradients(case, sets[i], check.as_tuple(run(sets[i])), upstream[i])

    return both


def record(case: Case, rows: list[Row], roof: Roof, copies: int, note: str) -> dict[str, Any]:
    """A case's entry in the results file."""
    ours = next((row.medians for row in rows if row.provider.name == "phi1" and row.status == "ok"), [])
    return {
        "case": case.name, "op": case.op, "unit": case.unit, "direction": case.direction, "shape": dict(case.shape),
        "dtype": case.dtype, "bytes": case.n_bytes, "flops": case.n_flops, "readme": case.in_readme,
        "input_copies": copies,
        "roof": {"gb_per_s": _digits(roof.gb_per_s), "tflop_per_s": _digits(roof.tflop_per_s),
                 "ms": _digits(roof.ms(case)), "bound": "memory" if roof.memory_bound(case) else "compute"},
        **({"note": note} if note else {}),
        "providers": [_entry(row, ours, roof.ms(case)) for row in rows],
    }


def _entry(row: Row, ours: list[float], roof_ms: float) -> dict[str, Any]:
    entry: dict[str, Any] = {"provider": row.provider.name, "version": row.version, "status": row.status}
    if row.reason:
        entry["reason"] = row.reason
    if row.error is not None:
        entry |= {"error": float(f"{row.error:.2e}"), "worst": row.worst}
    if row.rounds:
        samples = [ms for samples in row.rounds for ms in samples]
        entry |= {"ms": spread(samples), "samples": len(samples), "rounds": len(row.rounds),
                  "roof_share": _digits(roof_ms / quantile(samples, 0.5))}
        if row.host_ms is not None and row.peak_mb is not None:
            entry |= {"host_ms": _digits(row.host_ms), "peak_mb": _digits(row.peak_mb)}
        if ours and row.status == "ok":
            pairs = zip(row.medians, ours, strict=False)  # one that failed midway has fewer
            entry["ratio"] = spread([theirs / mine for theirs, mine in pairs])
    return entry


def _digits(value: float) -> float:
    return float(f"{value:.4g}")


def release(device: torch.device) -> None:
    """Give memory back."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def still_there(device: torch.device) -> None:
    """Give memory back after an error, and raise DeviceLostError if the device does not answer any more."""
    try:
        release(device)
        if device.type == "cuda":
            torch.cuda.synchronize()
    except RuntimeError as error:
        raise DeviceLostError(f"the GPU does not answer any more: {one_line(error)}") from error
