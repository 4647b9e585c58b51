"""Correctness before a time counts: every result and every gradient against the reference in float64.

The rule is that of the tests (`kernel_checks`). The error may be twice that of plain PyTorch in the tested dtype, and
two roundings more. Plain PyTorch is the reference, or PyTorch's own operation if that is further off, as its float32
sums over rows are. Peers may be ten times as far off, since some round tables or statistics that phi1 keeps in float32;
the table shows their error. An error is the largest difference over the largest exact value. Integers must be equal.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from phi1.bench.harness.case import Case, Function, Inputs, Provider

OURS, PEERS = 2.0, 20.0
YARDSTICK = "torch"
"""The peer whose errors count as plain PyTorch's."""
GRADIENTS = ("backward", "forward+backward")


def yardstick_of(case: Case) -> Provider | None:
    """The yardstick, if the case has one that computes what the reference does."""
    return next((peer for peer in case.providers if peer.name == YARDSTICK and peer.comparable), None)


def leaves_of(case: Case, inputs: Inputs) -> Inputs:
    """The inputs, with new leaves of the graph for those that get gradients."""
    if case.direction not in GRADIENTS:
        return inputs
    return inputs | {name: inputs[name].detach().requires_grad_() for name in _given(case, inputs)}


def _given(case: Case, inputs: Inputs) -> list[str]:
    return [name for name in case.leaves if inputs[name] is not None]


def as_tuple(outputs: Any) -> tuple[torch.Tensor, ...]:
    return tuple(outputs) if isinstance(outputs, tuple | list) else (outputs,)


def upstream_of(outputs: tuple[torch.Tensor, ...], seed: int) -> list[torch.Tensor]:
    """Draw a gradient for each output: 1 for a loss, else standard normal numbers that bfloat16 holds exactly."""
    generator = torch.Generator(outputs[0].device).manual_seed(seed)
    return [torch.ones_like(out) if out.dim() == 0 else
            torch.randn(out.shape, device=out.device, generator=generator).bfloat16().to(out.dtype) for out in outputs]


def gradients(case: Case, inputs: Inputs, outputs: tuple[torch.Tensor, ...], upstream: list[torch.Tensor],
              keep_graph: bool = False) -> tuple[torch.Tensor, ...]:
    """The gradients of the case's leaves, through outputs that were computed from `inputs`."""
    leaves = [inputs[name] for name in _given(case, inputs)]
    return torch.autograd.grad(outputs, leaves, upstream, retain_graph=keep_graph)


def results(case: Case, function: Function, inputs: Inputs) -> dict[str, torch.Tensor]:
    """All that the function computes, by name: out0, out1, ... and, if gradients are taken, dx for the leaf x."""
    inputs = leaves_of(case, inputs)
    with torch.set_grad_enabled(case.direction != "forward"):
        outputs = as_tuple(function(inputs))
    named = {f"out{i}": out.detach() for i, out in enumerate(outputs)}
    if case.direction in GRADIENTS:
        found = gradients(case, inputs, outputs, upstream_of(outputs, 0))
        named |= {f"d{name}": gradient for name, gradient in zip(_given(case, inputs), found, strict=True)}
    return named


@dataclass(frozen=True)
class Verdict:
    """The error of a provider, and the result that has it; `complaint` is empty if the error is allowed."""

    error: float
    worst: str
    complaint: str = ""


class Exact:
    """The exact results of a case on one set of inputs, and the errors of the eager reference.

    Args:
        case: has a reference.
        inputs: those that will be timed.
    """

    def __init__(self, case: Case, inputs: Inputs) -> None:
        assert case.reference is not None
        self.case, self.inputs = case, inputs
        wide = {name: inputs[name].double() for name in _given(case, inputs)}
        self.exact = results(case, case.reference, inputs | wide)
        self.eager = {name: self._error(name, x) for name, x in results(case, case.reference, inputs).items()}

    @property
    def eager_error(self) -> float:
        """The eager reference's largest error."""
        return max(self.eager.values())

    def judge(self, function: Function, provider: str) -> Verdict:
        """Compute and compare. The yardstick's errors widen the limits of providers that are judged after it."""
        asked = self.case.asked
        got = results(self.case, partial(asked, function) if asked else function, self.inputs)
        missing = sorted(set(self.exact) - set(got))
        assert not missing, f"{missing[0]} is not among the results"
        errors = {name: self._error(name, got[name]) for name in self.exact}
        worst = max(errors, key=lambda name: float("inf") if errors[name] != errors[name] else errors[name])
        complaints = [
            f"{name} is off by {error:.1e}, {limit:.1e} allowed"
            for name, error in errors.items()
            if not error <= (limit := self._limit(name, got[name].dtype, provider == "phi1"))  # NaN is a complaint too
        ]
        if provider == YARDSTICK and not complaints:
            self.eager = {name: max(error, errors.get(name, 0.0)) for name, error in self.eager.items()}
        return Verdict(errors[worst], worst, "; ".join(complaints))

    def _error(self, name: str, got: torch.Tensor) -> float:
        exact = self.exact[name]
        assert got.shape == exact.shape, f"{name} has shape {list(got.shape)}, not {list(exact.shape)}"
        if not exact.numel():
            return 0.0
        return ((got.double() - exact).abs().max() / exact.abs().max().clamp(min=1e-300)).item()

    def _limit(self, name: str, dtype: torch.dtype, ours: bool) -> float:
        if not dtype.is_floating_point:
            return 0.0
        # A gradient or a loss in float32 has still come through the case's own dtype.
        kinds = (dtype, getattr(torch, self.case.dtype, torch.int64))
        rounding = max((torch.finfo(kind).eps for kind in kinds if kind.is_floating_point), default=0.0)
        return (OURS if ours else PEERS) * (self.eager[name] + rounding)
