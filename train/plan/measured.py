"""Measured MFU of training on a GPU: the results of `bench/gpu/train_sweep.py` in bench/results, if there are any.

An installed package has no such files; a plan then assumes an MFU and says so.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from phi1.gpus import Gpu, gpu_named

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"
PATTERN = "*/*train.json"


def measured_mfu(gpu: Gpu, dropout: bool, folder: Path = RESULTS) -> tuple[float, str] | None:
    """Return the MFU of fp16 training, with attention counted in full, and its file; None if no file is of this GPU.

    Args:
        gpu: matched with the name that the driver gave; the last file in the order of names counts.
        dropout: True if the planned run has dropout.
        folder: results, in one folder per machine.
    """
    for path in sorted(folder.glob(PATTERN), reverse=True):
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if gpu_named(result["environment"].get("gpu", "")) is gpu:
            speed = result.get("tokens_per_s_dropout_0.1" if dropout else "tokens_per_s") or result["tokens_per_s"]
            share = speed * result["flops_per_token"]["with attention"] / (gpu.half_tflops * 1e12)
            return share, f"{folder.name}/{path.relative_to(folder)}"
    return None
