"""The share of a GPU's peak that training was measured to reach: the results of `bench/gpu/train_sweep.py`.

They are read as files of a checkout; an installed package has none, and a plan then says that it assumes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from phi1.gpus import Gpu, gpu_named

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"
PATTERN = "*/*train.json"


def measured_mfu(gpu: Gpu, dropout: bool, folder: Path = RESULTS) -> tuple[float, str] | None:
    """MFU of fp16 training, all of attention counted, and the file that says so; None for a GPU that is in none.

    Args:
        gpu: to be found by the name that its driver gave; the last file in the order of names counts.
        dropout: whether the run to plan has any.
        folder: of results, a folder for each machine.
    """
    for path in sorted(folder.glob(PATTERN), reverse=True):
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if gpu_named(result["environment"].get("gpu", "")) is gpu:
            speed = result.get("tokens_per_s_dropout_0.1" if dropout else "tokens_per_s") or result["tokens_per_s"]
            share = speed * result["flops_per_token"]["with attention"] / (gpu.half_tflops * 1e12)
            return share, f"{folder.name}/{path.relative_to(folder)}"
    return None
