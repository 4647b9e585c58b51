"""What a benchmark case is: an operation or a whole unit at one shape, everyone who can compute it, and what it costs.

`cases.py` assembles the registry from the `cases_*.py`; nothing else says what is benchmarked. The runner, the
pytest benchmarks, the static report, the tuner and the GPU script all go over `cases.all_cases()`:

    for case in all_cases():
        case.name                               unique, for people and results files
        case.op, case.unit, case.direction      "attention", "kernel", "forward"
        case.shape, case.dtype, case.devices    {"B": 8, "T": 2048, ...}, "float16", ("cuda",)
        case.inputs(device, generator)          fresh random arguments, a dict
        case.providers                          who computes it; the first one, "phi1", is us
        case.reference                          the specification: float64 inputs in, exact results out
        case.n_bytes, case.n_flops              `bytes` and `flops` are their formulas, over the letters of `shape`
        case.kernels                            beginnings of its static cases' names, for the report and the tuner

Nothing here needs a GPU or makes a tensor before `inputs` or `prepare` is called.

Letters: B batch, T tokens, N rows, D width, H heads, K head size, F MLP width, V vocabulary, R rotary dimension, M rows
of a weight, S sum of the squared lengths of packed documents, L layers, P parameters; e is bytes an element.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from phi1.bench.harness.inputs import Draw

Inputs = dict[str, Any]
Function = Callable[[Inputs], Any]
"""Arguments in, a tensor or a tuple of tensors out: the same ones, in the same layout, whoever computes them."""

UNITS = ("kernel", "block", "model", "host")
DIRECTIONS = ("forward", "backward", "forward+backward", "call")
ELEMENT_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "int64": 8, "uint16": 2, "text": 1}
BOTH = ("cpu", "cuda")


@dataclass(frozen=True)
class Provider:
    """Someone who can compute a case: we or a peer.

    Args:
        name: what tables and `--peers` call it.
        prepare: (case, device) -> the function to time. Whatever is no part of the work (compiling, building masks,
            making a model) happens here or at the first call. Imports its package inside.
        package: the distribution whose version goes with the numbers; a key of `providers.VERSIONS` or "torch".
        devices: kinds of device that it can run on.
        by_default: kinds on which it runs without being asked for.
        slow: takes minutes to prepare, so the short selection leaves it out unless it is asked for.
        comparable: False where it draws random numbers of its own, so that its results cannot equal the reference's.
    """

    name: str
    prepare: Callable[[Case, torch.device], Function]
    package: str = "torch"
    devices: tuple[str, ...] = BOTH
    by_default: tuple[str, ...] = BOTH
    slow: bool = False
    comparable: bool = True


@dataclass(frozen=True, kw_only=True)
class Case:
    """One thing to measure.

    Args:
        name: unique; see `named`.
        op: a public operation of `phi1.kernels`, or the name of a unit ("train-step").
        unit: one of UNITS.
        direction: "forward" runs without gradients; "backward" times the gradients of `leaves` alone, from a graph made
            outside; "forward+backward" both; "call" times the function as it is.
        shape: sizes by letter, and whatever else distinguishes the case.
        dtype: of the floating-point inputs, a key of ELEMENT_BYTES.
        devices: kinds of device that the case is for. A shape for a GPU has a small one for the CPU beside it.
        bytes: what must move to and from memory, a formula over the sizes in `shape` and e.
        flops: additions and multiplications, likewise; causal attention counts the half that is needed.
        inputs: (device, generator) -> arguments. The same generator state gives the same values.
        leaves: the inputs that get gradients; their number widens to float64 for the reference.
        providers: us first. Everyone gets the same inputs.
        reference: the specification, at any precision of the inputs; None where there is nothing to compare.
        asked: (function, inputs) -> what is compared with the reference's results, where a call's own say too little:
            a file that it has written, the weights after some steps.
        kernels: beginnings of names of static cases (`static_cases.py`) of the kernels that it launches.
        quick: part of the short selection (`--quick`), which covers every operation once.
        readme: a row of the README's tables, as every quick case of a GPU is; most of a CPU's shapes are too small.
        exclusive: its providers are too large to be held at the same time.
    """

    name: str
    op: str
    unit: str
    direction: str
    shape: Mapping[str, Any]
    dtype: str
    devices: tuple[str, ...]
    bytes: str
    flops: str
    inputs: Callable[[torch.device, torch.Generator], Inputs]
    providers: tuple[Provider, ...]
    leaves: tuple[str, ...] = ()
    reference: Function | None = None
    asked: Callable[[Function, Inputs], Any] | None = None
    kernels: tuple[str, ...] = ()
    quick: bool = False
    readme: bool = False
    exclusive: bool = False

    def __post_init__(self) -> None:
        assert self.unit in UNITS, self.unit
        assert self.direction in DIRECTIONS, self.direction
        assert self.providers[0].name == "phi1", f"{self.name}: the first provider is {self.providers[0].name}"

    @property
    def in_readme(self) -> bool:
        """Whether a README table has it."""
        return self.readme or (self.quick and "cuda" in self.devices)

    @property
    def n_bytes(self) -> int:
        """Bytes that must be read and written, by the formula."""
        return self._count(self.bytes)

    @property
    def n_flops(self) -> int:
        """Floating-point operations, by the formula."""
        return self._count(self.flops)

    def _count(self, formula: str) -> int:
        sizes = {letter: size for letter, size in self.shape.items() if isinstance(size, int)}
        return int(eval(formula, {"__builtins__": {}}, sizes | {"e": ELEMENT_BYTES[self.dtype]}))


def named(op: str, shape: Mapping[str, Any], dtype: str, direction: str, device: str = "") -> str:
    """A case's name: "layer_norm N=16384 D=2048 float16 forward"."""
    sizes = [f"{letter}={value}" for letter, value in shape.items()]
    return " ".join([op, *sizes, dtype, direction, *([device] if device == "cpu" else [])])


def family(op: str, shape: Mapping[str, Any], dtype: str, device: str, draw: Callable[[Draw], Inputs],
           costs: Mapping[str, tuple[str, str]], **fields: Any) -> list[Case]:
    """The cases of an operation at one shape: one for each direction of `costs`, which holds its (bytes, flops).

    Args:
        op, shape, dtype: of every case.
        device: kind of device that the shape is for.
        draw: makes the inputs.
        costs: formulas by direction.
        fields: the other fields of `Case`; the unit is "kernel" by default.
    """
    def inputs(on: torch.device, generator: torch.Generator) -> Inputs:
        return draw(Draw(on, generator, dtype))

    return [Case(**{"unit": "kernel"} | fields, name=named(op, shape, dtype, direction, device), op=op, shape=shape,
                 dtype=dtype, devices=(device,), direction=direction, bytes=moved, flops=flops, inputs=inputs)
            for direction, (moved, flops) in costs.items()]
