"""Compile cases of linear_cross_entropy's kernels: phi-1's vocabulary in each dtype, and a small one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from phi1.bench.compile.case import Case
from phi1.kernels.core.tiles import tile_for
from phi1.kernels.cross_entropy import loss_triton as cross_entropy

VOCAB, TOKENIZER = 51200, 50295


def cases(arch: str) -> list[Case]:
    """Every specialisation of the kernels that the table can pick on an architecture."""
    return [
        *(_rows_case(arch, dtype, VOCAB, gradients) for dtype in ("fp16", "bf16", "fp32")
          for gradients in (False, True)),
        # The tokenizer's own columns, and a vocabulary for the smaller tile.
        *(_rows_case(arch, "fp16", vocab, gradients=True) for vocab in (TOKENIZER, 1024)),
        _rows_case(arch, "fp16", VOCAB, gradients=True, smooths=True),
        *(_column_sums_case(arch, dtype) for dtype in ("fp16", "bf16", "fp32")),
        *(_scale_case(arch, *dtypes) for dtypes in (("fp32", "fp16"), ("bf16", "bf16"), ("fp32", "bf16"))),
    ]


def at(arch: str, kernel: str, shape: Mapping[str, Any]) -> list[Case]:
    """What a launch makes of a kernel where it looks this shape up."""
    if kernel == "column_sums":
        return [_column_sums_case(arch, "fp16")]
    if kernel == "scale":
        return [_scale_case(arch, "fp32", "fp16")]
    return [_rows_case(arch, "fp32" if shape["itemsize"] == 4 else "fp16", shape["vocab"], gradients)
            for gradients in (False, True)]


def _rows_case(arch: str, dtype: str, vocab: int, gradients: bool, smooths: bool = False) -> Case:
    t = tile_for("linear_cross_entropy", "rows", arch, vocab=vocab, itemsize=4 if dtype == "fp32" else 2)
    multiple = cross_entropy.COLUMN_MULTIPLE
    stride = -(-vocab // multiple) * multiple
    return Case(
        name=f"loss_rows {dtype} V={vocab}{' gradients' if gradients else ''}{' smoothed' if smooths else ''}",
        kernel=cross_entropy.loss_rows_kernel,
        types={"logits_ptr": f"*{dtype}", "bias_ptr": f"*{dtype}", "targets_ptr": "*i64", "losses_ptr": "*fp32",
               "lse_ptr": "*fp32", "row_weights_ptr": "*fp32", "ignore_index": "i32", "label_smoothing": "fp32",
               "z_loss": "fp32"},
        constexprs={"VOCAB": vocab, "COLUMNS": stride, "STRIDE": stride, "SCALE": 1024, "SMOOTHS": smooths,
                    "GRADIENTS": gradients, "BLOCK_V": t["block"]},
        num_warps=t["num_warps"],
        narrow_loads=4,  # the target, its logit and bias, and the row's weight
        narrow_stores=2,
        # Triton 3.6's code for sm_100 has 64 registers a thread and 8 bytes on the stack in one case, outside the loop.
        spill_bytes=8 if arch == "sm_100" else 0,
    )


def _column_sums_case(arch: str, dtype: str) -> Case:
    t = tile_for("linear_cross_entropy", "column_sums", arch)
    return Case(
        name=f"column_sums {dtype}",
        kernel=cross_entropy.column_sums_kernel,
        types={"dlogits_ptr": f"*{dtype}", "sums_ptr": "*fp32", "n_rows": "i32"},
        constexprs={"VOCAB": VOCAB, "STRIDE": VOCAB, "BLOCK_C": t["rows"], "BLOCK_V": cross_entropy.COLUMN_MULTIPLE},
        num_warps=t["num_warps"],
        # 128 sums are fewer pieces of 16 bytes than there are threads
        narrow_loads=1,
        narrow_stores=1,
    )


def _scale_case(arch: str, from_dtype: str, to_dtype: str) -> Case:
    t = tile_for("linear_cross_entropy", "scale", arch)
    return Case(
        name=f"scale {from_dtype} to {to_dtype}",
        kernel=cross_entropy.scale_kernel,
        types={"gradient_ptr": f"*{from_dtype}", "factor_ptr": "*fp32", "scaled_ptr": f"*{to_dtype}",},
        # As a launch finds out that n is a multiple of 16: or a mask might cut a vector.
        constexprs={"BLOCK": t["block"], "n": VOCAB * 2048},
        num_warps=t["num_warps"],
        narrow_loads=1,
    )
