"""Which tensor of a step is the first that is not finite: the step is computed again, and each operation looked at.

Batches and dropout masks are functions of the step, so that the replay is exact. An operation is known by the
parameters that it reads, forward and backward alike.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from phi1 import Phi1

# FSDP's own operations are not looked at: their buffers begin with whatever was in memory, and hold others' gradients.
WATCHED = ("aten::embedding", "aten::embedding_dense_backward", "aten::mul")
EMBEDDINGS = ("aten::embedding", "phi1::embedding")  # the latter on CPUs in 16 bits


def find_nonfinite(model: Phi1, accumulate: Callable[[], object], ids: list[Tensor]) -> str:
    """Collective: what is first not finite, in one line; "" if all that is looked at is finite.

    Args:
        model: whose gradients are to be discarded afterwards.
        accumulate: computes the step's forward and backward passes again.
        ids: sample ids of each micro-step of this process.
    """
    with _Finder(model) as finder:
        accumulate()
    found: list[Any] = [None] * dist.get_world_size()
    own = finder.found and (finder.found_in, f"{finder.found}; samples {ids[finder.found_in].tolist()}")
    dist.all_gather_object(found, own)
    first = min(((*each, rank) for rank, each in enumerate(found) if each), key=lambda each: each[0], default=None)
    return f"{first[1]}, micro-step {first[0] + 1}, rank {first[2]}" if first else ""


class _Finder(TorchDispatchMode):
    """Looks at the results of operations until one is not finite; also in the threads that autograd works in."""

    def __init__(self, model: Phi1) -> None:
        super().__init__()
        self.model, self.micro_step = model, -1
        self.found, self.found_in = "", 0
        self.names: dict[int, str] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        if name in EMBEDDINGS:  # with which each forward pass begins
            self.micro_step, self.names = self.micro_step + 1, self._whole_parameters()
        if not self.found and (name.startswith("phi1::") or name in WATCHED):
            results = result if isinstance(result, tuple | list) else (result,)
            bad = [tensor for tensor in results if _is_bad(tensor)]
            if bad:
                self.found, self.found_in = self._describe(name, bad[0], tree_leaves(args)), self.micro_step
        return result

    def _describe(self, name: str, bad: Tensor, args: list[Any]) -> str:
        names = self.names | self._whole_parameters()
        read = {names[arg.data_ptr()]: arg for arg in args if isinstance(arg, Tensor) and arg.data_ptr() in names}
        layer = next((key.removesuffix(".weight").removesuffix(".norm") for key in read),
                     "embed" if "embedding" in name else "the loss")
        backward = torch._C._current_autograd_node() is not None
        of = next((key for key, arg in read.items() if backward and arg.shape == bad.shape), "")
        finite = bad[bad.isfinite()].abs()
        largest = f"{float(finite.max()):.4g}" if finite.numel() else "none"
        spoilt = [key for key, arg in read.items() if _is_bad(arg)]
        return (f"not finite: {layer}, {name}, {'backward' if backward else 'forward'}: "
                f"{f'gradient of {of}' if of else 'result'} {list(bad.shape)} {str(bad.dtype).removeprefix('torch.')}, "
                f"largest finite value {largest}" + (f"; {', '.join(spoilt)} is not finite itself" if spoilt else ""))

    def _whole_parameters(self) -> dict[int, str]:
        """Names by address. While an operation reads them, parameters are whole tensors."""
        return {parameter.data_ptr(): key for key, parameter in self.model.named_parameters()
                if not isinstance(parameter, DTensor)}


def _is_bad(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and tensor.is_floating_point() and not bool(tensor.isfinite().all())
