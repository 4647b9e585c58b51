"""Arithmetic in 16 bits on copies of fp32 parameters, for a model on one device: neither autocast nor FSDP."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from phi1.model import Phi1


class WorkingCopies:
    """`model.loss` computes with copies of the parameters in another precision; gradients add up in fp32.

    As FSDP's mixed precision with a `reduce_dtype` of float32, and with the same bits: each backward pass is in
    `dtype`, and its gradients are then added to those of the parameters. The copies are taken anew in each call, so
    that what changes the parameters in place is seen; a backward pass is to come before the change. A gradient has the
    memory of the one before. The model's own `loss` is replaced, for as long as the model lives, and such a model can
    be neither copied nor pickled.

    FSDP at one process on a CPU copies each parameter twice, into memory that is often new. That takes 2 % of a step of
    4 layers of width 256 with a vocabulary of 51,200 in a process that does nothing else, and 11 % in one that the C
    library makes give its memory back in between; 6 % there with one of 4,096 (2 EPYC cores, torch 2.13, bfloat16).

    Args:
        model: its parameters are float32, plain or DTensors that this process holds whole.
        dtype: of the copies, float16, bfloat16 or float32; with float32 the parameters' own memory is used.

    Raises:
        TypeError: a parameter, or dtype, is of another type.
    """

    def __init__(self, model: Phi1, dtype: torch.dtype) -> None:
        if dtype not in (torch.float16, torch.bfloat16, torch.float32):
            raise TypeError(f"WorkingCopies: dtype must be float16, bfloat16 or float32; got {dtype}")
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
            copy.requires_grad, copy.grad = parameter.requires_grad, None  # what an interrupted backward has left
            if copy.dtype != values.dtype:
                copy.data.copy_(values)  # .data: the graph of a call before may read the copy, which had these values
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
    """Move a copy's gradient to its parameter's: to `gradient`, in memory `sums`, unless it has another one."""
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
    """A DTensor of `values` if the parameter is one."""
    if not isinstance(parameter, DTensor):
        return values
    return DTensor.from_local(values, parameter.device_mesh, parameter.placements, run_check=False)
