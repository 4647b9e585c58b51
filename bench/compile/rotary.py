"""Compile cases of rotary's kernel: phi-1's heads in each dtype, in place, and a head for each of the other tiles."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton

from phi1.bench.compile.case import Case
from phi1.kernels.core.tiles import tile_for
from phi1.kernels.pointwise import rotary_triton as rotary


def cases(arch: str) -> list[Case]:
    """Every specialisation of the kernel that the table can pick on an architecture."""
    return [
        *(_case(arch, dtype, 64, in_place) for dtype in ("fp16", "bf16", "fp32") for in_place in (False, True)),
        _case(arch, "fp16", 80, in_place=False),  # phi-2's, whose rest is no power of two
        _case(arch, "fp16", 128, in_place=False, rotary_dim=64),
        _case(arch, "fp16", 256, in_place=False, rotary_dim=256),
    ]


def at(arch: str, kernel: str, shape: Mapping[str, Any]) -> list[Case]:
    """What a launch makes of a kernel where it looks this shape up."""
    rotary_dim = 2 * shape["half"]
    return [_case(arch, "fp16", max(64, rotary_dim), in_place, rotary_dim=rotary_dim) for in_place in (False, True)]


def _case(arch: str, dtype: str, head_dim: int, in_place: bool, n_heads: int = 32, rotary_dim: int = 32) -> Case:
    t = tile_for("rotary", "rotate", arch, half=rotary_dim // 2)
    row = 3 * n_heads * head_dim
    strides = {"n": row, "s": n_heads * head_dim, "h": head_dim, "k": 1}
    return Case(
        name=f"rotary {dtype} H={n_heads} K={head_dim} R={rotary_dim}{' in place' if in_place else ''}",
        kernel=rotary.rotary_kernel,
        types={"x_ptr": f"*{dtype}", "out_ptr": f"*{dtype}", "cos_ptr": "*fp32", "sin_ptr": "*fp32",
               "positions_ptr": "*i64", "n_rows": "i32", "n_positions": "i32", "sign": "fp32"},
        constexprs={f"stride_{name}_{axis}": stride for name in ("x", "out") for axis, stride in strides.items()}
        | {"N_HEADS": n_heads, "HEAD_DIM": head_dim, "HALF": rotary_dim // 2,
           "BLOCK_HALF": triton.next_power_of_2(rotary_dim // 2),
           "BLOCK_REST": triton.next_power_of_2(max(1, head_dim - rotary_dim)), "IN_PLACE": in_place,
           "ROWS": t["rows"], "BLOCK_H": min(t["heads"], n_heads)},
        num_warps=t["num_warps"],
        # A position a row; and one row of cos and sin is fewer pieces of 16 bytes than there are threads.
        narrow_loads=t["rows"] + (2 if t["rows"] == 1 else 0),
    )
