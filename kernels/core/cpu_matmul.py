"""Matrix products of the PyTorch code.

Many CPUs have no arithmetic for float16 or bfloat16, and PyTorch then takes 5 to 60 times as long as for float32.
Products with at least `least_rows()` rows and columns are therefore computed in float32, a group of columns at a time,
and rounded once.
"""

from __future__ import annotations

from functools import cache

import torch

from phi1.kernels.core.backend import use_triton
from phi1.kernels.core.cpu_memory import empty

COLUMNS = 4096  # converted at a time; converting a whole head of 2,048 x 51,200 would take 420 MB


def mm(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Return the product [M, N] of a [M, K] and b [K, N], written to `out` if given."""
    if _widens(a, b):
        return _wide_product(None, a, b, out)
    return torch.mm(a, b) if out is None else torch.mm(a, b, out=out)


def addmm(c: torch.Tensor, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Return c + a b, written to `out` if given. c is [N] or [M, N], and may be `out`."""
    if _widens(a, b):
        return _wide_product(c, a, b, out)
    return torch.addmm(c, a, b) if out is None else torch.addmm(c, a, b, out=out)


def _widens(a: torch.Tensor, b: torch.Tensor) -> bool:
    """True if the product is computed in float32. False among the Triton kernels, whose products are cuBLAS's."""
    return (a.is_cpu and not multiplies(a.dtype) and min(a.shape[0], b.shape[1]) >= least_rows()
            and not use_triton(a))


@cache
def multiplies(dtype: torch.dtype) -> bool:
    """True if this CPU computes products of this dtype fast: bfloat16 with AVX-512, float16 seldom, float32 always."""
    if dtype == torch.bfloat16:
        return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if dtype == torch.float16:
        return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return True


def least_rows() -> int:
    """Return the number of rows from which float32 is faster, converted operands included.

    Measured at 1,024 x 7,168 and 256 x 1,024, weights in rows: with AVX-512 float32 takes as long at 64 rows and 0.7 of
    the time at 128; with AVX2 as long at 8 rows, 0.5 of the time at 16 and 0.2 at 128.
    """
    return 64 if multiplies(torch.bfloat16) else 16


def _wide_product(
    c: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None
) -> torch.Tensor:
    out = a.new_empty((a.shape[0], b.shape[1])) if out is None else out
    wide_a = _wide(a)
    for first in range(0, b.shape[1], COLUMNS):
        some = slice(first, min(first + COLUMNS, b.shape[1]))
        wide_b = _wide(b[:, some])
        product = empty((a.shape[0], wide_b.shape[1]), dtype=torch.float32, device=a.device)
        if c is None:
            torch.mm(wide_a, wide_b, out=product)
        else:
            torch.addmm(c[..., some].float(), wide_a, wide_b, out=product)
        out[:, some].copy_(product)
    return out


def _wide(x: torch.Tensor) -> torch.Tensor:
    """Return x in float32 in its own memory layout, because PyTorch converts fast only without a transposition."""
    if x.stride(1) != 1 and x.stride(0) == 1:
        return _wide(x.t()).t()
    return empty(x.shape, dtype=torch.float32, device=x.device).copy_(x)
