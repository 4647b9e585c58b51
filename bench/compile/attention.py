"""Compile cases of attention's kernels: phi-1's and phi-2's heads in each dtype, with what changes the main loops; and
the forward's candidates that read by TMA, none of which a table picks before it was measured.

Strides are those of a packed [N, 3, H, K]. The backward of phi-1's heads rotates the gradients back, as in the block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import triton

from phi1.bench.compile.case import Case
from phi1.kernels.attention import backward_triton as backward
from phi1.kernels.attention import device_triton as rows
from phi1.kernels.attention import forward_triton as forward
from phi1.kernels.attention.launch_triton import CANDIDATES, ROTATED_ROWS
from phi1.kernels.core.tiles import tile_for

N_HEADS, TOKENS, ROTARY = 32, 2048, 32
KERNELS = {
    "forward": forward.attention_forward_kernel,
    "backward_dq": backward.attention_backward_dq_kernel,
    "backward_dkdv": backward.attention_backward_dkdv_kernel,
}
COUNTS = ("n_queries", "n_keys", "n_rows", "n_blocks", "n_samples", "n_positions", "stream", "threshold")


@dataclass(frozen=True)
class Variant:
    """What changes the code of a kernel besides its tile. rotary: "", "inside" or "applied"."""

    dtype: str = "fp16"
    head_size: int = 64
    rotary: str = "applied"
    rotary_size: int = ROTARY
    dropout: bool = False
    packed: bool = False
    padded: bool = False
    causal: bool = True

    tile: tuple[tuple[str, int], ...] = ()
    """A candidate's; else the table's."""

    def __str__(self) -> str:
        flags = [name for name in ("dropout", "packed", "padded") if getattr(self, name)]
        flags += [f"rotary {self.rotary}"] if self.rotary else []
        flags += [f"R={self.rotary_size}"] if self.rotary_size != ROTARY else []
        flags += [] if self.causal else ["full"]
        if self.tile:
            t = dict(self.tile)
            flags += [f"{t['block_m']}x{t['block_n']} s{t['num_stages']}",
                      "warp-specialised" if t["warp_specialize"] else "tma"]
        return " ".join([self.dtype, f"K={self.head_size}", *flags])


VARIANTS = (
    *(Variant(dtype, dropout=dropout) for dtype in ("fp16", "bf16") for dropout in (False, True)),
    Variant(rotary="inside"),
    Variant(rotary="inside", rotary_size=24),  # no power of two
    Variant(rotary="", causal=False),
    Variant(rotary="", packed=True),
    *(Variant(packed=True, dropout=dropout) for dropout in (False, True)),
    *(Variant(dtype, rotary="inside", dropout=True) for dtype in ("fp16", "bf16")),
    Variant(rotary="inside", packed=True, dropout=True),
    Variant(rotary="", padded=True),
    Variant(head_size=80, rotary="inside", dropout=True),
    *(Variant(head_size=128, rotary="", dropout=dropout) for dropout in (False, True)),
    *(Variant("fp32", head_size) for head_size in (64, 128)),
    *(Variant("fp32", head_size, dropout=True) for head_size in (64, 80, 128)),
    *(Variant("fp32", head_size, rotary="inside", packed=packed, dropout=True)
      for head_size in (80, 128) for packed in (False, True)),
    Variant("fp32", 128, rotary="inside", dropout=True, padded=True),
    Variant(rotary="inside", packed=True),
    *(Variant(rotary="inside", packed=packed, causal=False) for packed in (False, True)),
)


# Of GPUs that have no rows of their own, NVIDIA's: their instructions are those of sm_80, their limit is 64 KiB.
ANY_VARIANTS = (
    *(Variant(packed=packed, dropout=dropout) for packed in (False, True) for dropout in (False, True)),
    Variant("bf16", rotary="inside"),
    *(Variant(rotary="inside", packed=packed, dropout=True) for packed in (False, True)),
    *(Variant(head_size=128, dropout=dropout) for dropout in (False, True)),
    *(Variant("fp32", 128, rotary=rotary, dropout=True) for rotary in ("applied", "inside")),
)


def _described(arch: str) -> list[Variant]:
    """The candidates that read by TMA, at phi-1's heads and, where they are small, at larger ones; the first of a kind
    in bfloat16, without a causal mask, with dropout and with rotated queries too.

    Warp-specialised, larger heads spill 336 bytes on sm_100, and dropout fails to compile under Triton 3.6.
    """
    found = []
    for special in (0, 1):
        tiles = [tuple(t.items()) for t in CANDIDATES["forward"] if t["tma"] and t["warp_specialize"] == special]
        found += [Variant(tile=tile) for tile in tiles]
        sizes = () if special and arch == "sm_100" else (80, 128)
        found += [Variant(head_size=size, tile=tile) for tile in tiles if dict(tile)["block_n"] == 64 for size in sizes]
        found += [Variant("bf16", tile=tiles[0]), Variant(causal=False, tile=tiles[0])]
        found += [Variant(dropout=True, tile=tiles[0]), Variant(rotary="inside", tile=tiles[0])] if not special else []
    return found


def cases(arch: str) -> list[Case]:
    """Every specialisation of the kernels that the table can pick on an architecture."""
    made = [_case(arch, kernel, variant) for variant in VARIANTS for kernel in KERNELS]
    if arch in ("sm_90", "sm_100"):
        made += [_case(arch, "forward", variant) for variant in _described(arch)]
    if arch == "sm_80":
        made += [_case("any", kernel, variant) for variant in ANY_VARIANTS for kernel in KERNELS]
    return [*made, _rotate_rows_case()]


def at(arch: str, kernel: str, shape: Mapping[str, Any]) -> list[Case]:
    """What a launch makes of a kernel where it looks this shape up."""
    padded = not shape.get("described", True) and not shape["packed"]
    return [_case(arch, kernel, Variant("fp32" if shape["bits"] == 32 else "fp16", shape["head_size"], rotary,
                                        dropout=shape["dropout"], packed=shape["packed"], padded=padded,
                                        causal=shape["causal"]))
            for rotary in (("inside",) if shape["rotates"] else ("", "applied"))]


def _case(arch: str, kernel: str, variant: Variant) -> Case:
    """A kernel with the tile of an architecture's rows, or of those for "any"."""
    v, inside = variant, variant.rotary == "inside"
    described = {"described": not (v.packed or v.padded)} if kernel == "forward" else {}
    t = dict(v.tile) or tile_for("attention", kernel, arch, bits=32 if v.dtype == "fp32" else 16, causal=v.causal,
                                 head_size=v.head_size, dropout=v.dropout, rotates=inside, packed=v.packed, **described)
    block_d = triton.next_power_of_2(v.head_size)
    on_load = inside and bool(t["rotate_on_load"]) and v.rotary_size == ROTARY
    names = KERNELS[kernel].arg_names
    optional = {"cu_seqlens_ptr": ("*i32", v.packed), "seq_starts_ptr": ("*i32", v.padded),
                "rng_ptr": ("*i64", v.dropout), "sample_ids_ptr": ("*i64", v.dropout)}
    rotary_read = bool(v.rotary) and (inside or kernel != "forward")
    optional |= {"cos_ptr": ("*fp32", rotary_read), "sin_ptr": ("*fp32", rotary_read),
                 "positions_ptr": ("*i64", rotary_read)}
    types = {name: f"*{v.dtype}" for name in names if name.endswith("_ptr") and name not in optional}
    types |= {name: "*fp32" for name in ("lse_ptr", "delta_ptr") if name in names}
    types |= {name: type_ for name, (type_, given) in optional.items() if given}
    types |= dict.fromkeys(COUNTS, "i32") | {"scale_log2" if kernel == "forward" else "scale": "fp32"}
    constexprs: dict[str, Any] = {name: None for name, (_, given) in optional.items() if not given}
    constexprs |= _strides(names, v.head_size) | {"n_heads": N_HEADS}
    if kernel == "forward":
        constexprs |= {"TMA": bool(t["tma"]), "WARP_SPECIALIZE": bool(t["warp_specialize"])}
        if t["tma"]:
            types |= dict.fromkeys(("k_ptr", "v_ptr"), f"tensordesc<{v.dtype}[1, {t['block_n']}, 1, {block_d}]>")
    return Case(
        name=f"attention_{kernel} {v}{' any' if arch == 'any' else ''}",
        kernel=KERNELS[kernel],
        types=types,
        constexprs=constexprs | {
            "IS_CAUSAL": v.causal, "HALF": v.rotary_size // 2 if rotary_read else 0, "HEAD_DIM": v.head_size,
            "ROTATE_Q": (inside and kernel != "backward_dkdv") or on_load,
            "ROTATE_K": (inside and kernel == "backward_dkdv") or on_load,
            "BLOCK_D": block_d, "BLOCK_M": t["block_m"], "BLOCK_N": t["block_n"],
        },
        num_warps=t["num_warps"],
        num_stages=t["num_stages"],
        tensor_core=v.dtype != "fp32",
        warp_specialized=bool(t.get("warp_specialize")),
        # Statistics of queries, columns of the rotary tables, positions, seed, step and sample ids.
        narrow_loads=40,
        # lse or delta, where specialised once for each of two groups of warps; AMD's compiler stores accumulators in
        # part so.
        narrow_stores=20 if arch == "gfx942" else 1 + t.get("warp_specialize", 0),
        spill_bytes=_spills(arch, kernel, v),
    )


def _spills(arch: str, kernel: str, v: Variant) -> int:
    """Bytes of spilled registers that are known, none in a loop."""
    # One to ten values that live from before the loops to after them, some of them under one Triton version alone.
    known = {("sm_80", "backward_dq", "fp32 K=128 rotary applied"): 8,
             ("sm_80", "backward_dkdv", "fp32 K=128 rotary applied"): 8,
             ("sm_100", "backward_dkdv", "fp16 K=128 dropout"): 24,
             ("sm_100", "backward_dq", "fp16 K=80 dropout rotary inside"): 8,
             ("sm_80", "backward_dkdv", "fp16 K=64 padded"): 16,
             ("sm_80", "backward_dkdv", "fp32 K=64 rotary applied"): 8,
             ("sm_80", "backward_dkdv", "fp16 K=64 dropout rotary inside"): 8,
             ("sm_80", "backward_dkdv", "bf16 K=64 dropout rotary inside"): 8,
             ("sm_80", "backward_dkdv", "fp16 K=64 dropout packed rotary inside"): 8,
             ("sm_80", "forward", "fp16 K=64 dropout packed rotary inside"): 8,
             ("sm_80", "forward", "fp16 K=64 packed rotary inside"): 8,
             ("sm_80", "forward", "fp32 K=80 dropout rotary applied"): 8,
             ("sm_80", "backward_dq", "fp32 K=80 dropout rotary applied"): 16,
             ("sm_80", "backward_dq", "fp32 K=128 dropout rotary applied"): 8,
             ("sm_80", "backward_dkdv", "fp32 K=128 dropout packed rotary inside"): 16,
             ("sm_90", "backward_dq", "fp32 K=80 dropout packed rotary inside"): 8,
             ("sm_90", "backward_dq", "fp32 K=128 dropout packed rotary inside"): 8,
             ("sm_100", "forward", "fp32 K=80 dropout rotary inside"): 8,
             ("sm_100", "backward_dq", "fp32 K=128 dropout rotary inside"): 8,
             ("sm_100", "forward", "fp32 K=80 dropout packed rotary inside"): 8,
             ("sm_100", "forward", "fp32 K=128 dropout packed rotary inside"): 8,
             ("sm_100", "backward_dq", "fp32 K=80 dropout packed rotary inside"): 8,
             ("sm_100", "backward_dq", "fp32 K=128 dropout packed rotary inside"): 8,
             **{("sm_100", kernel, f"fp16 K=64 {packed}rotary inside full"): 8
                for kernel in ("backward_dq", "backward_dkdv") for packed in ("", "packed ")},
             ("gfx942", "backward_dq", "fp16 K=64 rotary inside R=24"): 20,
             ("any", "forward", "fp16 K=64 packed rotary applied"): 16,
             ("any", "forward", "fp16 K=64 dropout packed rotary applied"): 16,
             ("any", "forward", "fp16 K=64 dropout packed rotary inside"): 24,
             ("any", "forward", "fp32 K=128 dropout rotary applied"): 8,
             ("any", "forward", "fp32 K=128 dropout rotary inside"): 8,
             ("any", "backward_dq", "bf16 K=64 rotary inside"): 8,
             ("any", "backward_dq", "fp32 K=128 dropout rotary applied"): 8,
             ("any", "backward_dq", "fp16 K=64 dropout rotary inside"): 16,
             ("any", "backward_dq", "fp16 K=64 dropout packed rotary inside"): 40,
             ("any", "backward_dkdv", "fp16 K=64 packed rotary applied"): 8,
             ("any", "backward_dkdv", "fp16 K=64 dropout rotary inside"): 8,
             ("any", "backward_dkdv", "fp16 K=64 dropout packed rotary inside"): 8}
    return known.get((arch, kernel, str(v)), 0)


def _strides(names: list[str], head_size: int) -> dict[str, int]:
    token = 3 * N_HEADS * head_size
    by_axis = {"b": TOKENS * token, "t": token, "h": head_size}
    return {name: by_axis[name[-1]] for name in names if name.startswith("stride_")}


def _rotate_rows_case() -> Case:
    names = rows.rotate_rows_kernel.arg_names
    return Case(
        name="attention_rotate_rows fp16 K=64",
        kernel=rows.rotate_rows_kernel,
        types={"x_ptr": "*fp16", "y_ptr": "*fp16", "cos_ptr": "*fp32", "sin_ptr": "*fp32", "positions_ptr": "*i64",
               "n_tokens": "i32", "n_positions": "i32"},
        constexprs=_strides(names, 64) | {"n_heads": N_HEADS, "HALF": ROTARY // 2, "HEAD_DIM": 64, "BLOCK_D": 64,
                                          "BLOCK_T": ROTATED_ROWS},
        num_warps=4,
        narrow_loads=8,  # the positions, and a table's 16 columns, which are fewer pieces than threads
        narrow_stores=0,
    )
