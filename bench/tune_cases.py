"""Which cases the tuner times, and what their kernels look up in the tables."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from phi1.bench import check
from phi1.bench.case import Case
from phi1.bench.cases import select
from phi1.bench.op_count import counting
from phi1.kernels import _tuned
from phi1.kernels._tuned import Lookup

DIRECTIONS = ("forward", "backward")


def chosen_cases(kind: str, ops: Sequence[str], dtype: str) -> list[Case]:
    """The cases that are tuned, the short selection first; a backward that is not timed by itself with its forward."""
    cases = [case for case in select(kind, ops, ("kernel", "block")) if case.dtype == dtype]
    alone = {(case.op, str(case.shape)) for case in cases if case.direction == "backward"}
    tuned = [case for case in cases if case.direction in DIRECTIONS
             or (case.direction == "forward+backward" and (case.op, str(case.shape)) not in alone)]
    return sorted(tuned, key=lambda case: not case.quick)


def lookups_on_paper(case: Case, arch: str) -> list[Lookup]:
    """What a case would look up on a GPU, found on tensors without values: nothing is compiled for it."""
    device = torch.device("meta")
    with counting(arch), _tuned.recorded() as lookups:
        inputs = check.leaves_of(case, case.inputs(device, torch.Generator()))
        outputs = check.as_tuple(case.providers[0].prepare(case, device)(inputs))
        if case.direction in check.GRADIENTS:
            leaves = [inputs[name] for name in case.leaves if inputs[name] is not None]
            torch.autograd.grad(outputs, leaves, [torch.empty_like(out) for out in outputs])
        return list(dict.fromkeys(lookups))
