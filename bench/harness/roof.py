"""The measured roof: the speed of this machine when it only copies, and when it only multiplies matrices.

It is measured in the run whose cases it judges. On a CPU, whose speed changes by the minute, it is measured in each
round of each case.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from phi1.bench.harness.case import Case
from phi1.bench.harness.timing import Call, clock_for, quantile
from phi1.kernels.core.cpu_matmul import multiplies

COPY_BYTES = {"cuda": 1 << 30, "cpu": 32 << 20}  # of the source; a CPU's must exceed its last cache's share of a core
GEMM_SIZE = {"cuda": 8192, "cpu": 768}
ROUNDS = 5


@dataclass(frozen=True)
class Roof:
    """The rates that a case is compared with."""

    gb_per_s: float
    tflop_per_s: float

    def ms(self, case: Case) -> float:
        """The least time for the case's bytes and flops at these rates."""
        return max(case.n_bytes / self.gb_per_s / 1e6, case.n_flops / self.tflop_per_s / 1e9)

    def memory_bound(self, case: Case) -> bool:
        """True if the bytes take longer than the flops."""
        return case.n_bytes / self.gb_per_s / 1e6 >= case.n_flops / self.tflop_per_s / 1e9


class Probes:
    """The two calls whose times make a roof.

    Args:
        device: where they run.
        dtype: type of the matrices. A CPU without arithmetic for it multiplies float32.
        quick: take an eighth of the memory and of the matrix.
    """

    def __init__(self, device: torch.device, dtype: str, quick: bool = False) -> None:
        self.n_bytes = COPY_BYTES[device.type] // (8 if quick else 1)
        self.size = GEMM_SIZE[device.type] // (2 if quick else 1)
        source = torch.zeros(self.n_bytes, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        wanted = getattr(torch, dtype) if dtype.startswith(("float", "bfloat")) else torch.float32
        slow = device.type == "cpu" and not multiplies(wanted)
        a = torch.randn(self.size, self.size, device=device).to(torch.float32 if slow else wanted)
        b, out = a.clone(), torch.empty_like(a)
        calls: tuple[Call, Call] = (lambda number: target.copy_(source), lambda number: torch.mm(a, b, out=out))
        self.clock = clock_for(device, hide_host=True)
        self.ms: dict[Call, list[float]] = {call: [] for call in calls}
        for call in calls:
            self.clock.prepare(call)

    def sample(self, turn: int) -> None:
        """Take a round."""
        for call, samples in self.ms.items():
            samples += self.clock.sample(call, turn)

    def roof(self) -> Roof:
        """The roof of all rounds; a copy reads and writes."""
        copy_ms, gemm_ms = (quantile(samples, 0.5) for samples in self.ms.values())
        return Roof(2 * self.n_bytes / copy_ms / 1e6, 2 * self.size**3 / gemm_ms / 1e9)


def measure(device: torch.device, dtype: str, quick: bool = False) -> Roof:
    """Measure both now."""
    probes = Probes(device, dtype, quick)
    for turn in range(ROUNDS):
        probes.sample(turn)
    return probes.roof()
