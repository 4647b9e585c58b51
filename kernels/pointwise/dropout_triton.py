"""Dropout of a residual branch inside Triton kernels: the bits of `philox.residual_keep`, tile by tile.

A launch passes `**mask_arguments(dropout, cu_seqlens)`; its kernel takes the seven arguments by those names, with
rng_ptr None where nothing is dropped. The document of a packed row is found by bisection.

N rows, B samples.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from phi1.kernels.core.philox import Dropout, dropout_scale, is_active, threshold
from phi1.kernels.core.philox_triton import keep_mask, philox_key

NOTHING = {"rng_ptr": None, "sample_ids_ptr": None, "cu_seqlens_ptr": None, "n_samples": 1, "stream": 0, "threshold": 0,
           "scale": 1.0}


@triton.jit
def dropped_tile(
    x,  # [BLOCK_M, BLOCK_N] float32
    rng_ptr,  # [2] int64, (seed, step)
    sample_ids_ptr,  # [B] int64, or None
    cu_seqlens_ptr,  # [B + 1] int32, or None where each sample has N / B rows
    offs_n,  # [BLOCK_M] the tile's rows
    first_column,  # a multiple of BLOCK_N
    n_rows,
    n_samples,
    stream,
    threshold,
    scale,
):
    """x with elements dropped and the rest scaled. BLOCK_N is 32 or a multiple of 64."""
    row = offs_n.to(tl.int32)
    if sample_ids_ptr is None:
        sample, position = row, tl.zeros_like(row)
    else:
        if cu_seqlens_ptr is None:
            rows_per_sample = n_rows // n_samples
            index, position = row // rows_per_sample, row % rows_per_sample
        else:
            index = document_of(cu_seqlens_ptr, row, n_samples)
            position = row - tl.load(cu_seqlens_ptr + index)
        sample = tl.load(sample_ids_ptr + index, mask=row < n_rows, other=0).to(tl.int32)
    key = philox_key(rng_ptr)
    keep = keep_mask(key, position, first_column, sample[:, None], stream, threshold, x.shape[1])
    return tl.where(keep, x * scale, 0.0)


@triton.jit
def document_of(
    cu_seqlens_ptr,  # [B + 1] int32, ascending from 0
    row,  # [BLOCK_M] int32
    n_documents,
):
    """The last of the documents that begin at a row or before it: empty ones have none."""
    document = tl.zeros_like(row)
    left = tl.cast(n_documents, tl.int32)  # the answer is one of so many from `document` on
    while left > 1:
        half = left // 2
        begins = tl.load(cu_seqlens_ptr + document + half)
        document = tl.where(begins <= row, document + half, document)
        left -= half
    return document


def mask_arguments(dropout: Dropout | None, cu_seqlens: torch.Tensor | None = None) -> dict[str, Any]:
    """What a kernel needs of `dropout`, by the names of its arguments; rows are packed documents with cu_seqlens.

    Kernels take n_samples unspecialised: it changes with each batch of documents, and where it is the constant 1, the
    bisection goes, over which Triton 3.6 fails.
    """
    if dropout is None or not is_active(dropout):
        return NOTHING
    ids = dropout.sample_ids
    return {
        "rng_ptr": dropout.rng.contiguous(),
        "sample_ids_ptr": None if ids is None else ids.contiguous(),
        "cu_seqlens_ptr": None if ids is None or cu_seqlens is None else cu_seqlens.to(torch.int32).contiguous(),
        "n_samples": 1 if ids is None else ids.shape[0],
        "stream": mask_stream(dropout),
        "threshold": threshold(dropout.p),
        "scale": dropout_scale(dropout.p),
    }


def mask_stream(dropout: Dropout) -> int:
    """The counter's last word. The same 32 bits signed: as an int64 it would select Philox4x64."""
    stream = dropout.layer << 16 | dropout.kind << 12
    return stream - (stream >> 31 << 32)
