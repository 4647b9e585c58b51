"""The static report's second half: what phi-1 asks of a GPU, by kernel and for a whole layer and step, and the roofs.

A kernel's line has its launches in a training step, or where that has none, in the first of the benchmarks' cases of
phi-1's shapes that has some.

A sequence's roof time is the sum over its launches of the larger of bytes over bandwidth and flops over the peak: no
launch overlaps another, none is slower than the data sheet. It says what fusing saves, not how fast a kernel is.

Each GPU has the launches that its own architecture's tiles make: a line has times for those GPUs of which its numbers
hold.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from phi1.bench.cases.registry import select
from phi1.bench.compile.sequences import BATCH, OURS, PROVIDERS, TOKENS, UNITS, sequence
from phi1.bench.harness.counting import Launch
from phi1.bench.harness.on_paper import run_on_paper
from phi1.gpus import GPUS as ALL_GPUS

TRITON = "_kernel"  # how the names of our kernels end
GPUS = {arch: ALL_GPUS[name] for arch, name in
        (("sm_80", "a100-80"), ("sm_90", "h100-80"), ("sm_100", "b200"), ("gfx942", "mi300x"))}
Launches = list[Launch]
Kind = tuple[Launch, int, str]
"""(one launch, how many there are of it, the case that makes them; "" for a training step)."""


def print_roofs() -> None:
    """Print both tables."""
    steps = {arch: sequence("phi1", "training step", arch=arch) for arch in GPUS}
    roofs = "".join(f"{gpu.name:>9}" for gpu in GPUS.values())
    print(f"\nour kernels in a training step of phi-1, B = {BATCH}, T = {TOKENS}, fp16, or else in the case that is "
          "named; microseconds at the roof, - where a GPU launches others")
    print(f"{'kernel':36} {'launches':>8} {'MB each':>9} {'GFLOP each':>10}{roofs}")
    print("\n".join(kernel_lines(steps)))
    print(f"\nwhole sequences, B = {BATCH}, T = {TOKENS}, fp16; milliseconds at the roof")
    print(f"{'unit':24} {'provider':14} {'launches':>8} {'GB':>9} {'TFLOP':>8}{roofs}")
    for unit in UNITS:
        for provider in PROVIDERS:
            try:
                found = steps if (provider, unit) == ("phi1", "training step") else _sequences(provider, unit)
            except ModuleNotFoundError as error:
                print(f"{unit:24} {provider:14} not counted: {error.name} is not installed")
                continue
            for totals, times in _totals(found):
                print(f"{unit:24} {provider:14} {totals}{_columns(times, 2)}")


def kernel_lines(steps: Mapping[str, Launches]) -> list[str]:
    """The first table's lines.

    Args:
        steps: architecture -> the launches of a training step.
    """
    lines = []
    for (launch, count, case), times in [*_by_kind(steps), *_others(steps)]:
        facts = f"{launch.name:36} {count:8} {launch.n_bytes / 1e6:9.1f} {launch.n_flops / 1e9:10.1f}"
        lines.append(f"{facts}{_columns(times, 1)}  {case}".rstrip())
    return lines


def _sequences(provider: str, unit: str) -> dict[str, Launches]:
    """Architecture -> launches."""
    if provider in OURS:
        return {arch: sequence(provider, unit, arch=arch) for arch in GPUS}
    return dict.fromkeys(GPUS, sequence(provider, unit, arch="sm_90"))


def _columns(times: Mapping[str, float], digits: int) -> str:
    return "".join(f"{times[arch]:9.{digits}f}" if arch in times else f"{'-':>9}" for arch in GPUS)


def _totals(found: Mapping[str, Launches]) -> list[tuple[str, dict[str, float]]]:
    """Launches, bytes and flops as they are printed, and the milliseconds of the GPUs that have these."""
    lines: dict[str, dict[str, float]] = {}
    for arch, launches in found.items():
        n_bytes, n_flops = (sum(getattr(launch, name) for launch in launches) for name in ("n_bytes", "n_flops"))
        totals = f"{len(launches):8} {n_bytes / 1e9:9.2f} {n_flops / 1e12:8.3f}"
        lines.setdefault(totals, {})[arch] = sum(GPUS[arch].ms(x.n_bytes, x.n_flops) for x in launches)
    return list(lines.items())


def _by_kind(steps: Mapping[str, Launches]) -> list[tuple[Kind, dict[str, float]]]:
    """Our kernels and the matrix products of a step, the costliest first, and microseconds of one launch on the GPUs
    where that is so."""
    found: dict[Kind, dict[str, float]] = {}
    for arch, launches in steps.items():
        kinds = Counter(launch for launch in launches if launch.name.endswith(TRITON) or launch.n_flops)
        for launch, count in kinds.items():
            found.setdefault((launch, count, ""), {})[arch] = _microseconds(launch, arch)
    cost = {kind: kind[1] * GPUS["sm_90"].ms(kind[0].n_bytes, kind[0].n_flops) for kind in found}
    return sorted(found.items(), key=lambda item: -cost[item[0]])


def _others(steps: Mapping[str, Launches]) -> list[tuple[Kind, dict[str, float]]]:
    """Our kernels that a GPU's step does not launch, by the case, and microseconds as before."""
    found: dict[Kind, dict[str, float]] = {}
    cases = [case for case in select("cuda", (), ("kernel", "block")) if case.dtype == "float16"]
    for arch, step in steps.items():
        known = {launch.name for launch in step}
        for case in cases:
            kinds = Counter(launch for launch in run_on_paper(case, arch).launches
                            if launch.name.endswith(TRITON) and launch.name not in known)
            for launch, count in kinds.items():
                found.setdefault((launch, count, case.name), {})[arch] = _microseconds(launch, arch)
            known |= {launch.name for launch in kinds}
    return list(found.items())


def _microseconds(launch: Launch, arch: str) -> float:
    return 1e3 * GPUS[arch].ms(launch.n_bytes, launch.n_flops)
