"""Checks of tensors that all operations share. An operation checks once, in its public function, before allocating.

A message names the operation, the argument, the rule and what was given:
`layer_norm: weight.shape must be (2048,), the last axis of x [4, 2048, 2048]; got (1024,)`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch.autograd import forward_ad

from phi1.arguments import check_flag, check_real, check_whole, require, shown
from phi1.kernels.core.backend import reference_forced

__all__ = [
    "check_alike",
    "check_device",
    "check_device_option",
    "check_differentiable",
    "check_dtype",
    "check_dtype_option",
    "check_flag",
    "check_float",
    "check_range",
    "check_rank",
    "check_real",
    "check_shape",
    "check_tensors",
    "check_values",
    "check_whole",
    "check_writable",
    "plain",
    "require",
    "shape_of",
    "values_checked",
]
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_check_values: bool | None = None


@contextmanager
def check_values(enabled: bool) -> Iterator[None]:
    """Turn the checks of values inside tensors (target ids, positions, cu_seqlens) on or off inside the block.

    By default they run only on CPU tensors, because reading a value from a GPU waits for the GPU. They never run while
    torch.compile traces.

    Args:
        enabled: True checks on every device, False on none. The setting holds for all threads of this process.
    """
    global _check_values
    check_flag("check_values", enabled=enabled)
    previous, _check_values = _check_values, enabled
    try:
        yield
    finally:
        _check_values = previous


def values_checked(x: torch.Tensor) -> bool:
    """True if the values inside `x` are to be checked."""
    if torch.compiler.is_compiling():
        return False
    # A fake, functional or distributed tensor has no values to read here.
    if type(x) not in (torch.Tensor, torch.nn.Parameter) or x.is_meta:
        return False
    return x.device.type == "cpu" if _check_values is None else _check_values


def check_tensors(op: str, **tensors: object) -> None:
    """Raise TypeError unless every argument is a dense tensor, NotImplementedError if torch.func differentiates it."""
    for name, x in tensors.items():
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{op}: {name} must be a tensor; got {type(x).__name__}")
        if x.layout is not torch.strided or x.is_nested or x.is_quantized:
            kind = "nested" if x.is_nested else "quantized" if x.is_quantized else plain(x.layout)
            raise TypeError(f"{op}: {name} must be a dense tensor; got a {kind} one")
    check_differentiable(op, **tensors)


def check_differentiable(op: str, **tensors: object) -> None:
    """Raise NotImplementedError if a tensor has a forward-mode tangent, or torch.func records on it.

    The operators have a backward and nothing else: PyTorch would drop the tangents without a word.
    """
    if torch.compiler.is_compiling() or reference_forced():
        return
    transforms = torch._C._are_functorch_transforms_active()
    if forward_ad._current_level < 0 and not transforms:  # type: ignore[attr-defined]
        return
    for name, x in tensors.items():
        if not isinstance(x, torch.Tensor):
            continue
        use = "with phi1.kernels.backend('reference') has them"
        if forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None:  # type: ignore[attr-defined]
            raise NotImplementedError(f"{op}: derivatives in forward mode (jvp, jacfwd, dual_level) are not supported, "
                                      f"{use}; got {name} with a tangent")
        if transforms and x.requires_grad and torch._C._functorch.is_gradtrackingtensor(x):
            raise NotImplementedError(f"{op}: torch.func's grad and vjp are not supported, torch.autograd.grad is, and "
                                      f"{use}; got {name} under torch.func")


def check_dtype_option(op: str, dtype: object) -> None:
    """Raise unless dtype is None or one that a model can have: float16, bfloat16, float32 or float64."""
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"{op}: dtype must be a torch.dtype or None; got {shown(dtype)}")
    require(dtype in (None, *FLOAT_DTYPES, torch.float64), op, "dtype must be float16, bfloat16, float32 or float64",
            dtype)


def check_device_option(op: str, device: object) -> None:
    """Raise unless device is None or names a device that PyTorch can use here."""
    if device is None:
        return
    if not isinstance(device, str | torch.device):
        raise TypeError(f"{op}: device must be a str, a torch.device or None; got {shown(device)}")
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ValueError(f"{op}: device must be one such as 'cpu' or 'cuda'; got {shown(device)}") from None
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"{op}: device {found} is not there; PyTorch sees {torch.cuda.device_count()} CUDA devices")
    if found.type not in ("cpu", "cuda", "meta"):
        try:
            torch.empty(0, device=found)
        except (RuntimeError, AssertionError, NotImplementedError, ImportError):
            raise ValueError(f"{op}: device {found} is not there") from None


def check_float(op: str, name: str, x: torch.Tensor) -> None:
    """Raise TypeError unless x is float16, bfloat16 or float32 (or float64 inside `backend("reference")`)."""
    if x.dtype not in FLOAT_DTYPES and not (x.dtype == torch.float64 and reference_forced()):
        raise TypeError(f"{op}: {name} must be float16, bfloat16 or float32 (float64 inside backend('reference')); "
                        f"got {plain(x.dtype)}")


def check_dtype(op: str, name: str, x: torch.Tensor, dtype: torch.dtype) -> None:
    """Raise TypeError unless x has this dtype."""
    if x.dtype != dtype:
        raise TypeError(f"{op}: {name} must be {plain(dtype)}; got {plain(x.dtype)}")


def check_alike(op: str, first: str, x: torch.Tensor, **others: torch.Tensor | None) -> None:
    """Raise unless every other tensor has the dtype and device of x, which messages call `first`. None is allowed."""
    for name, other in others.items():
        if other is None:
            continue
        if other.dtype != x.dtype:
            raise TypeError(f"{op}: {name} must have {first}'s dtype ({plain(x.dtype)}); got {plain(other.dtype)}")
        check_device(op, name, other, first, x)


def check_device(op: str, name: str, x: torch.Tensor, reference_name: str, reference: torch.Tensor) -> None:
    """Raise ValueError unless x is on the device of `reference`, which messages call `reference_name`."""
    if x.device != reference.device:
        raise ValueError(f"{op}: {name} must be on {reference_name}'s device ({reference.device}); got {x.device}")


def check_rank(op: str, name: str, x: torch.Tensor, axes: str) -> None:
    """Raise ValueError unless x has the axes named in `axes`, for example "N, S, H, K"."""
    if x.dim() != axes.count(",") + 1:
        raise ValueError(f"{op}: {name} must be [{axes}]; got shape {tuple(x.shape)}")


def check_shape(op: str, name: str, x: torch.Tensor, shape: Sequence[int], why: str) -> None:
    """Raise ValueError unless x has this shape; `why` ends the rule, for example "the last axis of x [2, 64]"."""
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{op}: {name}.shape must be {tuple(shape)}, {why}; got {tuple(x.shape)}")


def check_range(op: str, name: str, x: torch.Tensor, low: int, high: int, why: str, also: int | None = None) -> None:
    """Raise ValueError unless low <= x < high, or x == also, for every element. Runs only if `values_checked(x)`."""
    if not values_checked(x) or x.numel() == 0:
        return
    bad = (x < low) | (x >= high)
    if also is not None:
        bad &= x != also
    if bool(bad.any()):
        index = tuple(bad.nonzero()[0].tolist())
        exception = "" if also is None else f" or {also}"
        raise ValueError(f"{op}: {name} must be at least {low} and less than {high}{exception}, {why}; "
                         f"got {x[index].item()} at {list(index)}")


def check_writable(op: str, name: str, x: torch.Tensor) -> None:
    """Raise ValueError if two elements of x share memory, as after `expand`."""
    require(all(size == 1 or stride for size, stride in zip(x.shape, x.stride(), strict=True)), op,
            f"{name} must not be expanded, for it is written to", f"strides {x.stride()}")


def shape_of(x: torch.Tensor) -> str:
    """Return x's shape for a message, such as "[4, 2048]"."""
    return str(list(x.shape))


def plain(dtype: torch.dtype | torch.layout) -> str:
    """Return the name of a dtype or a layout for a message, such as "float32"."""
    return str(dtype).removeprefix("torch.")
