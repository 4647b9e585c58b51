"""Run a benchmark's case on tensors without values: what it launches, and what it looks up in the tables of tiles."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from phi1.bench.harness import check
from phi1.bench.harness.case import Case
from phi1.bench.harness.counting import Launch, counting
from phi1.kernels.core import tiles
from phi1.kernels.core.tiles import Lookup


@dataclass(frozen=True)
class OnPaper:
    """What our side of a case does on a GPU. forward, backward: what each pass looks up."""

    launches: list[Launch]
    forward: list[Lookup]
    backward: list[Lookup]


def run_on_paper(case: Case, arch: str) -> OnPaper:
    """Run a case as on a GPU of an architecture; nothing is compiled or computed for it."""
    device = torch.device("meta")
    with counting(arch) as counter, tiles.recorded() as lookups:
        inputs = check.leaves_of(case, case.inputs(device, torch.Generator()))
        outputs = check.as_tuple(case.providers[0].prepare(case, device)(inputs))
        ends = len(lookups)
        if case.direction in check.GRADIENTS:
            leaves = [inputs[name] for name in case.leaves if inputs[name] is not None]
            torch.autograd.grad(outputs, leaves, [torch.empty_like(out) for out in outputs])
        return OnPaper(counter.launches, lookups[:ends], lookups[ends:])
