"""Which implementation an operation runs: the Triton kernel, PyTorch code, or the readable reference.

The device decides: on CUDA devices (NVIDIA and ROCm) an operation runs its Triton kernels; on everything else, PyTorch
code with the same signature. The backward runs where it is called, and takes what either forward saved. `backend`
overrides the choice, for comparisons and tests.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

ROOM = Path(__file__).parents[1]
_BACKENDS = ("triton", "reference")
_forced: str | None = None


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Force one implementation for every operation called inside the block, in this process.

    Args:
        name: "triton" runs the Triton kernels, also on CPU tensors if TRITON_INTERPRET=1 was set before Triton was
            imported (Triton's interpreter). "reference" calls the operations'
            `<op>_reference`, plain differentiable PyTorch, on any device.

    Raises:
        ValueError: another name.
        RuntimeError: "triton" where there is neither a CUDA device nor the interpreter.
    """
    global _forced
    if name not in _BACKENDS:
        raise ValueError(f"backend: name must be one of {', '.join(_BACKENDS)}; got {name!r}")
    if name == "triton" and not (torch.cuda.is_available() or interpreting()):
        raise RuntimeError(
            "backend: 'triton' needs a CUDA device, or TRITON_INTERPRET=1 in the environment before Triton is imported"
        )
    previous, _forced = _forced, name
    try:
        yield
    finally:
        _forced = previous


def operator(name: str, mutates: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], torch.library.CustomOpDef]:
    """Register a function as the torch.library operator `name`, its schema from its annotations.

    It writes into no argument but those named in `mutates`; an operator that writes into any can have no backward.

    Autocast is off inside: the dtypes of the arguments decide, as the fake implementation and the backward say. Their
    GPU is the current one inside, for Triton launches there.
    """
    def register(function: Callable[..., Any]) -> torch.library.CustomOpDef:
        def run(*args: Any) -> Any:
            device = next(x for x in args if isinstance(x, torch.Tensor)).device
            elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
            if not elsewhere and not torch.is_autocast_enabled(device.type):
                return function(*args)
            with torch.autocast(device.type, enabled=False), torch.cuda.device(device) if elsewhere else nullcontext():
                return function(*args)

        schema = torch.library.infer_schema(function, mutates_args=mutates)
        return torch.library.custom_op(name, run, mutates_args=mutates, schema=schema)

    return register


def built_for_gpus() -> bool:
    """True where this PyTorch can drive GPUs and Triton is there for them; no driver is asked."""
    return bool(torch.version.cuda or torch.version.hip) and find_spec("triton") is not None


def load_kernels() -> None:
    """Import every file of kernels, whose sources Triton reads then: 26 ms for the slowest, 0.1 s for all on a CPU."""
    for file in sorted(ROOM.rglob("*_triton.py")):
        import_module(".".join(("phi1.kernels", *file.relative_to(ROOM).with_suffix("").parts)))


def interpreting() -> bool:
    """True where Triton kernels run on CPU tensors, in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def reference_forced() -> bool:
    """True inside `backend("reference")`."""
    return _forced == "reference"


def use_triton(x: torch.Tensor) -> bool:
    """True where an operation runs its Triton kernels on `x`.

    Raises:
        ValueError: inside `backend("triton")`, where the kernels cannot run on x's device.
    """
    if _forced == "triton" and not (x.is_cuda or interpreting()):
        raise ValueError("backend('triton'): tensors must be on a CUDA device, or TRITON_INTERPRET=1 be set before "
                         f"Triton is imported; got a tensor on {x.device}")
    return x.is_cuda if _forced is None else _forced == "triton"
