"""Compile cases of the elementwise kernels of gelu, dropout_add and linear: phi-1's widths in each dtype."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from phi1.bench.compile.case import Case
from phi1.kernels.core.tiles import tile_for
from phi1.kernels.pointwise import epilogue_triton as epilogue

D, F, N = 2048, 8192, 16_384
MASK = {"rng_ptr": "*i64", "sample_ids_ptr": "*i64"}
SCALARS = {"n_rows": "i32", "n_samples": "i32", "stream": "i32", "threshold": "i32", "scale": "fp32"}


def cases(arch: str) -> list[Case]:
    """Every specialisation of the kernels that the table can pick on an architecture."""
    return [case for dtype in ("fp16", "bf16", "fp32") for case in (
        _forward_case(arch, dtype, "gelu", 1, N * F),
        _forward_case(arch, dtype, "add", 1, N * D, "residual_ptr"),
        _forward_case(arch, dtype, "dropout", N, D, "residual_ptr", *MASK),
        _forward_case(arch, dtype, "gelu rows", N, F),
        _backward_case(arch, dtype, "gelu", 1, N * F, "pre_ptr", "dpre_ptr"),
        _backward_case(arch, dtype, "gelu bias", N, F, "pre_ptr", "dpre_ptr", "act_ptr", "db_partial_ptr"),
        _backward_case(arch, dtype, "dropout bias", N, D, "dpre_ptr", "db_partial_ptr", *MASK),
        _backward_case(arch, dtype, "gelu dropout bias", N, F, "pre_ptr", "dpre_ptr", "db_partial_ptr", *MASK),
        _backward_case(arch, dtype, "bias", N, D, "db_partial_ptr"),
        Case(
            name=f"column_sum {dtype}",
            kernel=epilogue.column_sum_kernel,
            types={"partial_ptr": "*fp32", "out_ptr": f"*{dtype}", "n_partials": "i32"},
            constexprs={"n_cols": F, "BLOCK_P": epilogue.SUM_BLOCK_P, "BLOCK_F": epilogue.SUM_BLOCK_F},
            narrow_stores=1,  # 32 sums are fewer pieces of 16 bytes than there are threads
        ),
    )]


def at(arch: str, kernel: str, shape: Mapping[str, Any]) -> list[Case]:
    """What a launch makes of a kernel where it looks this shape up."""
    if kernel == "forward":
        if shape["dropout"]:
            return [_forward_case(arch, "fp16", "dropout", N, D, "residual_ptr", *MASK)]
        if shape["rows"] == 1:
            return [_forward_case(arch, "fp16", "gelu", 1, N * F),
                    _forward_case(arch, "fp16", "add", 1, N * D, "residual_ptr")]
        return [_forward_case(arch, "fp16", "gelu rows", N, F)]
    if shape["rows"] == 1:
        return [_backward_case(arch, "fp16", "gelu", 1, N * F, "pre_ptr", "dpre_ptr")]
    if shape["dropout"]:
        return [_backward_case(arch, "fp16", "gelu dropout bias", N, F, "pre_ptr", "dpre_ptr", "db_partial_ptr", *MASK)]
    return [_backward_case(arch, "fp16", "gelu bias", N, F, "pre_ptr", "dpre_ptr", "act_ptr", "db_partial_ptr")]


def _forward_case(arch: str, dtype: str, what: str, n_rows: int, n_cols: int, *given: str) -> Case:
    t = tile_for("epilogue", "forward", arch, rows=n_rows, dropout="rng_ptr" in given)
    optional = {"residual_ptr": f"*{dtype}", "cu_seqlens_ptr": "*i32"} | MASK
    return Case(
        name=f"epilogue_forward {what} {dtype} F={n_cols}",
        kernel=epilogue.epilogue_forward_kernel,
        types={"x_ptr": f"*{dtype}", "out_ptr": f"*{dtype}"} | {name: optional[name] for name in given} | SCALARS,
        constexprs={name: None for name in optional if name not in given}
        | {"n_cols": n_cols, "stride_x_n": n_cols, "stride_residual_n": n_cols, "stride_out_n": n_cols,
           "GELU": "gelu" in what, "ROWS": t["rows"], "COLS": t["cols"]},
        num_warps=t["num_warps"],
        narrow_loads=2 + t["rows"] if "rng_ptr" in given else 0,  # seed, step, a sample id a row
    )


def _backward_case(arch: str, dtype: str, what: str, n_rows: int, n_cols: int, *given: str) -> Case:
    t = tile_for("epilogue", "backward", arch, rows=n_rows, dropout="rng_ptr" in given)
    optional = dict.fromkeys(("pre_ptr", "dpre_ptr", "act_ptr"), f"*{dtype}") | {
        "db_partial_ptr": "*fp32", "cu_seqlens_ptr": "*i32"} | MASK
    strides = ("stride_dout_n", "stride_pre_n", "stride_dpre_n", "stride_act_n")
    return Case(
        name=f"epilogue_backward {what} {dtype} F={n_cols}",
        kernel=epilogue.epilogue_backward_kernel,
        types={"dout_ptr": f"*{dtype}", "n_partials": "i32"} | {name: optional[name] for name in given} | SCALARS,
        constexprs={name: None for name in optional if name not in given} | dict.fromkeys(strides, n_cols)
        | {"n_cols": n_cols, "ROWS": t["rows"], "COLS": t["cols"]},
        num_warps=t["num_warps"],
        narrow_loads=2 + t["rows"] if "rng_ptr" in given else 0,
        # A row of partial sums is fewer pieces of 16 bytes than there are threads; two stores with AMD's mask's layout.
        narrow_stores=0 if "db_partial_ptr" not in given else 2 if arch == "gfx942" and "rng_ptr" in given else 1,
    )
