"""The runner of cases: prepare every provider, check its results, time all in turns on the same inputs, check again.

The first check takes the first set of inputs and the last check the last set, so a provider that returns an earlier
result is wrong. So is one that is faster than the machine. A provider that is not installed, fails or computes
something else is a row with its reason, never a missing row. Each round times all providers, so that a change of the
machine's speed meets all of them, and ratios are taken within rounds. Providers that do not fit in memory together are
timed one after another.
"""

from __future__ import annotations

import gc
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from phi1.bench.harness import check
from phi1.bench.harness.case import Case, Function, Inputs, Provider
from phi1.bench.harness.providers import VERSIONS, installed_version, settings_for
from phi1.bench.harness.record import Row, one_line, record
from phi1.bench.harness.roof import Probes, Roof, measure
from phi1.bench.harness.timing import Call, CudaClock, cache_bytes, clock_for, peak_mb

MOST_COPIES = 16
FEWEST_ROUNDS, MOST_ROUNDS = 5, 60
MOST_OF_THE_ROOF = 1.5
"""A time that means more than this many times the measured roof belongs to other work."""


class DeviceLostError(RuntimeError):
    """The GPU does not answer any more, so no later result would be true."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.provider = ""
        """The provider that was running."""
        self.record: dict[str, Any] = {}
        """The record of the case that was running, as far as it goes."""


class Runner:
    """Runs cases on one device.

    Args:
        device: of every case.
        peers: names of the peers to run; None takes those that run by default.
        seconds: time for the rounds of one case.
        quick: small roof probes, and no peers that take minutes to prepare.
        lost: (case, provider) -> how the GPU was lost in an earlier run; these are not run.
    """

    def __init__(self, device: torch.device, peers: Sequence[str] | None = None, seconds: float = 4.0,
                 quick: bool = False, lost: Mapping[tuple[str, str], str] | None = None) -> None:
        self.device, self.peers, self.seconds, self.quick = device, peers, seconds, quick
        self.lost = lost or {}
        self._roofs: dict[str, Roof] = {}

    def run(self, case: Case) -> dict[str, Any]:
        """Measure a case; the record for the results file.

        Raises:
            DeviceLostError: the GPU was lost; the error holds the record as far as it goes.
        """
        with settings_for(case):
            return self._run(case)

    def _run(self, case: Case) -> dict[str, Any]:
        if "torch._dynamo" in sys.modules:  # its import takes seconds, and is not needed without torch.compile
            torch._dynamo.reset()  # or what earlier cases compiled counts against torch's limit of recompiles
        # Before the first timing, so that the probes do not run between two providers of a GPU.
        roof = None if self.device.type == "cpu" else self.roof(case.dtype)
        copies = self._inputs(case)
        rows = [self._row(case, provider) for provider in case.providers if self._wanted(provider)]
        note, exacts = self._exacts(case, copies)
        try:
            self._widen(case, exacts, rows)
            for group in [[row] for row in rows] if case.exclusive else [rows]:
                roof = self._measure(case, group, exacts, copies) or roof
        except DeviceLostError as error:
            for row in rows:
                if not row.finished:
                    row.fail(f"not run to its end: {error.provider} took the GPU's context with it")
            error.record = record(case, rows, roof or self.roof(case.dtype), len(copies), note) | {"cut": True}
            raise
        entry = record(case, rows, roof or self.roof(case.dtype), len(copies), note)
        if exacts:
            entry["eager_error"] = float(f"{exacts[0].eager_error:.2e}")
        exacts.clear()
        release(self.device)
        return entry

    def _measure(self, case: Case, group: list[Row], exacts: list[check.Exact], copies: list[Inputs]) -> Roof | None:
        """Check, time and check again providers that are in memory together; on a CPU the roof of their rounds."""
        group = sorted(group, key=lambda row: row.provider.name != check.YARDSTICK)
        for row in group:
            self._prepare(case, row, exacts)
        roof = self._time(case, [row for row in group if row.function], copies)
        for row in group:
            self._confirm(case, row, exacts, roof or self.roof(case.dtype))
            row.finished = True
        if case.exclusive:
            for row in group:
                row.function = None
            release(self.device)
        return roof

    def roof(self, dtype: str) -> Roof:
        """The device's roof for a dtype, measured once a run."""
        if dtype not in self._roofs:
            self._roofs[dtype] = measure(self.device, dtype, self.quick)
        return self._roofs[dtype]

    def _wanted(self, provider: Provider) -> bool:
        if provider.name == "phi1" or (self.peers is not None and provider.name in self.peers):
            return self.device.type in provider.devices
        return self.peers is None and self.device.type in provider.by_default and not (self.quick and provider.slow)

    def _row(self, case: Case, provider: Provider) -> Row:
        package = provider.package
        if package == "phi1":
            row = Row(provider)
        elif package == "torch":
            row = Row(provider, torch.__version__)
        elif version := installed_version(package):
            row = Row(provider, f"{package} {version}")
        else:
            row = Row(provider, VERSIONS[package], "not installed", f"{package} {VERSIONS[package]} is not installed")
        if reason := self.lost.get((case.name, provider.name)):
            row.fail(reason)
        return row

    def _inputs(self, case: Case) -> list[Inputs]:
        """Sets of inputs that together exceed the cache three times over; two if the weights alone do."""
        first = case.draw(self.device)
        size = sum(x.numel() * x.element_size() for x in first.values() if isinstance(x, torch.Tensor))
        whole = case.unit in ("model", "host")
        count = 2 if whole else max(2, min(MOST_COPIES, math.ceil(3 * cache_bytes(self.device) / max(size, 1))))
        return [first, *(case.draw(self.device, seed) for seed in range(1, count))]

    def _exacts(self, case: Case, copies: list[Inputs]) -> tuple[str, list[check.Exact]]:
        """The exact results for the first and the last inputs, or the reason why there are none."""
        if case.reference is None:
            return "unchecked: there is no reference", []
        try:
            return "", [check.Exact(case, inputs) for inputs in (copies[0], copies[-1])]
        except (torch.OutOfMemoryError, ImportError) as error:
            release(self.device)
            return f"unchecked: the reference could not be computed: {one_line(error)}", []

    def _widen(self, case: Case, exacts: list[check.Exact], rows: list[Row]) -> None:
        """Let PyTorch's own operation widen the limits if it is not among the rows."""
        there = {row.provider.name for row in rows} | {name for of, name in self.lost if of == case.name}
        yardstick = check.yardstick_of(case)
        if yardstick and check.YARDSTICK not in there:
            with self._noting(Row(yardstick)):  # after an error the limits stay those of the eager reference
                for exact in exacts:
                    exact.judge(yardstick.prepare(case, self.device), check.YARDSTICK)

    @contextmanager
    def _noting(self, row: Row) -> Iterator[None]:
        """Note the error of a provider, which may raise anything; DeviceLostError if it lost the device."""
        try:
            yield
        except Exception as error:
            row.fail(one_line(error))
            try:
                still_there(self.device)
            except DeviceLostError as lost:
                lost.provider = row.provider.name
                row.reason += "; the GPU's context went with it"
                raise

    def _prepare(self, case: Case, row: Row, exacts: list[check.Exact]) -> None:
        if row.status != "ok":
            return
        with self._noting(row):
            row.function = row.provider.prepare(case, self.device)
            if exacts and row.provider.comparable:
                self._judge(row, exacts[0])

    def _judge(self, row: Row, exact: check.Exact, when: str = "") -> None:
        assert row.function is not None
        verdict = exact.judge(row.function, row.provider.name)
        if row.error is None or not verdict.error <= row.error:
            row.error, row.worst = verdict.error, verdict.worst
        if verdict.complaint:
            row.status, row.reason = "wrong", when + verdict.complaint

    def _confirm(self, case: Case, row: Row, exacts: list[check.Exact], roof: Roof) -> None:
        """Check a provider after its rounds: its results, and that its times are not faster than the machine."""
        if row.status != "ok" or row.function is None:
            return
        share = roof.ms(case) / row.ms
        if share > MOST_OF_THE_ROOF:
            row.status, row.reason = "wrong", f"its time is that of {share:.3g} times the measured roof"
        with self._noting(row):
            if exacts and row.provider.comparable:
                self._judge(row, exacts[-1], "behind its rounds ")

    def _time(self, case: Case, rows: list[Row], copies: list[Inputs]) -> Roof | None:
        """Time the rows, round by round; on a CPU the roof of the same rounds."""
        clock = clock_for(self.device, hide_host=case.unit in ("kernel", "block"))
        calls: list[tuple[Row, Call]] = []
        seconds = 0.0
        for row in rows:
            with self._noting(row):
                call = bind(case, row.function, copies)
                seconds += clock.prepare(call)
                if isinstance(clock, CudaClock):
                    row.host_ms, row.peak_mb = clock.host_ms(call), peak_mb(call)
                calls.append((row, call))
        probes = Probes(self.device, case.dtype, self.quick) if self.device.type == "cpu" and calls else None
        rounds = max(FEWEST_ROUNDS, min(MOST_ROUNDS, int(self.seconds / max(seconds, 1e-9))))
        for turn in range(rounds):
            for row, call in calls if turn % 2 else reversed(calls):
                if row.function:  # it has not failed in an earlier round
                    with self._noting(row):
                        row.rounds.append(clock.sample(call, turn * len(copies)))
            if probes:
                probes.sample(turn)
        return probes.roof() if probes else None


def bind(case: Case, function: Function | None, copies: list[Inputs]) -> Call:
    """The call to time: the function in the case's direction, on the sets of inputs in turn."""
    assert function is not None
    run = function
    sets = [check.leaves_of(case, inputs) for inputs in copies]
    if case.direction == "call":
        return lambda number: run(sets[number % len(sets)])
    if case.direction == "forward":
        return torch.no_grad()(lambda number: run(sets[number % len(sets)]))
    alone = case.direction == "backward"
    outputs = [check.as_tuple(run(inputs)) for inputs in (sets if alone else sets[:1])]
    upstream = [check.upstream_of(outputs[0], seed) for seed in range(len(sets))]
    if not alone:
        outputs.clear()  # or its graph would keep memory beside that of the timed calls

    def backward(number: int) -> Any:
        i = number % len(sets)
        through = outputs[i] if alone else check.as_tuple(run(sets[i]))
        return check.gradients(case, sets[i], through, upstream[i], keep_graph=alone)

    return backward


def release(device: torch.device) -> None:
    """Give a GPU's memory back."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def still_there(device: torch.device) -> None:
    """Give memory back after an error, and raise DeviceLostError if the device does not answer any more."""
    try:
        release(device)
        if device.type == "cuda":
            torch.cuda.synchronize()
    except RuntimeError as error:
        raise DeviceLostError(f"the GPU does not answer any more: {one_line(error)}") from error
