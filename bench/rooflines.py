"""What GPUs can do by their makers' data sheets, and what phi-1 asks of them.

A roof is never reached: measured roofs (roof.py) judge measured times; these judge kernels that have not run, and are
the peaks by which MFU is defined.
"""

from __future__ import annotations

from dataclasses import dataclass

from phi1.config import Phi1Config


@dataclass(frozen=True)
class Gpu:
    """Peaks of one GPU, dense, without sparsity.

    Args:
        name: for tables.
        pattern: in the name that the driver gives, lower case.
        half_tflops: TFLOP/s of float16 and bfloat16 matrix products.
        float_tflops: TFLOP/s of float32 arithmetic.
        gb_per_s: memory bandwidth.
        source: where the numbers are from.
    """

    name: str
    pattern: str
    half_tflops: float
    float_tflops: float
    gb_per_s: float
    source: str

    def ms(self, n_bytes: float, n_flops: float, dtype: str = "float16") -> float:
        """The least time for these bytes and flops."""
        tflops = self.float_tflops if dtype == "float32" else self.half_tflops
        return max(n_bytes / self.gb_per_s / 1e6, n_flops / tflops / 1e9)


# The SXM or OAM form of each.
GPUS = (
    Gpu("A100", "a100", 312.0, 19.5, 2039.0, "NVIDIA A100 80GB data sheet, SXM"),
    Gpu("H100", "h100", 989.4, 66.9, 3350.0, "NVIDIA H100 data sheet, SXM5 (white paper, table 2)"),
    Gpu("B200", "b200", 2250.0, 75.0, 8000.0, "NVIDIA HGX B200 data sheet, a GPU's share of eight"),
    Gpu("MI300X", "mi300x", 1307.4, 163.4, 5300.0, "AMD Instinct MI300X data sheet"),
)
H200 = Gpu("H200", "h200", 989.4, 66.9, 4800.0, "NVIDIA H200 data sheet, SXM")


def gpu_named(name: str) -> Gpu | None:
    """The GPU that a driver calls `name`; None if its peaks are not known here."""
    return next((gpu for gpu in (*GPUS, H200) if gpu.pattern in name.lower()), None)


def training_flops(config: Phi1Config, tokens: int) -> dict[str, float]:
    """Floating-point operations of training on one token, in three conventions; what is recomputed does not count.

    Args:
        config: the model's.
        tokens: T, of a sequence.

    Returns:
        "without attention": 6 for each weight of a matrix product, the head's included. "with attention": and
        12 L D T, as in the PaLM paper (arXiv 2204.02311, appendix B), which published tables use. "causal": half of
        that, what causal attention needs.
    """
    d, f = config.hidden_size, config.intermediate_size
    weights = config.num_hidden_layers * (d * (3 * d + f) + (d + f) * d) + config.vocab_size * d
    attention = 12.0 * config.num_hidden_layers * d * tokens
    return {"without attention": 6.0 * weights, "with attention": 6.0 * weights + attention,
            "causal": 6.0 * weights + attention / 2}
