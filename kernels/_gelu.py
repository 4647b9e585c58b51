"""gelu_new on plain tensors: forward, backward and specification, shared by the operations that apply it.

    y = x s(x)      s(x) = sigmoid(u(x))      u(x) = 2 sqrt(2 / pi) (x + 0.044715 x^3)
    y' = s + y (1 - s) u'                     which is x / 2 (1 + tanh(u / 2)), and its derivative

Computed in float32, rounded once. On CPUs in strips that stay in the caches, with exp2, which is six times as fast as
exp or tanh in PyTorch with AVX-512: 0.7 times the time of PyTorch's gelu, and one exponential for y and y' together.
PyTorch converts only contiguous elements fast, hence the two steps between x's dtype and float32.

N rows, F width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

LINEAR = 2 * math.sqrt(2 / math.pi)
CUBIC = LINEAR * 0.044715
LOG2E = math.log2(math.e)
STRIP_ELEMENTS = 1 << 17  # a thread's share of four float32 strips fits 2 MiB


def gelu_forward(x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """gelu_new(x), into `out` if that is given. Nothing is checked."""
    out = x.new_empty(x.shape) if out is None else out
    if not x.is_cpu or x.dim() != 2:
        return torch.ops.aten.gelu.out(x, approximate="tanh", out=out)
    for rows in _strips(x):
        wide = _wide(x[rows])
        square = wide * wide
        out[rows] = wide.div_(_exponential(wide, square, out=square).add_(1)).to(out.dtype)
    return out


def gelu_backward(
    dy: torch.Tensor, x: torch.Tensor, dx: torch.Tensor | None = None, y: torch.Tensor | None = None
) -> torch.Tensor:
    """The gradient of x, into `dx` if that is given; gelu_new(x) into `y` if that is. Nothing is checked."""
    dx = x.new_empty(x.shape) if dx is None else dx
    if not x.is_cpu or x.dim() != 2:
        if y is not None:
            torch.ops.aten.gelu.out(x, approximate="tanh", out=y)
        return torch.ops.aten.gelu_backward.grad_input(dy, x, approximate="tanh", grad_input=dx)
    for rows in _strips(x):
        wide = _wide(x[rows])
        square = wide * wide
        s = _exponential(wide, square).add_(1).reciprocal_()
        wide.mul_(s)
        if y is not None:
            y[rows] = wide.to(y.dtype)
        _line(LINEAR, 3 * CUBIC, square, out=square).mul_(wide)  # u' y
        s.addcmul_(square, _line(1.0, -1.0, s))
        dx[rows] = s.mul_(_wide(dy[rows])).to(dx.dtype)
    return dx


def _exponential(x: torch.Tensor, square: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """exp(-u(x)), given x^2."""
    return _line(-LINEAR * LOG2E, -CUBIC * LOG2E, square, out).mul_(x).exp2_()


def _line(constant: float, slope: float, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """constant + slope x, in one pass."""
    return torch.add(x.new_tensor(constant), x, alpha=slope, out=out)


def _strips(x: torch.Tensor) -> Iterator[slice]:
    """Rows of x [N, F], as many as the caches hold."""
    n_rows, width = x.shape
    step = max(1, STRIP_ELEMENTS * torch.get_num_threads() // max(1, width))
    for first in range(0, n_rows, step):
        yield slice(first, min(first + step, n_rows))


def _wide(x: torch.Tensor) -> torch.Tensor:
    """A contiguous float32 copy."""
    return x.clone(memory_format=torch.contiguous_format).float()


def gelu_new(x: torch.Tensor) -> torch.Tensor:
    """gelu_new(x) in plain differentiable PyTorch."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.sigmoid(LINEAR * wide + CUBIC * wide**3)).to(x.dtype)
