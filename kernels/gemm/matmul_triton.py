"""Device functions of the tiled products: C = A B^T, a tile [BLOCK_M, BLOCK_N] a program, accumulated in float32.

A kernel that ends a product with something of its own is written as

    pid_m, pid_n = grouped_tile(tl.program_id(0), n_rows, n_cols, BLOCK_M, BLOCK_N, GROUP_M)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    acc = add_product(acc, a_ptr, b_ptr, wrapped(pid_m, BLOCK_M, n_rows), wrapped(pid_n, BLOCK_N, n_cols), n_inner,
                      stride_a_m, stride_a_k, stride_b_n, stride_b_k, BLOCK_K, EVEN_K)
    left, right = column_halves(acc, BLOCK_M, BLOCK_N)       # where acc and what is stored would not fit the registers

and launched on cdiv(n_rows, BLOCK_M) * cdiv(n_cols, BLOCK_N) programs in one dimension; or, where it may be persistent,
with all of this inside

    first, end, step = own_tiles(n_rows, n_cols, BLOCK_M, BLOCK_N, PERSISTENT)
    for tile in tl.range(first, end, step, flatten=PERSISTENT):

on `n_programs` programs. A second call of `add_product` on the same acc adds another pair of operands. Either stride of
an operand may be the 1, which is how a transposed operand is given: W [n_cols, n_inner] read for x W^T has
stride_b_k = 1; W [n_inner, n_cols] read for x W, stride_b_n. EVEN_K says that BLOCK_K divides n_inner; then no load has
a mask. Rows and columns past the end are read from the front again rather than masked, and are the kernel's to leave
out of its stores.

Loads are plain pointers, which compile to cp.async and mma.sync on sm_80, to cp.async and wgmma on sm_90, to tcgen05 on
sm_100 and to MFMA on AMD. float32 operands are multiplied in float32 (no tensor instructions).
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
    """(tile row, tile column) of a program; programs that run together share both operands in L2.

    GROUP_M rows of tiles are walked column by column before the next GROUP_M are.
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
    """(first, end, step) of the tiles of a program: one, or where PERSISTENT every tl.num_programs(0)-th.

    The loop over them is flattened, which makes one of it and the loop over K: a tile's first operands are on their way
    while the tile before it is stored. Where it is not PERSISTENT the compiler sees that it runs once, and drops it.
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
    """[BLOCK] indices of a tile's rows or columns for `add_product`, int64; those past the end start again at 0."""
    # The remainder in 32 bits: in 64 it is a subroutine. It keeps runs of 16 columns together where 16 divides size.
    return ((pid * BLOCK + tl.arange(0, BLOCK)) % size).to(tl.int64)


@triton.jit
def add_product(
    acc,  # [BLOCK_M, BLOCK_N] float32
    a_ptr,  # [M, K]
    b_ptr,  # [N, K]
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
    """acc + A[offs_m] B[offs_n]^T."""
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
    """The left and the right half of a tile's columns, [BLOCK_M, BLOCK_N / 2] each, without leaving the registers."""
    return tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))


@triton.jit
def column_parts(
    acc,  # [BLOCK_M, BLOCK_N]
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PARTS: tl.constexpr,
):
    """A tile's columns whole, in halves or in quarters: a tuple of PARTS, from left to right."""
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
    """How many programs a tile wants for a product [n_rows, n_cols].

    One a tile of it; or at most t["persistent"] a multiprocessor of the GPU, if it has that. No bit depends on it.
    """
    tiles = triton.cdiv(n_rows, t["block_m"]) * triton.cdiv(n_cols, t["block_n"])
    return min(tiles, t["persistent"] * multiprocessors(device)) if t.get("persistent") else tiles


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """How many a GPU has; 1 of a CPU, which interprets one program after the other."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def one_unit_stride(x: torch.Tensor) -> torch.Tensor:
    """An operand, copied where neither its rows nor its columns have elements next to each other."""
    return x if 1 in x.stride() else x.contiguous()


def check_rows(op: str, block_m: int, *matrices: torch.Tensor | None) -> None:
    """Raise where offsets inside a tile of block_m rows would pass 32 bits, which the epilogues count them in.

    64 bits take up to 70 registers a thread more, and the accumulators spill.
    """
    for x in matrices:
        if x is not None and x.stride(0) * block_m >= 2**31:
            raise NotImplementedError(f"{op}: a row may be at most {2**31 // block_m - 1} elements from the next; "
                                      f"got strides {x.stride()}")
