"""One kernel as the compile gate compiles it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


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
        tensor_core: whether its main loop must run on tensor instructions (of fp16 and bf16 operands).
        warp_specialized: whether warps of their own must do the loads of its main loop.
        spill_bytes: bytes of stack a thread that are known and accepted, outside the main loop.
        loop_spills: how many accesses to spilled registers are known and accepted inside innermost loops.
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
    tensor_core: bool = False
    warp_specialized: bool = False
    spill_bytes: int = 0
    loop_spills: int = 0
