"""Plots of a results file, PNG: the roofline, speed-ups over each peer, and attention's speed over the length."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from phi1.bench.harness.environment import about
from phi1.bench.report.results import read, right

OURS_COLOUR = "#c0392b"
SIZE, DPI = (9.0, 5.0), 110  # legible at a page's width of about 830 pixels


def require_matplotlib() -> None:
    """Raise ValueError with what to install, unless matplotlib is there."""
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError("plots need matplotlib: pip install 'phi1[bench]', or --no-plots for the tables alone") \
            from error
    matplotlib.use("Agg")


def draw(path: Path) -> list[Path]:
    """Write the plots that the file has data for beside it; their paths."""
    content = read(path)
    plots: dict[str, Callable[[Any, dict[str, Any]], bool]] = {
        "roofline": roofline, "speedup": speedup, "length": over_length,
    }
    return [image for name, plot in plots.items() if (image := _drawn(path, name, plot, content)) is not None]


def _drawn(path: Path, name: str, plot: Callable[[Any, dict[str, Any]], bool], content: dict[str, Any]) -> Path | None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=SIZE)
    try:
        if not plot(axes, content):
            return None
        axes.set_title(f"{axes.get_title()}\n{about(content['environment'])}", fontsize=10)
        image = path.with_name(f"{path.stem}-{name}.png")
        # Without the writer's version in it, the same numbers give the same bytes.
        figure.savefig(image, dpi=DPI, bbox_inches="tight", metadata={"Software": None})
        return image
    finally:
        pyplot.close(figure)


def roofline(axes: Any, content: dict[str, Any]) -> bool:
    """Flops a second over flops a byte, under the measured roof; a ring for the fastest peer."""
    records = [record for record in content["cases"]
               if record["flops"] and right(record) and record["unit"] != "host"]
    if not records:
        return False
    for record in records:
        intensity = record["flops"] / record["bytes"]
        for entry in right(record).values():
            ours = entry["provider"] == "phi1"
            axes.plot(intensity, record["flops"] / entry["ms"][0] / 1e9, "o", color=OURS_COLOUR if ours else "0.6",
                      markersize=6 if ours else 4, fillstyle="full" if ours else "none", zorder=3 if ours else 2)
    top = max(record["roof"]["tflop_per_s"] for record in records)
    bandwidth = max(record["roof"]["gb_per_s"] for record in records) / 1e3  # TB/s
    least, most = (pick(record["flops"] / record["bytes"] for record in records) for pick in (min, max))
    ridge = top / bandwidth
    ends = sorted({least / 2, ridge, max(most, ridge) * 2})
    axes.plot(ends, [min(top, x * bandwidth) for x in ends], color="black", linewidth=1.2)
    axes.set(xscale="log", yscale="log", xlabel="flops a byte", ylabel="TFLOP/s",
             title=f"phi1 (red) and peers (grey) under the measured roof: {bandwidth:.3g} TB/s, {top:.3g} TFLOP/s")
    axes.grid(True, which="major", alpha=0.3)
    return True


def speedup(axes: Any, content: dict[str, Any]) -> bool:
    """How many times phi1's time each peer takes, for the cases of the page's table."""
    bars = [(record, entry) for record in content["cases"] if record["readme"]
            for entry in right(record).values() if entry["provider"] != "phi1" and "ratio" in entry]
    if not bars:
        return False
    axes.figure.set_size_inches(SIZE[0], 1.5 + 0.24 * len(bars))
    labels = labels_of(bars)
    medians = [entry["ratio"][0] for _, entry in bars]
    spans = [[entry["ratio"][0] - entry["ratio"][1] for _, entry in bars],
             [entry["ratio"][2] - entry["ratio"][0] for _, entry in bars]]
    axes.barh(range(len(bars)), [ratio - 1 for ratio in medians], left=1, xerr=spans, height=0.7,
              error_kw={"linewidth": 0.8}, color=["#2e7d32" if ratio >= 1 else "#b0bec5" for ratio in medians])
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_yticks(range(len(bars)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.set(xscale="log", xlabel="peer's time / phi1's; right of 1 phi1 is faster", title="Each peer beside phi1")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.tick_params(axis="x", which="both", labelsize=8)
    axes.grid(True, axis="x", which="both", alpha=0.3)
    return True


def labels_of(bars: list[tuple[dict[str, Any], dict[str, Any]]]) -> list[str]:
    """Operation, direction and peer, and in what else cases of one operation and direction differ: sizes, the dtype."""
    def traits(record: dict[str, Any]) -> dict[str, str]:
        sizes = {letter: f"{letter}={value}" for letter, value in record["shape"].items() if letter != "P"}
        return sizes | {"dtype": record["dtype"]}

    def label(record: dict[str, Any], entry: dict[str, Any]) -> str:
        alike = [traits(other) for other, _ in bars
                 if (other["op"], other["direction"]) == (record["op"], record["direction"])]
        own = [text for name, text in traits(record).items() if any(other.get(name) != text for other in alike)]
        return f"{' '.join([record['op'], *own, record['direction']])}, {entry['provider']}"

    return [label(record, entry) for record, entry in bars]


def over_length(axes: Any, content: dict[str, Any]) -> bool:
    """TFLOP/s of causal attention over the sequence's length, for each provider that has two lengths or more."""
    curves: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for record in content["cases"]:
        shape = record["shape"]
        if record["op"] == "attention" and shape["causal"] and shape["K"] == 64 and "dropout" not in shape \
                and record["dtype"] == "float16":
            for entry in right(record).values():
                point = shape["T"], record["flops"] / entry["ms"][0] / 1e9
                curves.setdefault((entry["provider"], record["direction"]), []).append(point)
    drawn = {key: sorted(points) for key, points in curves.items() if len(points) > 1 and key[1] != "backward"}
    for (provider, direction), points in drawn.items():
        ours = provider == "phi1"
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, linewidth=2.4 if ours else 1.2,
                  linestyle="-" if direction == "forward" else "--", label=f"{provider}, {direction}",
                  **({"color": OURS_COLOUR} if ours else {}))
    if not drawn:
        return False
    axes.set_xscale("log", base=2)
    axes.set(xlabel="tokens a sequence, 16,384 in all", ylabel="TFLOP/s",
             title="Causal attention, 32 heads of 64, float16")
    axes.legend(fontsize=7, ncols=2)
    axes.grid(True, alpha=0.3)
    return True
