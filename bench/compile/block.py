"""Compile cases of the parallel block's projections, at phi-1's sizes and at small ones, and of its bias sums."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from phi1.bench.compile.case import Case
from phi1.kernels.block import bias_grad_triton as bias_sums
from phi1.kernels.block import projections_triton as projections
from phi1.kernels.core.tiles import tile_for

SHORT = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
Size = tuple[int, int, int, int]
PHI1: Size = (2048, 8192, 64, 16)  # D, F, K, R/2
SMALL: Size = (96, 160, 32, 8)  # divided by no tile
# Of GPUs that have no rows of their own: their instructions are those of one of these two.
ANY = ("sm_80", "gfx942")


def cases(arch: str) -> list[Case]:
    """Every specialisation of the kernels that the table can pick on an architecture."""
    picked = [
        *((kernel, dtype, rows, PHI1) for kernel in ("in_proj", "out_proj") for dtype in ("fp16", "bf16")
          for rows in (512, 16384)),
        *((kernel, "fp16", 512, SMALL) for kernel in ("in_proj", "out_proj")),
    ]
    found = {case.name: case for choice in picked for case in _case(arch, *choice)}
    found |= {case.name: case for dtype in ("fp16", "bf16", "fp32") for case in _bias_cases(dtype)}
    if arch in ANY:
        found |= {case.name: case for kernel in ("in_proj", "out_proj") for dtype in ("fp16", "fp32")
                  for case in _case(arch, kernel, dtype, 16384, PHI1, table="any")}
    found |= {case.name: case for outputs in (("qkv", "act"), ("qkv", "pre"), ("pre",))
              for case in _case(arch, "in_proj", "fp16", 16384, PHI1, outputs=outputs)}
    return list(found.values())


def at(arch: str, kernel: str, shape: Mapping[str, Any]) -> list[Case]:
    """What a launch makes of a kernel where it looks this shape up."""
    dtype = next(short for short, name in SHORT.items() if name == shape["dtype"])
    return _case(arch, kernel, dtype, shape["rows"], (shape["width"], shape["inner"], *PHI1[2:]))


def _case(arch: str, kernel: str, dtype: str, rows: int, size: Size, table: str = "",
          outputs: tuple[str, ...] = ("qkv", "pre", "act")) -> list[Case]:
    """The case of one choice of the table; none where it is cuBLAS. The name has the tile: rows share tiles.

    outputs: of in_proj; evaluation writes no pre, and what the backward computes again has no act.
    """
    width, inner, head_size, half = size
    t = tile_for("block", kernel, table or arch, dtype=SHORT[dtype], rows=rows, width=width, inner=inner)
    if "cublas" in t:
        return []
    a_type, b_type = (f"tensordesc<{dtype}[{t[block]}, {t['block_k']}]>" if t["tma"] else f"*{dtype}"
                      for block in ("block_m", "block_n"))
    types = {"n_rows": "i32", "weight_ptr": b_type, "bias_ptr": f"*{dtype}"}
    shape: dict[str, int | None] = {"WIDTH": width, "INNER": inner, "TMA": t["tma"]}
    if kernel == "in_proj":
        shape |= {"HEAD_DIM": head_size, "HALF": half}
        types |= {"h_ptr": a_type, "cos_ptr": "*fp32", "sin_ptr": "*fp32", "positions_ptr": "*i64",
                  "n_positions": "i32"} | {f"{name}_ptr": f"*{dtype}" for name in outputs}
        shape |= {f"{name}_ptr": None for name in ("qkv", "pre", "act") if name not in outputs}
    else:
        types |= {"att_ptr": a_type, "act_ptr": a_type, "x_ptr": f"*{dtype}", "y_ptr": f"*{dtype}"}
    suffix = (" tma" if t["tma"] else "") + ("" if len(outputs) == 3 else f" {'+'.join(outputs)} only")
    return [Case(
        name=f"{kernel} {dtype} D={width} {t['block_m']}x{t['block_n']}x{t['block_k']}{suffix}",
        kernel=getattr(projections, f"{kernel}_kernel"),
        types=types,
        constexprs=shape | {"BLOCK_M": t["block_m"], "BLOCK_N": t["block_n"], "BLOCK_K": t["block_k"],
                            "GROUP_M": t["group_m"], "PARTS": t["parts"]},
        num_warps=t["num_warps"],
        num_stages=t["num_stages"],
        tensor_core=dtype != "fp32",
        narrow_loads=64,  # biases and angles: an accumulator gives a thread pairs of columns
        # Four columns a thread on AMD, and the compiler stores the 16-bit values of this tile from there.
        narrow_stores=8 if arch == "gfx942" and table else 0,
    )]


def _bias_cases(dtype: str) -> list[Case]:
    width, inner = PHI1[:2]
    partials = dict.fromkeys(("dqkv_partial_ptr", "dpre_partial_ptr", "dense_partial_ptr", "fc2_partial_ptr"), "*fp32")
    counts = dict.fromkeys(("n_dqkv", "n_dpre", "n_dense", "n_fc2"), "i32")
    inputs = {"dqkv_ptr": f"*{dtype}", "dqkv_partial_ptr": "*fp32", "n_rows": "i32", "n_partials": "i32"}
    tile: dict[str, int | None] = {"WIDTH": width, "stride_dqkv_n": 3 * width + inner, "ROWS": bias_sums.ROWS,
                                   "COLS": bias_sums.COLS}
    with_dy = {"dy_ptr": f"*{dtype}", "dy_partial_ptr": "*fp32"}
    # A row of partial sums or of sums is less than 16 bytes for each thread.
    branches = dict.fromkeys(("dy_ptr", "dense_ptr", "fc2_ptr"), f"*{dtype}") | dict.fromkeys(
        ("dense_partial_ptr", "fc2_partial_ptr"), "*fp32") | {"n_rows": "i32", "n_partials": "i32", "n_samples": "i32"}
    masks = {"rng_ptr": "*i64", "sample_ids_ptr": "*i64"} | {
        f"{name}_{field}": kind for name in ("dense", "fc2")
        for field, kind in (("stream", "i32"), ("threshold", "i32"), ("scale", "fp32"))}
    branch_tile: dict[str, int | None] = {"WIDTH": width, "ROWS": bias_sums.BRANCH_ROWS, "COLS": bias_sums.COLS}
    packed = {"cu_seqlens_ptr": "*i32"}
    return [
        Case(f"branch_gradients {dtype}", bias_sums.branch_gradients_kernel, branches | masks,
             branch_tile | dict.fromkeys(packed), narrow_loads=8, narrow_stores=4),
        Case(f"branch_gradients {dtype} packed", bias_sums.branch_gradients_kernel, branches | masks | packed,
             branch_tile, narrow_loads=32, narrow_stores=4),
        Case(f"bias_partials {dtype} dy", bias_sums.bias_partials_kernel, inputs | with_dy, tile, narrow_stores=2),
        Case(f"bias_partials {dtype}", bias_sums.bias_partials_kernel, inputs, tile | dict.fromkeys(with_dy),
             narrow_stores=2),
        Case(f"bias_sums {dtype}", bias_sums.bias_sums_kernel,
             partials | counts | {"in_ptr": f"*{dtype}", "out_ptr": f"*{dtype}"},
             {"WIDTH": width, "INNER": inner, "BLOCK_P": bias_sums.SUM_BLOCK_P, "BLOCK_F": bias_sums.SUM_BLOCK_F},
             narrow_stores=4),
    ]
