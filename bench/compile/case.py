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
        constexprs: the other arguments with their values, an optional pointer that is not given as None. Sizes and
            strides among them are compiled as a launch would: see `arguments`.
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

    def arguments(self) -> tuple[dict[str, str], dict[str, Any], list[str]]:
        """(types, constants, names of the multiples of 16): what the compiler gets of the arguments at a launch.

        Of an integer that the kernel does not declare constant, a launch tells whether it is 1, which becomes a
        constant, and whether it is a multiple of 16; its value stays unknown, and costs registers.
        """
        types, constants, multiples = dict(self.types), dict(self.constexprs), []
        for parameter in self.kernel.params:
            name, value = parameter.name, self.constexprs.get(parameter.name)
            free = parameter.do_not_specialize
            if parameter.is_constexpr or not isinstance(value, int) or (value == 1 and not free):
                continue
            del constants[name]
            types[name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0 and not free:
                multiples.append(name)
        return types, constants, multiples
