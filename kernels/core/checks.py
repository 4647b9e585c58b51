"""Argument checks that all operations share. An operation checks once, in its public function, before allocating.

A message names the operation, the argument, the rule and what was given:
`layer_norm: weight.shape must be (2048,), the last axis of x [4, 2048, 2048]; got (1024,)`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import SupportsFloat, SupportsIndex

import torch

from phi1.kernels.core.backend import reference_forced
from phi1.kernels.core.philox import MAX_HEADS, Dropout

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


def require(holds: bool, op: str, rule: str, got: object) -> None:
    """Raise ValueError "op: rule; got ..." unless `holds`."""
    if not holds:
        raise ValueError(f"{op}: {rule}; got {got}")


def check_flag(op: str, **flags: object) -> None:
    """Raise TypeError unless every argument is True or False."""
    for name, x in flags.items():
        if not isinstance(x, bool):
            raise TypeError(f"{op}: {name} must be True or False; got {_shown(x)}")


def check_whole(op: str, **numbers: object) -> None:
    """Raise unless every argument is a whole number that fits in 64 bits. True and False are not numbers."""
    for name, x in numbers.items():
        if isinstance(x, bool | torch.Tensor) or not isinstance(x, int | SupportsIndex):
            raise TypeError(f"{op}: {name} must be a whole number; got {_shown(x)}")
        if isinstance(x, int) and not -(2**63) <= x < 2**63:
            raise ValueError(f"{op}: {name} must fit in 64 bits; got {_shown(x)}")


def check_real(op: str, **numbers: object) -> None:
    """Raise unless every argument is a finite number. True and False are not numbers."""
    for name, x in numbers.items():
        if isinstance(x, bool | torch.Tensor) or not isinstance(x, float | int | SupportsFloat):
            raise TypeError(f"{op}: {name} must be a number; got {_shown(x)}")
        if not -math.inf < _as_float(x) < math.inf:
            raise ValueError(f"{op}: {name} must be finite; got {_shown(x)}")


def _as_float(x: SupportsFloat) -> float:
    try:
        return float(x)
    except OverflowError:  # a whole number too large for a float
        return math.inf


def _shown(x: object) -> str:
    """Return a short text that shows x in a message."""
    if isinstance(x, torch.Tensor):
        return f"a tensor of shape {shape_of(x)}"
    return f"a number of {x.bit_length()} bits" if isinstance(x, int) and x.bit_length() > 64 else repr(x)


def check_tensors(op: str, **tensors: object) -> None:
    """Raise TypeError unless every argument is a tensor."""
    for name, x in tensors.items():
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{op}: {name} must be a tensor; got {type(x).__name__}")


def check_float(op: str, name: str, x: torch.Tensor) -> None:
    """Raise TypeError unless x is float16, bfloat16 or float32 (or float64 inside `backend("reference")`)."""
    if x.dtype not in FLOAT_DTYPES and not (x.dtype == torch.float64 and reference_forced()):
        raise TypeError(f"{op}: {name} must be float16, bfloat16 or float32 (float64 inside backend('reference')); "
                        f"got {_plain(x.dtype)}")


def check_dtype(op: str, name: str, x: torch.Tensor, dtype: torch.dtype) -> None:
    """Raise TypeError unless x has this dtype."""
    if x.dtype != dtype:
        raise TypeError(f"{op}: {name} must be {_plain(dtype)}; got {_plain(x.dtype)}")


def check_alike(op: str, first: str, x: torch.Tensor, **others: torch.Tensor | None) -> None:
    """Raise unless every other tensor has the dtype and device of x, which messages call `first`. None is allowed."""
    for name, other in others.items():
        if other is None:
            continue
        if other.dtype != x.dtype:
            raise TypeError(f"{op}: {name} must have {first}'s dtype ({_plain(x.dtype)}); got {_plain(other.dtype)}")
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


def check_dropout(op: str, dropout: Dropout | None, x: torch.Tensor, n_samples: int | None = None,
                  n_heads: int = 1, name: str = "dropout") -> None:
    """Raise unless `dropout` is None or a Dropout on x's device with one sample id for each of n_samples.

    Without n_samples, the number of sample ids must divide the rows [N, ...] of x.
    """
    if dropout is None:
        return
    if not isinstance(dropout, Dropout):
        raise TypeError(f"{op}: {name} must be a phi1.kernels.Dropout or None; got {type(dropout).__name__}")
    check_device(op, f"{name}.rng", dropout.rng, "x", x)
    require(n_heads <= MAX_HEADS, op, f"{name} masks number at most {MAX_HEADS} heads", n_heads)
    if dropout.sample_ids is None:
        return
    given = dropout.sample_ids.shape[0]
    if n_samples is None:
        require(given > 0 and x.shape[0] % given == 0, op,
                f"{name}.sample_ids must divide the {x.shape[0]} rows of x evenly", f"{given} sample ids")
    else:
        require(given == n_samples, op, f"{name}.sample_ids.shape must be ({n_samples},), one per sample", (given,))


def check_writable(op: str, name: str, x: torch.Tensor) -> None:
    """Raise ValueError if two elements of x share memory, as after `expand`."""
    require(all(size == 1 or stride for size, stride in zip(x.shape, x.stride(), strict=True)), op,
            f"{name} must not be expanded, for it is written to", f"strides {x.stride()}")


def shape_of(x: torch.Tensor) -> str:
    """Return x's shape for a message, such as "[4, 2048]"."""
    return str(list(x.shape))


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
