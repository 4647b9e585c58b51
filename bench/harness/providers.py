"""Constructors of providers, and the peers' packages with the versions that are meant.

A peer that is not installed is a row with the version that would be used, and one that fails is a row with its error.
torch.compile runs without CUDA graphs on operations: their inputs rotate, and a graph would first copy them into its
own buffers, which is no part of the work.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from phi1.bench.harness.case import Case, Function, Prepare, Provider
from phi1.kernels import backend

VERSIONS = {
    "transformers": "5.23.0",
    "liger-kernel": "0.8.5",
    "flash-attn": "2.8.3.post2",
    "flash-attn-4": "4.0.0b36",
    "quack-kernels": "0.6.5",
    "cut-cross-entropy": "25.1.1",
}
"""Distribution -> the version that is named if it is not installed."""

MAX_AUTOTUNE = "max-autotune-no-cudagraphs"


def installed_version(package: str) -> str | None:
    """The version of a distribution, or None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def plain(name: str, function: Function, **options: Any) -> Provider:
    """A provider that needs no preparation."""
    return Provider(name, lambda case, device: function, **options)


def ours(function: Function) -> Provider:
    """phi1 itself: the public operation, whose backend the device decides."""
    return ours_prepared(lambda case, device: function)


def ours_prepared(prepare: Prepare) -> Provider:
    """phi1 itself, where something is made before it is timed."""
    return Provider("phi1", prepare, package="phi1")


def compiled(function: Function, **options: Any) -> tuple[Provider, Provider]:
    """torch.compile of a function at its default and at its best setting; on a CPU (10-40 s) only on request."""
    options = {"by_default": ("cuda",)} | options
    return (Provider("compile", lambda case, device: torch.compile(function, dynamic=False), **options),
            Provider("max-autotune", lambda case, device: torch.compile(function, dynamic=False, mode=MAX_AUTOTUNE),
                     slow=True, **options))


def settings_for(case: Case) -> contextlib.AbstractContextManager[Any]:
    """PyTorch's settings while a case is prepared and timed.

    A backward alone runs again and again on one graph, so a compiled backward must not reuse saved tensors as buffers.
    """
    if case.direction != "backward":
        return contextlib.nullcontext()
    import torch._functorch.config

    return torch._functorch.config.patch(donated_buffer=False)


def peer(name: str, package: str, load: Callable[[Case], Function], devices: tuple[str, ...] = ("cuda",),
         **options: Any) -> Provider:
    """A provider from a package that need not be installed; `load` imports it and returns the function."""
    return Provider(name, lambda case, device: load(case), package=package, devices=devices, by_default=devices,
                    **options)


def reference_of(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with every operation in it replaced by its specification, `<op>_reference`."""
    def run(*arguments: Any) -> Any:
        with backend("reference"):
            return function(*arguments)

    return run


def part_of_reference(function: Callable[..., Any]) -> Callable[..., Any]:
    """One piece of a reference that is computed piece by piece, since scores and logits in float64 take gigabytes.

    Only the arguments of a piece are kept for the backward, which computes the piece again.
    """
    return partial(checkpoint, reference_of(function), use_reentrant=False, preserve_rng_state=False)
