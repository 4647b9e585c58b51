"""The record of a case: a row for each provider, and the entry in the results file."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from phi1.bench.harness.case import Case, Function, Provider
from phi1.bench.harness.roof import Roof
from phi1.bench.harness.timing import quantile, spread


@dataclass
class Row:
    """The outcome of one provider of a case."""

    provider: Provider
    version: str = ""
    status: str = "ok"
    """`ok`; `wrong`: it computes something else; `failed`: it raised; `not installed`."""
    reason: str = ""
    error: float | None = None
    worst: str = ""
    """The result that is furthest from exact."""
    function: Function | None = None
    rounds: list[list[float]] = field(default_factory=list)
    """Milliseconds of every call, round by round."""
    host_ms: float | None = None
    peak_mb: float | None = None
    """Memory on a GPU that a call takes beyond its inputs."""
    finished: bool = False
    """Its measurement is complete."""

    @property
    def medians(self) -> list[float]:
        """The median of each round."""
        return [quantile(samples, 0.5) for samples in self.rounds]

    @property
    def ms(self) -> float:
        """The median of all calls."""
        return quantile([ms for samples in self.rounds for ms in samples], 0.5)

    def fail(self, reason: str) -> None:
        self.status, self.reason, self.function, self.finished = "failed", reason, None, True
        self.rounds.clear()


def one_line(error: BaseException) -> str:
    """An error's type and the first line of its message that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


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
                  "roof_share": _digits(roof_ms / row.ms)}
        if row.host_ms is not None and row.peak_mb is not None:
            entry |= {"host_ms": _digits(row.host_ms), "peak_mb": _digits(row.peak_mb)}
        if ours and row.status == "ok":
            pairs = zip(row.medians, ours, strict=False)  # one that failed midway has fewer
            entry["ratio"] = spread([theirs / mine for theirs, mine in pairs])
    return entry


def _digits(value: float) -> float:
    return float(f"{value:.4g}")
