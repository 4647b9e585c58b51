"""Peaks of GPUs from their makers' data sheets: for plans, for MFU and for the roofs of kernels that have not run.

No kernel reaches such a peak. Measured times are compared with measured roofs.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """Peaks of one GPU in its SXM or OAM form, for dense matrices.

    Args:
        name: its name in `--gpu` and in tables.
        pattern: a part of the name that the driver gives, in lower case.
        memory_gib: about the memory that a program may use.
        half_tflops: TFLOP/s of float16 and bfloat16 matrix products.
        float_tflops: TFLOP/s of float32 arithmetic.
        gb_per_s: memory bandwidth.
        link_gb_per_s: bandwidth to the other GPUs of its node, each way.
        source: the document that the numbers are from.
    """

    name: str
    pattern: str
    memory_gib: float
    half_tflops: float
    float_tflops: float
    gb_per_s: float
    link_gb_per_s: float
    source: str

    def ms(self, n_bytes: float, n_flops: float, dtype: str = "float16") -> float:
        """Return the least time in ms: the larger of those for the bytes and for the flops."""
        tflops = self.float_tflops if dtype == "float32" else self.half_tflops
        return max(n_bytes / self.gb_per_s / 1e6, n_flops / tflops / 1e9)


GPUS = {gpu.name: gpu for gpu in (
    Gpu("a100-40", "a100-sxm4-40gb", 39.4, 312.0, 19.5, 1555.0, 300.0, "NVIDIA A100 data sheet, 40 GB SXM"),
    Gpu("a100-80", "a100", 79.3, 312.0, 19.5, 2039.0, 300.0, "NVIDIA A100 data sheet, 80 GB SXM"),
    Gpu("h100-80", "h100", 79.1, 989.4, 66.9, 3350.0, 450.0, "NVIDIA H100 data sheet, SXM5"),
    Gpu("h200", "h200", 139.8, 989.4, 66.9, 4800.0, 450.0, "NVIDIA H200 data sheet, SXM"),
    Gpu("b200", "b200", 178.4, 2250.0, 75.0, 8000.0, 900.0, "NVIDIA HGX B200 data sheet, a GPU's share of eight"),
    Gpu("mi300x", "mi300x", 191.0, 1307.4, 163.4, 5300.0, 448.0, "AMD Instinct MI300X data sheet"),
)}


def gpu_named(name: str) -> Gpu | None:
    """Return the GPU that a driver calls `name`, or None if its peaks are not known."""
    return next((gpu for gpu in GPUS.values() if gpu.pattern in name.lower()), None)
