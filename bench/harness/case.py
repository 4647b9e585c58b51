"""A benchmark case: an operation or a whole unit of work at one shape, everyone who computes it, and its costs.

`cases/registry.py` collects the cases of `cases/*.py`; nothing else says what is benchmarked. The runner, the pytest
benchmarks, the compile gate, the tuner and the GPU script all go over `all_cases()`. No case makes a tensor before
`draw` or a provider's `prepare` is called, and none needs a GPU to be listed.

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
"""Takes the inputs and returns a tensor or a tuple of tensors, in the same layout for every provider."""

Prepare = Callable[["Case", torch.device], Function]
"""(case, device) -> the function to time."""

UNITS = ("kernel", "block", "model", "host")
DIRECTIONS = ("forward", "backward", "forward+backward", "call")
ELEMENT_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "int64": 8, "uint16": 2, "text": 1}
BOTH = ("cpu", "cuda")


@dataclass(frozen=True)
class Provider:
    """One implementation of a case: phi1 or a peer.

    Args:
        name: its name in tables and in `--peers`.
        prepare: makes the function to time. Compiling, building masks and making a model are no part of the work: they
            happen here or at the first call. The package is imported here.
        package: the distribution whose version goes with the numbers; a key of `providers.VERSIONS`, "torch" or "phi1".
        devices: kinds of device that it can run on.
        by_default: kinds of device on which it runs without being named.
        slow: preparing takes minutes, so the short selection leaves it out unless it is named.
        comparable: False if it draws random numbers of its own, so that its results cannot equal the reference's.
    """

    name: str
    prepare: Prepare
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
        direction: "forward" runs without gradients; "backward" times only the gradients of `leaves`, from a graph made
            outside; "forward+backward" times both; "call" times the function as it is.
        shape: sizes by letter, and all else that distinguishes the case.
        dtype: type of the floating-point inputs, a key of ELEMENT_BYTES.
        devices: kinds of device that the case is for. Each shape for a GPU has a small one for the CPU beside it.
        bytes: formula of the bytes that must move to and from memory, over the sizes in `shape` and e.
        flops: formula of the additions and multiplications; causal attention counts the half that is needed.
        inputs: draws the arguments.
        leaves: the inputs that get gradients, and that the reference gets in float64.
        providers: phi1 first. All get the same inputs.
        reference: the specification, in the precision of its inputs; None if there is nothing to compare.
        asked: (function, inputs) -> the tensors to compare, if the function's results say too little: the file that it
            wrote, or the weights after some steps.
        quick: part of the short selection (`--quick`), which covers every operation once.
        readme: a row of the table in docs/benchmarks.md, as every quick case of a GPU is.
        exclusive: its providers are too large to be in memory at the same time.
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
    inputs: Callable[[Draw], Inputs]
    providers: tuple[Provider, ...]
    leaves: tuple[str, ...] = ()
    reference: Function | None = None
    asked: Callable[[Function, Inputs], Any] | None = None
    quick: bool = False
    readme: bool = False
    exclusive: bool = False

    def __post_init__(self) -> None:
        assert self.unit in UNITS, self.unit
        assert self.direction in DIRECTIONS, self.direction
        assert self.providers[0].name == "phi1", f"{self.name}: the first provider is {self.providers[0].name}"

    @property
    def in_readme(self) -> bool:
        """True for a row of the table in docs/benchmarks.md."""
        return self.readme or (self.quick and "cuda" in self.devices)

    @property
    def n_bytes(self) -> int:
        """Bytes that must be read and written."""
        return self._count(self.bytes)

    @property
    def n_flops(self) -> int:
        """Floating-point operations."""
        return self._count(self.flops)

    def draw(self, device: torch.device, seed: int = 0) -> Inputs:
        """The arguments of a seed, which are the same each time."""
        return self.inputs(Draw(device, seed, self.dtype))

    def _count(self, formula: str) -> int:
        sizes = {letter: size for letter, size in self.shape.items() if isinstance(size, int)}
        return int(eval(formula, {"__builtins__": {}}, sizes | {"e": ELEMENT_BYTES[self.dtype]}))


def named(op: str, shape: Mapping[str, Any], dtype: str, direction: str, device: str = "") -> str:
    """A case's name: "layer_norm N=16384 D=2048 float16 forward"."""
    sizes = [f"{letter}={value}" for letter, value in shape.items()]
    return " ".join([op, *sizes, dtype, direction, *([device] if device == "cpu" else [])])


def family(op: str, shape: Mapping[str, Any], dtype: str, device: str, inputs: Callable[[Draw], Inputs],
           costs: Mapping[str, tuple[str, str]], **fields: Any) -> list[Case]:
    """The cases of an operation at one shape: one for each direction of `costs`, which holds its (bytes, flops).

    Args:
        op, shape, dtype, inputs: of every case.
        device: kind of device that the shape is for.
        costs: formulas by direction.
        fields: the other fields of `Case`; the unit is "kernel" by default.
    """
    return [Case(**{"unit": "kernel"} | fields, name=named(op, shape, dtype, direction, device), op=op, shape=shape,
                 dtype=dtype, devices=(device,), direction=direction, bytes=moved, flops=flops, inputs=inputs)
            for direction, (moved, flops) in costs.items()]
