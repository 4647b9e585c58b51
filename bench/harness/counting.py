"""Record the kernels that a computation launches, without a GPU and without computing.

The computation runs on meta tensors, which have shapes and no values. Every PyTorch operator that is no view counts as
one launch, and every Triton kernel as one, with the arguments and options that a GPU would be given.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

from phi1.bench.harness import check
from phi1.bench.harness.case import Case
from phi1.kernels.core import tiles


@dataclass(frozen=True)
class Launch:
    """One kernel.

    Args:
        name: PyTorch's name of the operator, or the Triton kernel's function.
        kernel: the Triton kernel; None for an operator of PyTorch, of which nothing more is known.
        types: Triton's type of each argument whose value the compiler does not know: "*fp16", "i32", "fp32".
        constants: the other arguments, which are compiled into the kernel.
        aligned: arguments that the compiler takes for multiples of 16, pointers included.
        options: the compiler's options of this launch ("num_warps").
    """

    name: str
    kernel: Any = None
    types: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)
    aligned: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    def __reduce__(self) -> tuple[Any, ...]:  # a kernel does not go to another process, and its name does
        kernel = self.kernel and (self.kernel.fn.__module__, self.kernel.fn.__name__)
        return _loaded, (self.name, kernel, self.types, self.constants, self.aligned, self.options)


def _loaded(name: str, kernel: tuple[str, str] | None, *facts: Any) -> Launch:
    return Launch(name, kernel and getattr(importlib.import_module(kernel[0]), kernel[1]), *facts)


TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.int64: "i64", torch.int32: "i32",
         torch.int8: "i8", torch.bool: "i1"}
NO_KERNEL = ("empty", "new_empty", "empty_like", "empty_strided", "scalar_tensor", "_local_scalar_dense",
             "_unsafe_view")
NO_OPTION = ("grid", "warmup")


class Counter(TorchDispatchMode):
    """Notes every launch of the operators inside the block; phi1's own are opened, and their kernels noted."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Launch] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and to tell torch.compile so takes longer than a note

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "phi1":
            with self:
                return OPDEFS[f"phi1::{func._opname}"]._init_fn(*args, **kwargs)
        out = _result(func, args, kwargs)
        if func._opname not in NO_KERNEL and not func.is_view:
            self.launches.append(Launch(func._opname))
        return out

    def note(self, kernel: Any, args: tuple[Any, ...], given: Mapping[str, Any]) -> None:
        """A launch of a Triton kernel, with what its `run` was given."""
        arguments = dict(zip(kernel.arg_names, args, strict=False))
        arguments |= {name: value for name, value in given.items() if name in kernel.arg_names}
        options = {name: value for name, value in given.items() if name not in (*kernel.arg_names, *NO_OPTION)}
        self.launches.append(Launch(kernel.fn.__name__, kernel, *specialised(kernel, arguments), options))


def _result(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The operator's result. There is nothing to compute, so what takes PyTorch long on meta tensors is left out."""
    if "out" in kwargs:
        return kwargs["out"]
    if func._opname == "addmm":  # of a product's shape; it would import torch.compile
        return torch.mm(*args[1:])
    if func._opname == "empty_like" and args[0].is_contiguous() and not kwargs:
        return args[0].new_empty(args[0].shape)
    return func(*args, **kwargs)


def specialised(kernel: Any, arguments: Mapping[str, Any]) -> \
        tuple[dict[str, str], dict[str, Any], tuple[str, ...]]:
    """(types, constants, multiples of 16): what the compiler is told of the arguments, as Triton's launcher tells it.

    Of an integer that the kernel does not declare constant it is told whether it is 1, which becomes a constant, and
    whether it is a multiple of 16; of a tensor, whether its address is one. An address counts from its memory's begin,
    which is aligned.
    """
    types: dict[str, str] = {}
    constants: dict[str, Any] = {}
    aligned = []
    for parameter in kernel.params:
        name, value = parameter.name, arguments[parameter.name]
        if isinstance(value, torch.Tensor):
            types[name] = f"*{TYPES[value.dtype]}"
            multiple = value.storage_offset() * value.element_size() % 16 == 0
        elif hasattr(value, "block_shape"):  # a tensor descriptor
            types[name], multiple = f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>", False
        elif parameter.is_constexpr or value is None or (value == 1 and type(value) is int
                                                         and not parameter.do_not_specialize):
            constants[name], multiple = value, False
        elif type(value) is int:
            types[name], multiple = "i32" if -(2**31) <= value < 2**31 else "i64", value % 16 == 0
        else:
            assert type(value) is float, f"{kernel.fn.__name__}: {name} is {value!r}"
            types[name], multiple = "fp32", False
        if multiple and not parameter.do_not_specialize:
            aligned.append(name)
    return types, constants, tuple(aligned)


@contextmanager
def counting(arch: str = "sm_90") -> Iterator[Counter]:
    """Inside the block meta tensors pass for CUDA tensors, and launches are noted, not made.

    Args:
        arch: whose tiles the launches take, one of `tiles.ARCHITECTURES` or "any".
    """
    from triton.runtime.jit import JITFunction

    counter = Counter()

    def launch(kernel: Any, *args: Any, **given: Any) -> None:
        counter.note(kernel, args, given)

    with ExitStack() as stack:
        for target, name, value in (
            (torch.Tensor, "is_cuda", True), (torch, "is_autocast_enabled", lambda *kind: False),
            (JITFunction, "run", launch), (tiles, "architecture", lambda device: arch),
            (tiles, "gpu_name", lambda device: ""),
        ):
            stack.enter_context(mock.patch.object(target, name, value))
        stack.enter_context(counter)
        yield counter


def lookups_on_paper(case: Case, arch: str) -> tuple[list[tiles.Lookup], list[tiles.Lookup]]:
    """(lookups of the forward, lookups of the backward) of a case on a GPU; nothing is compiled or computed for it."""
    with counting(arch), tiles.recorded() as lookups:
        ends = run_inside(case, lookups)
        return lookups[:ends], lookups[ends:]


def run_inside(case: Case, lookups: Sequence[object] = ()) -> int:
    """Run a case inside of `counting`; returns how many lookups its forward has made."""
    device = torch.device("meta")
    inputs = check.leaves_of(case, case.draw(device))
    outputs = check.as_tuple(case.providers[0].prepare(case, device)(inputs))
    ends = len(lookups)
    if case.direction in check.GRADIENTS:
        check.gradients(case, inputs, outputs, [torch.empty_like(out) for out in outputs])
    return ends
