"""Operands of tiled products by TMA (sm_90 and later): descriptors made on the host, and the loop that loads by them.

A kernel takes each operand as a pointer or as its descriptor, and has a constexpr that says which; the loop that loads
by pointers is in `matmul_triton.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from phi1.kernels.gemm.matmul_triton import add_product, wrapped


@triton.jit
def add_described_product(
    acc,  # [BLOCK_M, BLOCK_N] float32
    a_desc,  # [M, K]
    b_desc,  # [N, ..] K of its columns, from first_inner on
    first_row,
    first_col,
    first_inner,
    n_inner,
    BLOCK_K: tl.constexpr,
):
    """acc + A B^T for one tile, by TMA: what lies outside of A or B is 0."""
    for first in range(0, n_inner, BLOCK_K):
        a = a_desc.load([first_row, first])
        b = b_desc.load([first_col, first_inner + first])
        acc = tl.dot(a, b.T, acc, input_precision="ieee")
    return acc


@triton.jit
def add_described_product_by_rows(
    acc,  # [BLOCK_M, BLOCK_N] float32
    a_desc,  # [M, K]
    b_desc,  # [K, N]
    first_row,
    first_col,
    n_inner,
    BLOCK_K: tl.constexpr,
):
    """acc + A B for one tile, by TMA: what lies outside of A or B is 0."""
    for first in range(0, n_inner, BLOCK_K):
        acc = tl.dot(a_desc.load([first_row, first]), b_desc.load([first, first_col]), acc, input_precision="ieee")
    return acc


@triton.jit
def tile_product(
    a_ptr,  # [M, K], or its descriptor where TMA
    b_ptr,  # [N, K], or [K, N] where B_BY_ROWS; or its descriptor
    pid_m,
    pid_n,
    n_rows,
    n_cols,
    n_inner,
    stride_a_m,
    stride_a_k,
    stride_b_n,
    stride_b_k,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    TMA: tl.constexpr,
    B_BY_ROWS: tl.constexpr,
):
    """[BLOCK_M, BLOCK_N] float32: one tile of A B^T, or of A B where B_BY_ROWS, by either way of loading."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if not TMA:
        acc = add_product(acc, a_ptr, b_ptr, wrapped(pid_m, BLOCK_M, n_rows), wrapped(pid_n, BLOCK_N, n_cols), n_inner,
                          stride_a_m, stride_a_k, stride_b_n, stride_b_k, BLOCK_K, EVEN_K)
    elif B_BY_ROWS:
        acc = add_described_product_by_rows(acc, a_ptr, b_ptr, pid_m * BLOCK_M, pid_n * BLOCK_N, n_inner, BLOCK_K)
    else:
        acc = add_described_product(acc, a_ptr, b_ptr, pid_m * BLOCK_M, pid_n * BLOCK_N, 0, n_inner, BLOCK_K)
    return acc


def describable(*operands: torch.Tensor) -> bool:
    """Whether operands are as TMA wants them: dense rows that start at multiples of 16 bytes."""
    return all(
        x.numel() > 0 and x.stride(1) == 1 and x.stride(0) >= x.shape[1]
        and x.stride(0) * x.dtype.itemsize % 16 == 0 and x.data_ptr() % 16 == 0 for x in operands
    )


def operand(
    x: torch.Tensor, t: dict[str, int], block: str, tma: bool, columns: str = "block_k"
) -> torch.Tensor | TensorDescriptor:
    """x as a kernel takes it that reads blocks [t[block], t[columns]]."""
    return TensorDescriptor.from_tensor(x, [t[block], t[columns]]) if tma else x
