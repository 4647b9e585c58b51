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
STRIP_ELEMENTS = 1 << 17  # four float32 strips fit 2 MiB


def gelu_forward(x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """gelu_new(x), into `out` if that is given. Nothing is checked."""
    out = x.new_empty(x.shape) if out is None else out
    if not x.is_cpu or x.dim() != 2:
        return torch.ops.aten.gelu.out(x, approximate="tanh", out=out)
    for rows, wide, (scratch, _, _) in _strips(x):
        out[rows] = wide.div_(_denominator(wide, torch.mul(wide, wide, out=scratch))).to(out.dtype)
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
    for rows, wide, (square, s, slope) in _strips(x):
        torch.mul(wide, wide, out=square)
        s.copy_(square)
        _denominator(wide, s).reciprocal_()
        wide.mul_(s)
        if y is not None:
            y[rows] = wide.to(y.dtype)
        square.mul_(3 * CUBIC).add_(LINEAR)  # u'
        torch.mul(s, square, out=slope).sub_(square).mul_(wide)  # -y (1 - s) u'
        s.sub_(slope)
        dx[rows] = s.mul_(slope.copy_(dy[rows].contiguous())).to(dx.dtype)
    return dx


def _denominator(x: torch.Tensor, square: torch.Tensor) -> torch.Tensor:
    """1 + exp(-u(x)), in place of x^2."""
    return square.mul_(-CUBIC * LOG2E).sub_(LINEAR * LOG2E).mul_(x).exp2_().add_(1)


def _strips(x: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor, list[torch.Tensor]]]:
    """(rows, those rows of x [N, F] as float32 to overwrite, three more such strips)."""
    n_rows, width = x.shape
    step = min(max(1, STRIP_ELEMENTS // max(1, width)), max(1, n_rows))
    buffers = [torch.empty((step, width), dtype=torch.float32) for _ in range(4)]
    for first in range(0, n_rows, step):
        rows = slice(first, min(first + step, n_rows))
        wide, *others = (buffer[: rows.stop - first] for buffer in buffers)
        yield rows, wide.copy_(x[rows].contiguous()), others


def gelu_new(x: torch.Tensor) -> torch.Tensor:
    """gelu_new(x) in plain differentiable PyTorch."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.sigmoid(LINEAR * wide + CUBIC * wide**3)).to(x.dtype)
