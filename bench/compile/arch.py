"""The GPUs that kernels are compiled for, and what the compiler makes of a kernel there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Arch:
    """A GPU to compile for: what one program may use, and what its tensor instructions look like.

    Args:
        backend, version, warp: Triton's target.
        shared_limit: bytes of shared memory for one program.
        tensor_instruction: a pattern of the assembly.
        registers: 32-bit registers of a multiprocessor (AMD: of a lane of one of its four SIMDs).
        shared: bytes of shared memory of a multiprocessor.
        warps: that a multiprocessor can hold (AMD: that a SIMD can).
    """

    backend: str
    version: int | str
    warp: int
    shared_limit: int
    tensor_instruction: str
    registers: int
    shared: int
    warps: int


# Occupancy limits: CUDA C++ programming guide, "technical specifications per compute capability"; AMD CDNA3 ISA
# reference: 512 registers a lane, 8 waves a SIMD, 64 KiB of LDS.
ARCHS = {
    "sm_80": Arch("cuda", 80, 32, 166_912, r"\bmma\.sync", 65_536, 167_936, 64),
    "sm_90": Arch("cuda", 90, 32, 232_448, r"\bwgmma\.mma_async", 65_536, 233_472, 64),
    "sm_100": Arch("cuda", 100, 32, 232_448, r"\btcgen05\.mma", 65_536, 233_472, 64),
    "gfx942": Arch("hip", "gfx942", 64, 65_536, r"\bv_mfma", 512, 65_536, 8),
}
WIDE = 16


@dataclass(frozen=True)
class Report:
    """The compiler's result for a kernel, or why there is none.

    Args:
        registers: of a thread.
        stack: bytes of spilled registers a thread.
        loop_spills: accesses to spilled registers inside innermost loops.
        shared: bytes of shared memory a program.
        warps: of a program, those that the compiler added included.
        tensor_instructions: how many are in the code.
        serialised: how often ptxas says that it has serialised wgmma instructions: none runs beside other work then.
        loads, stores: width in bytes -> how many global accesses are in the code.
        error: why it does not compile; the other fields are then 0.
    """

    registers: int = 0
    stack: int = 0
    loop_spills: int = 0
    shared: int = 0
    warps: int = 0
    tensor_instructions: int = 0
    serialised: int = 0
    loads: Mapping[int, int] = field(default_factory=dict)
    stores: Mapping[int, int] = field(default_factory=dict)
    error: str = ""

    def occupancy(self, arch: str) -> int:
        """Warps that a multiprocessor (AMD: a SIMD) holds at once."""
        gpu = ARCHS[arch]
        if gpu.backend == "hip":
            by_registers = gpu.registers // _up(max(self.registers, 1), 8)
            by_shared = gpu.shared // max(self.shared, 1) * self.warps // 4
            return min(gpu.warps, by_registers, by_shared)
        by_registers = gpu.registers // (_up(max(self.registers, 1), 8) * gpu.warp) // self.warps
        by_shared = gpu.shared // (self.shared + 1024)  # the driver takes 1 KiB of each program's
        return self.warps * min(gpu.warps // self.warps, by_registers, by_shared, 32)


def narrow(accesses: Mapping[int, int]) -> int:
    """How many global accesses are under 16 bytes wide."""
    return sum(count for width, count in accesses.items() if width < WIDE)


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
