"""Model flops utilisation, MFU: the share of the GPUs' peak that a training speed comes to, in two conventions."""

from __future__ import annotations

from dataclasses import dataclass

from phi1.config import Phi1Config
from phi1.gpus import gpu_named
from phi1.train.runtime.engine import Engine


@dataclass(frozen=True)
class Mfu:
    """Flops of a token, with all of attention and with its causal half; peak of all GPUs in flops/s, 0 if unknown."""

    full: float
    causal: float
    peak: float

    @classmethod
    def of_run(cls, config: Phi1Config, seq_len: int, engine: Engine) -> Mfu:
        """For a run on this engine. The peak of CPUs, and of GPUs that phi1.gpus does not list, is not known."""
        gpu = gpu_named(str(engine.environment()["hardware"])) if engine.device.type == "cuda" else None
        tflops = 0.0 if gpu is None else gpu.float_tflops if engine.precision == "fp32" else gpu.half_tflops
        return cls(config.flops_per_token(seq_len), config.flops_per_token(seq_len, causal=True),
                   tflops * 1e12 * engine.world_size)

    def of(self, tokens_per_s: float) -> dict[str, float]:
        """{"mfu", "mfu_causal"} of a speed over all GPUs; empty where the peak is not known."""
        if not self.peak:
            return {}
        return {"mfu": tokens_per_s * self.full / self.peak, "mfu_causal": tokens_per_s * self.causal / self.peak}
