"""Matrix products of the PyTorch code, into memory that the process keeps.

Most CPUs do not multiply float16, and PyTorch then takes up to five times as long as for float32, conversions included.
From WIDE rows and columns on such products are made in float32 and rounded once.
"""

from __future__ import annotations

from functools import cache

import torch

from phi1.kernels._memory import empty

WIDE = 64  # measured at 1,024 x 7,168: float32 takes as long at 64 rows, 0.7 of the time at 128, 0.35 at 512


def mm(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """a b [M, N] of a [M, K] and b [K, N], into `out` if that is given."""
    out = _empty_product(a, b) if out is None else out
    if _widens(a, b):
        return out.copy_(torch.mm(_wide(a), _wide(b), out=_empty_product(a, b, torch.float32)))
    return torch.mm(a, b, out=out)


def addmm(c: torch.Tensor, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """c + a b, where c [N] or [M, N] may be `out`."""
    out = _empty_product(a, b) if out is None else out
    if _widens(a, b):
        return out.copy_(torch.addmm(c.float(), _wide(a), _wide(b), out=_empty_product(a, b, torch.float32)))
    return torch.addmm(c, a, b, out=out)


def _empty_product(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    return empty((a.shape[0], b.shape[1]), dtype=dtype or a.dtype, device=a.device)


def _widens(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == torch.float16 and a.is_cpu and min(a.shape[0], b.shape[1]) >= WIDE and not _multiplies_float16()


@cache
def _multiplies_float16() -> bool:
    """True on CPUs with avx512_fp16 or amx_fp16."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_fp16_supported()


def _wide(x: torch.Tensor) -> torch.Tensor:
    """x in float32, its rows or columns next to each other as they were: PyTorch converts no others fast."""
    if x.stride(1) != 1 and x.stride(0) == 1:
        return _wide(x.t()).t()
    return empty(x.shape, dtype=torch.float32, device=x.device).copy_(x)
