"""Device functions of tiled products: C = A B^T, one tile [BLOCK_M, BLOCK_N] a program, accumulated in float32.

A kernel that fuses an epilogue with a product has this form:

    pid_m, pid_n = grouped_tile(tl.program_id(0), n_rows, n_cols, BLOCK_M, BLOCK_N, GROUP_M)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    acc = add_product(acc, a_ptr, b_ptr, wrapped(pid_m, BLOCK_M, n_rows), wrapped(pid_n, BLOCK_N, n_cols), n_inner,
                      stride_a_m, stride_a_k, stride_b_n, stride_b_k, BLOCK_K, EVEN_K)
    left, right = column_halves(acc, BLOCK_M, BLOCK_N)       # if acc and the outputs do not fit the registers together

Its grid has cdiv(n_rows, BLOCK_M) * cdiv(n_cols, BLOCK_N) programs in one dimension. A persistent kernel has all of
this inside a loop, and a grid of `n_programs` programs:

    first, end, step = own_tiles(n_rows, n_cols, BLOCK_M, BLOCK_N, PERSISTENT)
    for tile in tl.range(first, end, step, flatten=PERSISTENT):

A second call of `add_product` on the same acc adds the product of another pair of operands. Either stride of an operand
may be 1, which selects its transposition: W [n_cols, n_inner] in x W^T has stride_b_k = 1, and W [n_inner, n_cols] in
x W has stride_b_n = 1. With EVEN_K, BLOCK_K divides n_inner, and no load has a mask. Indices of rows and columns past
the end start again at 0 and are not masked, so the kernel must mask its stores.

Loads by plain pointers compile to cp.async and mma.sync on sm_80, to cp.async and wgmma on sm_90, to tcgen05 on sm_100
and to MFMA on AMD. float32 operands are multiplied in float32, without tensor instructions.

M rows of A, N rows of B, K inner dimension.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl


@triton.jit
def grouped_tile(
    pid,
    n_rows,
    n_cols,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Return (tile row, tile column) of a program. Programs that run at the same time share operands in L2.

    Programs go through GROUP_M rows of tiles column by column, then through the next GROUP_M rows.
    """
    tiles_m, tiles_n = tl.cdiv(n_rows, BLOCK_M), tl.cdiv(n_cols, BLOCK_N)
    group = pid // (tiles_n * GROUP_M)
    within = pid % (tiles_n * GROUP_M)
    first = group * GROUP_M
    rows = tl.minimum(tiles_m - first, GROUP_M)
    return first + within % rows, within // rows


@triton.jit
def own_tiles(
    n_rows,
    n_cols,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PERSISTENT: tl.constexpr,
):
    """Return (first, end, step) of a program's tiles: one tile, or every tl.num_programs(0)-th one if PERSISTENT.

    `flatten` merges the loop over them with the loop over K, so a tile's first operands are loaded while the previous
    tile is stored. If not PERSISTENT, the compiler sees that the loop runs once, and removes it.
    """
    pid = tl.program_id(0)
    end, step = pid + 1, 1
    if PERSISTENT:
        end, step = tl.cdiv(n_rows, BLOCK_M) * tl.cdiv(n_cols, BLOCK_N), tl.num_programs(0)
    return pid, end, step


@triton.jit
def wrapped(
    pid,
    BLOCK: tl.constexpr,
    size,
):
    """Return a tile's row or column indices for `add_product`, int64 [BLOCK]. Past the end they start again at 0."""
    # The remainder is in 32 bits, because in 64 bits it is a subroutine. Runs of 16 stay contiguous if 16 divides size.
    return ((pid * BLOCK + tl.arange(0, BLOCK)) % size).to(tl.int64)


@triton.jit
def add_product(
    acc,  # [BLOCK_M, BLOCK_N] float32
    a_ptr,  # [M, K] A
    b_ptr,  # [N, K] B
    offs_m,  # [BLOCK_M] int64, rows of A
    offs_n,  # [BLOCK_N] int64, rows of B
    n_inner,
    stride_a_m,
    stride_a_k,
    stride_b_n,
    stride_b_k,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """Return acc + A[offs_m] B[offs_n]^T."""
    offs_k = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + offs_m[:, None] * stride_a_m + offs_k[None, :] * stride_a_k  # [BLOCK_M, BLOCK_K]
    b_ptrs = b_ptr + offs_n[None, :] * stride_b_n + offs_k[:, None] * stride_b_k  # [BLOCK_K, BLOCK_N]
    for first in range(0, n_inner, BLOCK_K):
        if EVEN_K:
            a, b = tl.load(a_ptrs), tl.load(b_ptrs)
        else:
            mask_k = offs_k < n_inner - first
            a = tl.load(a_ptrs, mask=mask_k[None, :], other=0.0)
            b = tl.load(b_ptrs, mask=mask_k[:, None], other=0.0)
        acc = tl.dot(a, b, acc, input_precision="ieee")
        a_ptrs += BLOCK_K * stride_a_k
        b_ptrs += BLOCK_K * stride_b_k
    return acc


@triton.jit
def column_halves(
    acc,  # [BLOCK_M, BLOCK_N]
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Return the left and the right half of a tile's columns, [BLOCK_M, BLOCK_N / 2] each, within the registers."""
    return tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))


@triton.jit
def column_parts(
    acc,  # [BLOCK_M, BLOCK_N]
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Return a tile's columns as a tuple of PARTS (1, 2 or 4) equal parts, from left to right."""
    if PARTS == 2:
        parts = column_halves(acc, BLOCK_M, BLOCK_N)
    elif PARTS == 1:
        parts = (acc,)
    else:
        left, right = column_halves(acc, BLOCK_M, BLOCK_N)
        a, b = column_halves(left, BLOCK_M, BLOCK_N // 2)
        c, d = column_halves(right, BLOCK_M, BLOCK_N // 2)
        parts = (a, b, c, d)
    return parts


def n_programs(t: dict[str, int], n_rows: int, n_cols: int, device: torch.device) -> int:
    """Return the number of programs for a product [n_rows, n_cols].

    The number is one per tile, or with t["persistent"] at most that many per multiprocessor. No result bit depends on
    it.
    """
    tiles = triton.cdiv(n_rows, t["block_m"]) * triton.cdiv(n_cols, t["block_n"])
    return min(tiles, t["persistent"] * multiprocessors(device)) if t.get("persistent") else tiles


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """Return the GPU's number of multiprocessors, and 1 for a CPU, where programs are interpreted one by one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def one_unit_stride(x: torch.Tensor) -> torch.Tensor:
    """Return the operand, copied if neither of its strides is 1."""
    return x if 1 in x.stride() else x.contiguous()


def check_rows(op: str, block_m: int, *matrices: torch.Tensor | None) -> None:
    """Raise NotImplementedError if offsets inside a tile of block_m rows do not fit the epilogues' 32 bits.

    Offsets of 64 bits would take up to 70 more registers a thread, and the accumulators would spill.
    """
    for x in matrices:
        if x is not None and x.stride(0) * block_m >= 2**31:
            raise NotImplementedError(f"{op}: a row may be at most {2**31 // block_m - 1} elements from the next; "
                                      f"got strides {x.stride()}")
