"""Compile cases of linear's and mlp's products: phi-1's layers in each dtype, and once each tile for fewer rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from phi1.bench.compile.case import Case
from phi1.kernels.core.tiles import tile_for
from phi1.kernels.gemm import linear_triton as linear
from phi1.kernels.gemm import mlp_triton as mlp

D, F, N = 2048, 8192, 16_384
TRITON_NAMES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
TYPES = {name: short for short, name in TRITON_NAMES.items()}
BIAS, GELU, RESIDUAL, DROPOUT = ("bias",), ("bias", "pre"), ("bias", "residual"), ("bias", "dropout", "residual")
PACKED = (*DROPOUT, "packed")
# Of GPUs that have no rows of their own: their instructions are those of one of these two.
ANY = ("sm_80", "gfx942")
Tile = dict[str, int]


def cases(arch: str) -> list[Case]:
    """Every specialisation of the kernels that the table can pick on an architecture."""
    rows = {"sm_80": (64,), "sm_90": (64, 512)}.get(arch, ())
    found = [
        *(_linear_case(arch, dtype, N, k, m, epilogue) for dtype in ("fp16", "bf16")
          for k, m, epilogue in ((D, F, GELU), (F, D, BIAS), (F, D, RESIDUAL), (F, D, DROPOUT))),
        *(_linear_case(arch, "fp16", n, k, m, epilogue) for n in rows
          for k, m, epilogue in ((D, F, GELU), (F, D, DROPOUT))),
        _linear_case(arch, "fp16", N, F, D, PACKED),
        _linear_case(arch, "fp16", N, 2080, F, GELU),  # inputs that no block divides
        *(_dgelu_case(arch, dtype) for dtype in ("fp16", "bf16")),
    ]
    if arch in ("sm_90", "sm_100"):  # operands that TMA cannot take
        found += [_linear_case(arch, "fp16", N, F, D, DROPOUT, tma=False), _dgelu_case(arch, "fp16", tma=False)]
    way = arch != "sm_80"  # on sm_90 and sm_100 by TMA
    if arch != "gfx942":  # persistent: what spills, on AMD and dgelu on sm_100, is for a tuner to try
        found += [_linear_case(arch, "fp16", N, k, m, epilogue, own=_persistent(linear.CANDIDATES["forward"], way))
                  for k, m, epilogue in ((D, F, GELU), (F, D, DROPOUT))]
    if arch in ("sm_80", "sm_90"):
        found.append(_dgelu_case(arch, "fp16", own=_persistent(mlp.CANDIDATES["dgelu"], way)))
    if arch in ANY:
        found += [_linear_case(arch, dtype, N, k, m, epilogue, table="any") for dtype in ("fp16", "fp32")
                  for k, m, epilogue in ((D, F, GELU), (F, D, DROPOUT))]
        found += [_dgelu_case(arch, dtype, table="any") for dtype in ("fp16", "fp32")]
    return found


def at(arch: str, kernel: str, shape: Mapping[str, Any]) -> list[Case]:
    """What a launch makes of a kernel where it looks this shape up."""
    dtype = TYPES[shape["dtype"]]
    if kernel == "dgelu":
        return [_dgelu_case(arch, dtype, tma=shape["described"], size=(shape["width"], shape["inner"]))]
    epilogue = GELU if shape["gelu"] else DROPOUT if shape["dropout"] else RESIDUAL
    return [_linear_case(arch, dtype, shape["rows"], shape["inputs"], shape["outputs"], epilogue)]


def _linear_case(
    arch: str, dtype: str, n_rows: int, inputs: int, outputs: int, epilogue: tuple[str, ...], table: str = "",
    tma: bool = True, own: Tile | None = None,
) -> Case:
    t = own or tile_for("linear", "forward", table or arch, dtype=TRITON_NAMES[dtype], rows=n_rows, outputs=outputs,
                 inputs=inputs, gelu="pre" in epilogue, dropout="dropout" in epilogue)
    t = t | {"tma": t["tma"] and tma}
    optional = {"bias_ptr": f"*{dtype}", "residual_ptr": f"*{dtype}", "pre_ptr": f"*{dtype}"}
    given = {name: kind for name, kind in optional.items() if name.removesuffix("_ptr") in epilogue}
    masks = {"rng_ptr": "*i64", "sample_ids_ptr": "*i64", "cu_seqlens_ptr": "*i32"}
    x_type, weight_type = (_operand(t, dtype, t[block], t["block_k"]) for block in ("block_m", "block_n"))
    given |= {name: kind for name, kind in masks.items()
              if "packed" in epilogue or ("dropout" in epilogue and name != "cu_seqlens_ptr")}
    return Case(
        name=f"linear {dtype} N={n_rows} K={inputs} M={outputs} {'+'.join(epilogue)}{_suffix(t, table)}",
        kernel=linear.linear_forward_kernel,
        types={"x_ptr": x_type, "weight_ptr": weight_type, "out_ptr": f"*{dtype}", "n_rows": "i32",
               "n_samples": "i32", "stream": "i32", "threshold": "i32", "scale": "fp32"} | given,
        constexprs={name: None for name in optional | masks if name not in given}
        | {"n_outputs": outputs, "n_inputs": inputs, "stride_x_n": inputs, "stride_x_k": 1, "stride_weight_m": inputs,
           "stride_weight_k": 1, "stride_residual_n": outputs, "EVEN_K": inputs % t["block_k"] == 0,
           "PARTS": t["parts"]} | _blocks(t),
        num_warps=t["num_warps"],
        num_stages=t["num_stages"],
        tensor_core=dtype != "fp32",
        spill_bytes=8 if arch == "sm_80" and "packed" in epilogue else 0,  # around the search for a row's document
        # The bias falls to threads two columns at a time, as the accumulator does; and seed, step, ids, documents. A
        # persistent kernel has its epilogue twice, the second time for a product without inputs.
        narrow_loads=(32 + 16 * ("dropout" in epilogue) + 8 * ("packed" in epilogue)) * (1 + ("persistent" in t)),
        # AMD's accumulator has four columns a thread, and the compiler stores 16-bit values from there.
        narrow_stores=32 if arch == "gfx942" else 0,
    )


def _dgelu_case(arch: str, dtype: str, table: str = "", tma: bool = True, own: Tile | None = None,
                size: tuple[int, int] = (D, F)) -> Case:
    width, inner = size
    t = own or tile_for("mlp", "dgelu", table or arch, dtype=TRITON_NAMES[dtype], rows=N, width=width, inner=inner,
                        described=tma)
    t = t | {"tma": t["tma"] and tma}
    pointers = dict.fromkeys(("pre_ptr", "dpre_ptr", "act_ptr"), f"*{dtype}") | {
        "dout_ptr": _operand(t, dtype, t["block_m"], t["block_k"]),
        "weight_ptr": _operand(t, dtype, t["block_k"], t["block_n"]),
    }
    return Case(
        name=f"dgelu {dtype} N={N} D={width} F={inner}{_suffix(t, table)}",
        kernel=mlp.dgelu_kernel,
        types=pointers | {"db_partial_ptr": "*fp32", "n_rows": "i32"},
        constexprs={"n_cols": inner, "n_inner": width, "stride_dout_n": width, "stride_dout_d": 1,
                    "stride_weight_d": inner, "stride_weight_f": 1, "stride_pre_n": inner, "stride_dpre_n": inner,
                    "stride_act_n": inner, "EVEN_K": width % t["block_k"] == 0} | _blocks(t),
        num_warps=t["num_warps"],
        num_stages=t["num_stages"],
        tensor_core=dtype != "fp32",
        narrow_stores=8 if arch != "gfx942" else 32,  # a tile's partial sums, one a column
    )


def _persistent(candidates: list[Tile], tma: bool) -> Tile:
    """The first tile of this kind that the tuner tries: no table has one."""
    return next(t for t in candidates if "persistent" in t and t["tma"] == tma)


def _suffix(t: Tile, table: str) -> str:
    return (" any" if table else "") + (" tma" if t["tma"] else "") + (" persistent" if "persistent" in t else "")


def _operand(t: Tile, dtype: str, rows: int, columns: int) -> str:
    return f"tensordesc<{dtype}[{rows}, {columns}]>" if t["tma"] else f"*{dtype}"


def _blocks(t: Tile) -> dict[str, int]:
    return {"BLOCK_M": t["block_m"], "BLOCK_N": t["block_n"], "BLOCK_K": t["block_k"], "GROUP_M": t["group_m"],
            "TMA": t["tma"], "PERSISTENT": "persistent" in t}
