"""Count the kernels that a computation launches, and the bytes and flops of each, without a GPU and without computing.

The computation runs on meta tensors, which have shapes and no values. Every PyTorch operator that is no view counts as
one launch that reads its arguments and writes its results once; every Triton kernel as one launch that touches each
tensor it is given once, or twice where it writes what it has read. That is the least traffic of this sequence of
launches: what caches save between launches is not taken off, and what a launch reads twice is not added.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

from phi1.kernels.core import tiles


@dataclass(frozen=True)
class Launch:
    """One kernel."""

    name: str
    n_bytes: float
    n_flops: float = 0.0


# Where these write their first argument they do not read it.
OVERWRITES = {"copy_", "fill_", "zero_", "normal_"}
# Of these first arguments only as many rows are read as are written.
SELECTS = {"embedding", "index_select", "gather", "index"}
NO_KERNEL = ("empty", "new_empty", "empty_like", "empty_strided", "scalar_tensor", "lift_fresh", "_local_scalar_dense")
RIGHT_FACTORS = {"mat2", "batch2", "vec2", "vec"}
"""What PyTorch's schemas call the right factor of a product, with every form of it (in place, `out=`, a wider result);
the argument before it is the left one."""


def _size(x: torch.Tensor) -> int:
    return x.numel()


# Kernel -> its flops from its arguments by name. Causal attention needs half of each product; its backward makes seven
# products where five would do, which is the price of determinism without a second pass.
TRITON_FLOPS: dict[str, Callable[[Mapping[str, Any]], float]] = {
    "linear_forward_kernel": lambda a: 2.0 * _size(a["x_ptr"]) * a["weight_ptr"].shape[0],
    "dgelu_kernel": lambda a: 2.0 * _size(a["dout_ptr"]) * a["weight_ptr"].shape[1],
    "in_proj_kernel": lambda a: 2.0 * _size(a["h_ptr"]) * (a["weight_ptr"].shape[0] - _columns_left_out(a)),
    "out_proj_kernel": lambda a: 2.0 * (_size(a["att_ptr"]) + _size(a["act_ptr"])) * a["weight_ptr"].shape[0],
    "attention_forward_kernel": lambda a: 4.0 * _causal_part(a) * _size(a["q_ptr"]) * a["k_ptr"].shape[1],
    "attention_backward_dq_kernel": lambda a: 6.0 * _causal_part(a) * _size(a["q_ptr"]) * a["k_ptr"].shape[1],
    "attention_backward_dkdv_kernel": lambda a: 8.0 * _causal_part(a) * _size(a["q_ptr"]) * a["k_ptr"].shape[1],
}

# Tensors that a kernel reads and then writes: they move twice.
TRITON_IN_PLACE = {"loss_rows_kernel": ("logits_ptr",), "column_sums_kernel": ("sums_ptr",)}


def _causal_part(arguments: Mapping[str, Any]) -> float:
    return 0.5 if arguments["IS_CAUSAL"] else 1.0


def _columns_left_out(arguments: Mapping[str, Any]) -> int:
    """q, k and v, where only pre is computed again."""
    return 3 * arguments["WIDTH"] if arguments["qkv_ptr"] is None else 0


class Counter(TorchDispatchMode):
    """Notes every launch of the operators inside the block; phi1's own are opened, and their kernels counted."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Launch] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "phi1":
            with self:
                return OPDEFS[f"phi1::{func._opname}"]._init_fn(*args, **kwargs)
        # torch 2.11 has no addmm with a wider result on meta tensors, and there is nothing to compute.
        out = kwargs["out"] if func._overloadname == "dtype_out" else func(*args, **kwargs)
        name = func._opname
        if name not in NO_KERNEL:
            self._note(func, name, args, kwargs, out)
        return out

    def record(self, name: str, tensors: Iterable[torch.Tensor | None], n_flops: float = 0.0, again: int = 0) -> None:
        """A launch of somebody's kernel that touches each of these tensors once, and moves some bytes again."""
        self.launches.append(Launch(name, sum(n_bytes(x) for x in _distinct(tensors)) + again, n_flops))

    def _note(self, func: Any, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> None:
        read: list[torch.Tensor] = []
        written: list[torch.Tensor] = []
        values = [*zip(func._schema.arguments, args, strict=False),
                  *((a, kwargs[a.name]) for a in func._schema.arguments if a.name in kwargs)]
        for i, (argument, value) in enumerate(values):
            writes = argument.alias_info is not None and argument.alias_info.is_write
            written += tensors_of(value) if writes else []
            if not argument.is_out and not (writes and name in OVERWRITES) and not (i == 0 and name in SELECTS):
                read += tensors_of(value)
        known = {storage(x) for x in (*read, *written)}
        fresh = [x for x in tensors_of(out) if storage(x) not in known]
        if not fresh and not written:
            return  # a view
        moved = sum(map(n_bytes, _distinct(read))) + sum(map(n_bytes, _distinct(written + fresh)))
        if name in SELECTS:
            moved += sum(map(n_bytes, fresh))
        self.launches.append(Launch(name, moved, _product_flops({a.name: value for a, value in values})))


def _product_flops(arguments: Mapping[str, Any]) -> float:
    """Of an operator by its arguments in the schema's order; 0 where it is no product."""
    names = list(arguments)
    at = next((i for i, name in enumerate(names) if name in RIGHT_FACTORS), 0)
    if not at:
        return 0.0
    left, right = arguments[names[at - 1]], arguments[names[at]]
    return 2.0 * left.numel() * (1 if names[at] == "vec" else right.shape[-1])


def tensors_of(value: Any) -> list[torch.Tensor]:
    """The tensors in an argument or a result."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [x for item in value for x in tensors_of(item)] if isinstance(value, list | tuple) else []


def storage(x: torch.Tensor) -> int:
    return x.untyped_storage()._cdata


def n_bytes(x: torch.Tensor) -> int:
    """Bytes that the tensor's elements take; repeated ones (stride 0) once."""
    sizes = [size for size, stride in zip(x.shape, x.stride(), strict=True) if stride]
    return math.prod(sizes) * x.element_size()


def _distinct(tensors: Iterable[torch.Tensor | None]) -> list[torch.Tensor]:
    """Tensors without those that are the same part of the same memory."""
    found = {(storage(x), x.storage_offset(), x.shape): x for x in tensors if x is not None}
    return list(found.values())


@contextmanager
def counting(arch: str = "sm_90") -> Iterator[Counter]:
    """Inside the block meta tensors pass for CUDA tensors, and launches are noted, not made.

    Args:
        arch: whose tiles the launches take.
    """
    from triton.runtime.jit import JITFunction

    counter = Counter()

    def launch(kernel: Any, *args: Any, **options: Any) -> None:
        given = dict(zip(kernel.arg_names, args, strict=False)) | options
        # A tensor descriptor stands for its tensor.
        arguments: dict[str, Any] = {name: getattr(value, "base", value) for name, value in given.items()}
        name = kernel.fn.__name__
        flops = TRITON_FLOPS[name](arguments) if name in TRITON_FLOPS else 0.0
        counter.record(name, tensors_of(list(arguments.values())), flops,
                       again=sum(n_bytes(arguments[x]) for x in TRITON_IN_PLACE.get(name, ())))

    with ExitStack() as stack:
        for target, name, value in (
            (torch.Tensor, "is_cuda", True), (torch, "is_autocast_enabled", lambda *kind: False),
            (JITFunction, "run", launch), (tiles, "architecture", lambda device: arch),
            (tiles, "gpu_name", lambda device: ""),
        ):
            stack.enter_context(mock.patch.object(target, name, value))
        stack.enter_context(counter)
        yield counter
