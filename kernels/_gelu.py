"""gelu_new on plain tensors, forward, backward and specification, shared by the operations that apply it.

    y = x / 2 * (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))  =  x * sigmoid(1.5957691216 (x + 0.044715 x^3))

Computed in float32, rounded once.
"""

from __future__ import annotations

import torch
from torch.nn.functional import gelu as torch_gelu


def gelu_forward(x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """gelu_new(x), into `out` if that is given. Nothing is checked."""
    if out is None:
        return torch_gelu(x, approximate="tanh")
    return torch.ops.aten.gelu.out(x, approximate="tanh", out=out)


def gelu_backward(dy: torch.Tensor, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """The gradient of x, into `out` if that is given. Nothing is checked."""
    if out is None:
        return torch.ops.aten.gelu_backward(dy, x, approximate="tanh")
    return torch.ops.aten.gelu_backward.grad_input(dy, x, approximate="tanh", grad_input=out)


def gelu_new(x: torch.Tensor) -> torch.Tensor:
    """gelu_new(x) in plain differentiable PyTorch."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.sigmoid(1.5957691216057308 * (wide + 0.044715 * wide**3))).to(x.dtype)
