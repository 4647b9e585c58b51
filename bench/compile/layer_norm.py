"""Compile cases of layer_norm's kernels: phi-1's width in each dtype, and a width for each of the other tiles."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton

from phi1.bench.compile.case import Case
from phi1.kernels.core.tiles import tile_for
from phi1.kernels.pointwise import layer_norm_triton as layer_norm


def cases(arch: str) -> list[Case]:
    """Every specialisation of the kernels that the table can pick on an architecture."""
    return [
        *(case for dtype in ("fp16", "bf16", "fp32") for residual in (False, True)
          for case in _row_cases(arch, dtype, 2048, residual)),
        # phi-2's width, which needs a mask, and one width for each of the other default tiles.
        *(case for width in (256, 512, 1024, 2560, 8192) for case in _row_cases(arch, "fp16", width, residual=True)),
        *(_sum_partials_case(dtype, 2048) for dtype in ("fp16", "bf16", "fp32")),
    ]


def at(arch: str, kernel: str, shape: Mapping[str, Any]) -> list[Case]:
    """What a launch makes of a kernel where it looks this shape up."""
    return [case for residual in (False, True) for case in _row_cases(arch, "fp16", shape["width"], residual)
            if case.name.startswith(f"layer_norm_{kernel}")]


def _row_cases(arch: str, dtype: str, width: int, residual: bool) -> list[Case]:
    row_types = {"x_ptr": f"*{dtype}", "weight_ptr": f"*{dtype}", "mean_ptr": "*fp32", "rstd_ptr": "*fp32"}
    shape: dict[str, int | None] = {"D": width, "BLOCK_D": triton.next_power_of_2(width)}
    forward = row_types | dict.fromkeys(("residual_ptr", "bias_ptr", "h_ptr", "y_ptr"), f"*{dtype}")
    backward = row_types | dict.fromkeys(("dy_ptr", "dresidual_ptr", "dx_ptr"), f"*{dtype}")
    absent: dict[str, None] = {}
    if not residual:
        absent = dict.fromkeys(("residual_ptr", "h_ptr", "dresidual_ptr"))
    what = f"{dtype} D={width}{' residual' if residual else ''}"
    tiles = {kernel: tile_for("layer_norm", kernel, arch, width=width) for kernel in ("forward", "backward")}
    return [
        Case(
            name=f"layer_norm_forward {what}",
            kernel=layer_norm.layer_norm_forward_kernel,
            types=_given(forward, absent) | {"n_rows": "i32", "eps": "fp32"},
            constexprs=shape | {"ROWS": tiles["forward"]["rows"]} | _named(forward, absent),
            num_warps=tiles["forward"]["num_warps"],
            # weight and bias of 256 columns are 32 pieces of 16 bytes: fewer than an AMD wave's 64 lanes
            narrow_loads=2 if width <= 256 else 0,
            narrow_stores=2 * tiles["forward"]["rows"],
        ),
        Case(
            name=f"layer_norm_backward {what}",
            kernel=layer_norm.layer_norm_backward_kernel,
            types=_given(backward, absent) | {"dw_partial_ptr": "*fp32", "db_partial_ptr": "*fp32"}
            | {"n_rows": "i32", "n_partials": "i32"},
            constexprs=shape | {"ROWS": tiles["backward"]["rows"], "STAGES": tiles["backward"]["stages"]}
            | _named(backward, absent),
            num_warps=tiles["backward"]["num_warps"],
            # mean and rstd of a row, in the loop and in what fills its pipeline
            narrow_loads=2 * tiles["backward"]["rows"] * tiles["backward"]["stages"],
            # a partial row of 512 float32 is 128 pieces: fewer than the threads of four AMD waves
            narrow_stores=2 if width <= 512 else 0,
        ),
    ]


def _given(types: dict[str, str], absent: dict[str, None]) -> dict[str, str]:
    return {name: type_ for name, type_ in types.items() if name not in absent}


def _named(types: dict[str, str], absent: dict[str, None]) -> dict[str, None]:
    return {name: None for name in types if name in absent}


def _sum_partials_case(dtype: str, width: int) -> Case:
    return Case(
        name=f"sum_partials {dtype} D={width}",
        kernel=layer_norm.sum_partials_kernel,
        types={"dw_partial_ptr": "*fp32", "db_partial_ptr": "*fp32", "dw_ptr": f"*{dtype}", "db_ptr": f"*{dtype}",
               "n_partials": "i32"},
        constexprs={"D": width, "BLOCK_P": layer_norm.SUM_BLOCK_P, "BLOCK_D": layer_norm.SUM_BLOCK_D},
        narrow_stores=2,
    )
