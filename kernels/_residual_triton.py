"""Dropout of a residual branch inside Triton kernels: the bits of `_philox.residual_keep`, tile by tile.

A launch passes `**mask_arguments(dropout, n_rows)`; its kernel takes the six arguments by those names, with rng_ptr
None where nothing is dropped.

N rows, B samples.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from phi1.kernels._philox import Dropout, dropout_scale, is_active, threshold
from phi1.kernels._philox_triton import keep_mask, philox_key

NOTHING = {"rng_ptr": None, "sample_ids_ptr": None, "rows_per_sample": 1, "stream": 0, "threshold": 0, "scale": 1.0}


@triton.jit
def dropped_tile(
    x,  # [BLOCK_M, BLOCK_N] float32
    rng_ptr,  # [2] int64, (seed, step)
    sample_ids_ptr,  # [B] int64, or None
    offs_n,  # [BLOCK_M] the tile's rows
    first_column,  # a multiple of BLOCK_N
    n_rows,
    rows_per_sample,
    stream,
    threshold,
    scale,
):
    """x with elements dropped and the rest scaled. BLOCK_N is 32 or a multiple of 64."""
    if sample_ids_ptr is None:
        sample, position = offs_n.to(tl.int32), tl.zeros_like(offs_n).to(tl.int32)
    else:
        sample = tl.load(sample_ids_ptr + offs_n // rows_per_sample, mask=offs_n < n_rows, other=0).to(tl.int32)
        position = (offs_n % rows_per_sample).to(tl.int32)
    key = philox_key(rng_ptr)
    keep = keep_mask(key, position, first_column, sample[:, None], stream, threshold, x.shape[1])
    return tl.where(keep, x * scale, 0.0)


def mask_arguments(dropout: Dropout | None, n_rows: int) -> dict[str, Any]:
    """What a kernel needs of `dropout` for rows [N], by the names of its arguments."""
    if dropout is None or not is_active(dropout):
        return NOTHING
    ids = dropout.sample_ids
    stream = dropout.layer << 16 | dropout.kind << 12
    return {
        "rng_ptr": dropout.rng.contiguous(),
        "sample_ids_ptr": None if ids is None else ids.contiguous(),
        "rows_per_sample": 1 if ids is None else max(1, n_rows // max(1, ids.shape[0])),
        "stream": stream - (stream >> 31 << 32),  # the same 32 bits signed: as an int64 it would select Philox4x64
        "threshold": threshold(dropout.p),
        "scale": dropout_scale(dropout.p),
    }
