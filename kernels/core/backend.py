"""The choice of implementation: the Triton kernels, PyTorch code, or the readable reference.

The device decides. On CUDA devices (NVIDIA and ROCm) an operation runs its Triton kernels; on all other devices it runs
PyTorch code with the same signature. The backward makes its own choice when it is called, and accepts what either
forward saved. `backend` overrides the choice, for comparisons and tests.
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

ROOM, PACKAGE = Path(__file__).parents[1], __name__.removesuffix(".core.backend")
_BACKENDS = ("triton", "reference")
_forced: str | None = None


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Force one implementation for every operation called inside the block, in this process.

    Args:
        name: "triton" runs the Triton kernels. CPU tensors then run in Triton's interpreter, which needs
            TRITON_INTERPRET=1 set before Triton is imported. "reference" calls each operation's `<op>_reference`,
            plain differentiable PyTorch, on any device.

    Raises:
        ValueError: the name is not one of these.
        RuntimeError: the name is "triton", and there is neither a CUDA device nor the interpreter.
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
    """Register a function as the torch.library operator `name`. Its annotations give the schema.

    The function writes only into the arguments named in `mutates`. An operator that names any cannot have a backward.

    Autocast is off inside the function, so the dtypes of the arguments decide, as the fake implementation and the
    backward assume. The arguments' GPU is the current device inside, because Triton launches on the current device.
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
    """True if this PyTorch is built for GPUs and Triton is installed. The driver is not queried."""
    return bool(torch.version.cuda or torch.version.hip) and find_spec("triton") is not None


def load_kernels() -> None:
    """Import every file of kernels. Triton reads their sources at import: 26 ms for the slowest, 0.1 s for all."""
    for file in sorted(ROOM.rglob("*_triton.py")):
        import_module(".".join((PACKAGE, *file.relative_to(ROOM).with_suffix("").parts)))


def interpreting() -> bool:
    """True if Triton kernels run on CPU tensors, in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def reference_forced() -> bool:
    """True inside `backend("reference")`."""
    return _forced == "reference"


def use_triton(x: torch.Tensor) -> bool:
    """True if an operation runs its Triton kernels on `x`.

    Raises:
        ValueError: `backend("triton")` is active, and the kernels cannot run on x's device.
    """
    if _forced == "triton" and not (x.is_cuda or interpreting()):
        raise ValueError("backend('triton'): tensors must be on a CUDA device, or TRITON_INTERPRET=1 be set before "
                         f"Triton is imported; got a tensor on {x.device}")
    return x.is_cuda if _forced is None else _forced == "triton"
