"""What the compile gate compiles: every Triton kernel, at phi-1's shapes and at each of its default tiles.

A kernel without a case here is not checked; a new kernel brings its cases.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import triton

from phi1.kernels import _layer_norm_triton as layer_norm
from phi1.kernels._tuned import tile


@dataclass(frozen=True)
class Case:
    """One kernel, specialised as a launch would specialise it.

    Args:
        name: what the gate's table and `--only` call it.
        kernel: the @triton.jit function.
        types: Triton type of each run-time argument, for example "*fp16" or "i32". Pointers count as 16-byte aligned.
        constexprs: the other arguments; an optional pointer that is not given is None here.
        num_warps: warps a program.
        num_stages: software pipeline stages.
        narrow_loads, narrow_stores: how many global accesses may be under 16 bytes wide: those of per-row statistics.
        unaligned: pointers that are not 16-byte aligned.
    """

    name: str
    kernel: Any
    types: Mapping[str, str]
    constexprs: Mapping[str, int | None] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3
    narrow_loads: int = 0
    narrow_stores: int = 0
    unaligned: tuple[str, ...] = ()


def _layer_norm_cases(dtype: str, width: int, residual: bool) -> list[Case]:
    row_types = {"x_ptr": f"*{dtype}", "weight_ptr": f"*{dtype}", "mean_ptr": "*fp32", "rstd_ptr": "*fp32"}
    shape: dict[str, int | None] = {"D": width, "BLOCK_D": triton.next_power_of_2(width)}
    forward = row_types | dict.fromkeys(("residual_ptr", "bias_ptr", "h_ptr", "y_ptr"), f"*{dtype}")
    backward = row_types | dict.fromkeys(("dy_ptr", "dresidual_ptr", "dx_ptr"), f"*{dtype}")
    absent: dict[str, None] = {}
    if not residual:
        absent = dict.fromkeys(("residual_ptr", "h_ptr", "dresidual_ptr"))
    what = f"{dtype} D={width}{' residual' if residual else ''}"
    tiles = {kernel: tile("layer_norm", kernel, torch.device("cpu"), width=width) for kernel in ("forward", "backward")}
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
            constexprs=shape | {"ROWS": tiles["backward"]["rows"]} | _named(backward, absent),
            num_warps=tiles["backward"]["num_warps"],
            narrow_loads=2 * tiles["backward"]["rows"],
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


CASES: list[Case] = [
    *(case for dtype in ("fp16", "bf16", "fp32") for residual in (False, True)
      for case in _layer_norm_cases(dtype, 2048, residual)),
    # phi-2's width, which needs a mask, and one width for each of the other default tiles.
    *(case for width in (256, 512, 1024, 2560, 8192) for case in _layer_norm_cases("fp16", width, residual=True)),
    *(_sum_partials_case(dtype, 2048) for dtype in ("fp16", "bf16", "fp32")),
]
