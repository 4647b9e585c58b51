"""The static report's second half: what phi-1 asks of a GPU, by kernel and for a whole layer and step, and the roofs.

A sequence's roof time is the sum over its launches of the larger of bytes over bandwidth and flops over the peak: no
launch overlaps another, none is slower than the data sheet. It says what fusing saves, not how fast a kernel is.
"""

from __future__ import annotations

from collections.abc import Iterable

from phi1.bench.op_count import Launch
from phi1.bench.op_sequences import BATCH, PROVIDERS, TOKENS, UNITS, sequence
from phi1.gpus import GPUS as ALL_GPUS

TRITON = "_kernel"  # how the names of our kernels end
GPUS = [ALL_GPUS[name] for name in ("a100-80", "h100-80", "b200", "mi300x")]


def print_roofs() -> None:
    """Print both tables."""
    step = sequence("phi1", "training step")
    roofs = "".join(f"{gpu.name:>9}" for gpu in GPUS)
    print(f"\nour kernels in a training step of phi-1, B = {BATCH}, T = {TOKENS}, fp16; microseconds at the roof")
    print(f"{'kernel':36} {'launches':>8} {'MB each':>9} {'GFLOP each':>10}{roofs}")
    for launch, count in _by_kind(step):
        times = "".join(f"{1e3 * gpu.ms(launch.n_bytes, launch.n_flops):9.1f}" for gpu in GPUS)
        print(f"{launch.name:36} {count:8} {launch.n_bytes / 1e6:9.1f} {launch.n_flops / 1e9:10.1f}{times}")
    print(f"\nwhole sequences, B = {BATCH}, T = {TOKENS}, fp16; milliseconds at the roof")
    print(f"{'unit':24} {'provider':14} {'launches':>8} {'GB':>9} {'TFLOP':>8}{roofs}")
    for unit in UNITS:
        for provider in PROVIDERS:
            try:
                launches = step if (provider, unit) == ("phi1", "training step") else sequence(provider, unit)
            except ModuleNotFoundError as error:
                print(f"{unit:24} {provider:14} not counted: {error.name} is not installed")
                continue
            print(f"{unit:24} {provider:14} {_totals(launches)}")


def _totals(launches: list[Launch]) -> str:
    n_bytes, n_flops = (sum(getattr(launch, name) for launch in launches) for name in ("n_bytes", "n_flops"))
    times = "".join(f"{sum(gpu.ms(x.n_bytes, x.n_flops) for x in launches):9.2f}" for gpu in GPUS)
    return f"{len(launches):8} {n_bytes / 1e9:9.2f} {n_flops / 1e12:8.3f}{times}"


def _by_kind(launches: Iterable[Launch]) -> list[tuple[Launch, int]]:
    """Our kernels and the matrix products, each with how often it is launched, the costliest first."""
    found: dict[Launch, int] = {}
    for launch in launches:
        if launch.name.endswith(TRITON) or launch.n_flops:
            found[launch] = found.get(launch, 0) + 1
    return sorted(found.items(), key=lambda item: -item[1] * GPUS[1].ms(item[0].n_bytes, item[0].n_flops))
