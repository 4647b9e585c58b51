"""The surroundings on which a run's bits depend: variables, PyTorch's settings and libraries, the hardware."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from phi1.train.runtime.provenance import cpu, versions

# Variables by which a library chooses its kernels, their precision or the order of their sums.
_PREFIXES = ("ATEN_", "CUBLAS", "CUDNN_", "DNNL_", "MKL_", "NCCL_", "NVIDIA_TF32_OVERRIDE", "OMP_", "ONEDNN_",
             "TORCH_ALLOW_TF32", "TORCH_BLAS_PREFER", "TRITON_F32_DEFAULT", "TRITON_INTERPRET")
_CANNOT_CHANGE_BITS = re.compile(
    r".*_(VERBOSE|DEBUG|DEBUG_\w+|LOG\w*|DUMP\w*|JIT_PROFILE)"  # these print
    r"|(OMP|MKL)_NUM_THREADS|\w+_DYNAMIC"  # the run sets the number of threads, which is compared by itself
    r"|OMP_(WAIT_POLICY|PLACES|PROC_BIND|STACKSIZE|DISPLAY_\w+)"  # how threads wait, and on which core
    r"|NCCL_(SOCKET_IFNAME|COMM_ID|BLOCKING_WAIT|ASYNC_ERROR_HANDLING|HOSTID)")  # which card, and waiting
_LIBRARIES = re.compile(r"(Math Kernel Library|MKL-DNN|oneDNN|OpenMP|CUDA Runtime|CuDNN|NVCC|HIP)\D*([\d.]\S*)")


def surroundings(device: torch.device) -> dict[str, Any]:
    """Return JSON values, all of which must be equal for equal bits."""
    return {"hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu(),
            "torch": torch.__version__, "triton": versions().get("triton", "none"), "numpy": versions()["numpy"],
            "libraries": libraries(), "settings": settings(), "variables": variables()}


def variables() -> dict[str, str]:
    """Return the environment variables that may change bits. Others with the same beginnings only print or wait."""
    return {name: value for name, value in sorted(os.environ.items())
            if name.startswith(_PREFIXES) and not _CANNOT_CHANGE_BITS.fullmatch(name)}


def libraries() -> dict[str, str]:
    """Return the versions of the libraries below PyTorch, and of the driver."""
    found = dict(_LIBRARIES.findall(torch.__config__.show()))
    if torch.cuda.is_available():
        found["cuDNN"] = str(torch.backends.cudnn.version())
        with suppress(AttributeError, RuntimeError, ImportError):  # a PyTorch without NCCL
            found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
        with suppress(OSError, AttributeError):  # not Linux, or not NVIDIA's
            told = Path("/proc/driver/nvidia/version").read_text()
            found["driver"] = re.search(r"\s(\d+\.\d+[\d.]*)\s", told)[1]  # type: ignore[index]
    return found


def settings() -> dict[str, Any]:
    """Return PyTorch's own settings of precision and of the choice of kernels."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    return {"float32_matmul_precision": torch.get_float32_matmul_precision(), "matmul.allow_tf32": matmul.allow_tf32,
            "cudnn.allow_tf32": cudnn.allow_tf32, "cudnn.benchmark": cudnn.benchmark,
            "fp16_reduced_precision_reduction": matmul.allow_fp16_reduced_precision_reduction,
            "bf16_reduced_precision_reduction": matmul.allow_bf16_reduced_precision_reduction,
            "mkldnn.enabled": torch.backends.mkldnn.enabled,
            "deterministic_algorithms": torch.are_deterministic_algorithms_enabled()}


def differences(before: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Compare surroundings or recipes, of which nested values count one by one; returns key -> (before, now)."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in sorted(before.keys() | now.keys(), key=[*now, *before].index):
        old, new = before.get(key, "unset"), now.get(key, "unset")
        if isinstance(old, dict) and isinstance(new, dict):
            found |= differences(old, new)
        elif old != new:
            found[key] = (old, new)
    return found
