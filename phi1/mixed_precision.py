"""Mixed precision for a model on one device, without autocast or FSDP: 16-bit copies of the fp32 parameters."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from phi1.arguments import check_instance, shown
from phi1.model import Phi1


class WorkingCopies:
    """Make `model.loss` compute with copies of the parameters in another precision; gradients add up in fp32.

    The bits are those of FSDP's mixed precision with `reduce_dtype=float32`: each backward runs in `dtype`, and its
    gradients are added to the parameters' fp32 gradients. Each call copies the parameters anew, so in-place changes
    take effect; the backward of a call must run before such a change. Gradients reuse the memory of earlier ones. The
    model's `loss` stays replaced while the model lives, and the model can be neither copied nor pickled.

    FSDP in one process on a CPU copies each parameter twice, often into new memory. For 4 layers of width 256 and a
    vocabulary of 51,200 that takes 2 % of a step, and 11 % in a process whose C library returns freed memory to the
    system; 6 % there with a vocabulary of 4,096 (2 EPYC cores, torch 2.13, bfloat16).

    Args:
        model: a model with float32 parameters, plain or DTensors that this process holds whole.
        dtype: dtype of the copies: float16, bfloat16, or float32, which uses the parameters' own memory.

    Raises:
        TypeError: model is no Phi1, a parameter is not float32, or dtype is none of the three.
    """

    def __init__(self, model: Phi1, dtype: torch.dtype) -> None:
        check_instance("WorkingCopies", "model", model, Phi1, "a phi1.Phi1")
        if dtype not in (torch.float16, torch.bfloat16, torch.float32):
            raise TypeError(f"WorkingCopies: dtype must be float16, bfloat16 or float32; got {shown(dtype)}")
        for name, parameter in model.named_parameters():
            if parameter.dtype != torch.float32:
                raise TypeError(f"WorkingCopies: parameters must be float32; got {parameter.dtype} of {name}")
        self._compute = model.loss
        self._places: list[tuple[nn.Module, str, nn.Parameter, Tensor, nn.Parameter]] = []
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                values = _local(parameter.detach())
                copy = nn.Parameter(values if dtype == values.dtype else torch.empty_like(values, dtype=dtype))
                sums = torch.empty_like(values)
                copy.register_post_accumulate_grad_hook(partial(_add, parameter, _like(parameter, sums), sums))
                self._places.append((module, name, parameter, values, copy))
        model.loss = self._loss  # type: ignore[method-assign]

    def _loss(self, *args: Any, **kwargs: Any) -> Tensor:
        for module, name, parameter, values, copy in self._places:
            if getattr(module, name) is not parameter:
                raise RuntimeError(f"WorkingCopies: {name} of {type(module).__name__} was replaced; change it in place")
            copy.requires_grad, copy.grad = parameter.requires_grad, None  # None: an interrupted backward leaves one
            if copy.dtype != values.dtype:
                copy.data.copy_(values)  # .data: an earlier call's graph may read the copy; the values are equal
        try:
            for module, name, *_, copy in self._places:
                setattr(module, name, copy)
            return self._compute(*args, **kwargs)
        finally:
            for module, name, parameter, *_ in self._places:
                setattr(module, name, parameter)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("a model with WorkingCopies can be neither copied nor pickled; save its state_dict()")


def _add(parameter: nn.Parameter, gradient: Tensor, sums: Tensor, copy: Tensor) -> None:
    """Move a copy's gradient to its parameter: add to its gradient, or start one as `gradient`, in memory `sums`."""
    found, copy.grad = copy.grad, None
    assert found is not None
    if parameter.grad is None:
        sums.copy_(found)
        parameter.grad = gradient
    else:
        _local(parameter.grad).add_(found)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _like(parameter: Tensor, values: Tensor) -> Tensor:
    """Return `values`, as a DTensor if the parameter is one."""
    if not isinstance(parameter, DTensor):
        return values
    return DTensor.from_local(values, parameter.device_mesh, parameter.placements, run_check=False)
