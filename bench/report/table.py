"""The results as text: one table a unit, one line a provider under each case."""

from __future__ import annotations

from typing import Any

HEADINGS = {"kernel": "operations", "block": "one parallel block", "model": "the whole model", "host": "around it"}
COLUMNS = f"  {'provider':<22} {'ms median [p20-p80]':<30} {'rate':>14} {'% roof':>7} {'x phi1':>8} {'error':>9}"


def heading(unit: str) -> str:
    """The first lines of a unit's table."""
    return f"\n{HEADINGS[unit].upper()}\n{COLUMNS}"


def block(record: dict[str, Any]) -> str:
    """A case's lines."""
    roof, note = record["roof"], record.get("note")
    work = f"{_amount(record['bytes'], 'B')}, {_amount(record['flops'], 'FLOP')}, roof {roof['ms']:.4g} ms " \
           f"({roof['bound']})"
    eager = record.get("eager_error")
    lines = [f"{record['case']}: {work}" + (f", eager's error {eager:.1e}" if eager is not None else "")]
    if note:
        lines.append(f"  {note}")
    return "\n".join(lines + [line(record, entry) for entry in record["providers"]])


def line(record: dict[str, Any], entry: dict[str, Any]) -> str:
    """One provider's line."""
    name = f"  {entry['provider']:<22}"
    if entry["status"] != "ok":
        return f"{name} {entry['status']}: {entry['reason']}"
    median = entry["ms"][0]
    error = f"{entry['error']:.1e}" if "error" in entry else "-"
    return (f"{name} {times(entry):<30} {rate(record, median):>14} "
            f"{100 * entry['roof_share']:>6.1f}% {ratio(entry):>8} {error:>9}")


def times(entry: dict[str, Any]) -> str:
    """Milliseconds: median [p20-p80]."""
    median, low, high = (f"{ms:,.0f}" if ms >= 1000 else f"{ms:.4g}" for ms in entry["ms"])
    return f"{median} [{low}-{high}]"


def ratio(entry: dict[str, Any]) -> str:
    """A provider's time over phi1's; above 1 the provider is slower."""
    return f"{entry['ratio'][0]:.2f}" if "ratio" in entry else "-"


def rate(record: dict[str, Any], ms: float) -> str:
    """The rate in the unit of the case's bound: GB/s, TFLOP/s, or GFLOP/s below 1 TFLOP/s."""
    if record["roof"]["bound"] == "memory":
        return f"{record['bytes'] / ms / 1e6:.4g} GB/s"
    flops = record["flops"] / ms / 1e3  # a second
    return f"{flops / 1e6:.4g} TFLOP/s" if flops >= 1e6 else f"{flops / 1e3:.4g} GFLOP/s"


def _amount(value: float, unit: str) -> str:
    for prefix in ("", "k", "M", "G"):
        if value < 1000:
            return f"{value:.3g} {prefix}{unit}"
        value /= 1000
    return f"{value:.3g} T{unit}"
