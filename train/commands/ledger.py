"""`phi1 ledger RUN`: a run's ledger in a few lines and as plots."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from phi1.arguments import path_option
from phi1.train.checkpoint.files import LEDGER
from phi1.train.metrics.ledger import KINDS, read_ledger
from phi1.train.metrics.progress import duration
from phi1.train.runtime.launch import RunError

PLOTS = ("loss", "norm", "tokens_per_s", "scale")
SMOOTH = 20


def main(argv: list[str], parser_class: type) -> int:
    """Run the command; returns the exit code."""
    parser = parser_class("phi1 ledger", "Sum up a run's ledger, and draw loss, gradient norm, speed and loss scale.")
    parser.add_argument("run", type=path_option, help="the run's folder, or its ledger.jsonl")
    parser.add_argument("--plot", type=path_option, metavar="FILE.png", help="draw into this file; needs matplotlib")
    options = parser.parse_args(argv)
    try:
        lines = _read(options.run)
        print("\n".join(summary(lines)))
        if options.plot:
            _plot(lines, options.plot)
            print(f"plot          {options.plot}")
    except RunError as error:
        parser.error(str(error))
    return 0


def _read(path: Path) -> list[dict[str, Any]]:
    path = path / LEDGER if path.is_dir() else path
    try:
        lines = read_ledger(path)
    except OSError as error:
        raise RunError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path}: not a ledger: {error}") from None
    for number, line in enumerate(lines, 1):
        if not isinstance(line, dict) or not all(_is_sound(kind, line) for kind in KINDS if kind in line):
            raise RunError(f"{path}: not a ledger: line {number} is not as the trainer writes it")
    if not any("step" in line for line in lines):
        raise RunError(f"{path}: no step has been finished yet")
    return lines


def _is_sound(kind: str, line: dict[str, Any]) -> bool:
    """Return True if a line of this kind has all that the summary and the plot read."""
    match kind, line:
        case "step", {"step": int(), "loss": int() | float() | None, "skipped": bool(),
                      "measured": {"seconds": _, "tokens_per_s": _, **others} as measured}:
            return all(isinstance(value, int | float) and math.isfinite(value) for value in measured.values())
        case "eval", {"eval": {"step": int(), "loss": int() | float() | None}}:
            return True
        case "humaneval", {"humaneval": {"step": int(), "pass@1": int() | float()}}:
            return True
        case "start", {"start": {"finished": int(), **others}}:
            changed = others.get("changed", {})
            return (isinstance(changed, dict) and isinstance(others.get("versions", {}), dict)
                    and all(isinstance(pair, list) and len(pair) == 2 for pair in changed.values()))
    return kind == "saved"


def summary(lines: Sequence[dict[str, Any]]) -> list[str]:
    """Sum up a ledger's lines, for a terminal."""
    starts = [line["start"] for line in lines if "start" in line]
    steps = [line for line in lines if "step" in line]
    evaluations = [line["eval"] for line in lines if "eval" in line]
    measured = [line["measured"] for line in steps]
    skipped = [line["step"] for line in steps if line["skipped"]]
    last = [line["loss"] for line in steps if line["loss"] is not None][-SMOOTH:]
    found = [
        f"steps         {steps[0]['step']:,} to {steps[-1]['step']:,}, {len(starts)} start" + "s" * (len(starts) > 1)
        + f", {duration(sum(entry['seconds'] for entry in measured))} in steps",
        f"training loss {statistics.fmean(last):.4f}, mean of the last {len(last)} steps" if last
        else "training loss not finite",
        f"skipped       {len(skipped):,}" + (f", the last at step {skipped[-1]:,}" if skipped else ""),
        f"speed         {statistics.median(entry['tokens_per_s'] for entry in measured):,.0f} tokens/s, median"
        + _mfu(measured),
        f"memory        {max(entry.get('memory_gib', 0.0) for entry in measured):.2f} GiB at most, rank 0",
    ]
    if evaluations:
        finite = [entry for entry in evaluations if entry["loss"] is not None]
        best = min(finite, key=lambda entry: entry["loss"], default=None)
        loss = f"{evaluations[-1]['loss']:.4f}" if evaluations[-1] in finite else "not finite"
        found.append(f"validation    loss {loss} after step {evaluations[-1]['step']:,}"
                     + (f"; best {best['loss']:.4f} after step {best['step']:,}" if best else ""))
    solved = [line["humaneval"] for line in lines if "humaneval" in line]
    if solved:
        best = max(solved, key=lambda entry: entry["pass@1"])
        found.append(f"HumanEval     pass@1 {100 * solved[-1]['pass@1']:.1f} % after step {solved[-1]['step']:,}; best "
                     f"{100 * best['pass@1']:.1f} % after step {best['step']:,}")
    for start in starts[1:]:
        for key, (before, now) in start.get("changed", {}).items():
            found.append(f"changed       after step {start['finished']:,}: {key} was {before!r}, is {now!r}")
    if starts and "versions" in starts[-1]:
        found.append("made with     " + ", ".join(f"{name} {text}" for name, text in starts[-1]["versions"].items())
                     + f"; commit {starts[-1].get('commit') or 'unknown'}")
    return found


def _mfu(measured: Sequence[dict[str, float]]) -> str:
    if not all("mfu" in entry for entry in measured):
        return ""
    full, causal = (100 * statistics.median(entry[name] for entry in measured) for name in ("mfu", "mfu_causal"))
    return f"; MFU {full:.1f} %, {causal:.1f} % with causal attention halved"


def _plot(lines: Sequence[dict[str, Any]], path: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        raise RunError("--plot needs matplotlib: pip install matplotlib, or phi1[bench]") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = [line | line["measured"] for line in lines if "step" in line]
    figure, axes = pyplot.subplots(len(PLOTS), 1, sharex=True, figsize=(8, 9), constrained_layout=True)
    for axis, name in zip(axes, PLOTS, strict=True):
        points = [(line["step"], line[name]) for line in steps if line.get(name) is not None]
        axis.plot(*zip(*points, strict=True), linewidth=0.8)
        axis.set_ylabel(name.replace("tokens_per_s", "tokens/s"))
    evaluations = [(line["eval"]["step"], line["eval"]["loss"]) for line in lines
                   if "eval" in line and line["eval"]["loss"] is not None]
    if evaluations:
        axes[0].plot(*zip(*evaluations, strict=True), "o-", label="validation")
        axes[0].legend()
    axes[-1].set_xlabel("step")
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise RunError(f"--plot {path}: {error}") from None
    finally:
        pyplot.close(figure)
