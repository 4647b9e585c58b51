"""Shared by the tests of operations: the tolerance rule, gradients of every input, uninitialised memory as NaN, random
inputs, and kernels broken on purpose.

The bound is that of flash-attention's tests: an implementation may be twice as far from the exact result as the plain
PyTorch reference in the same dtype is, plus a few roundings. Exact is the reference in float64.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from phi1 import kernels

Tensors = Mapping[str, torch.Tensor | None]
Operation = Callable[..., Any]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DTYPES_OF_PRODUCTS = (*DTYPES[:2], pytest.param(torch.bfloat16, marks=pytest.mark.not_interpreted))
"""Triton's interpreter multiplies bfloat16 wrongly, and cuts off where it should round."""


def only(backend: str, *rows: Any) -> list[Any]:
    """Rows of parameters that run on one backend alone, "eager" or "triton"."""
    return [pytest.param(row, marks=getattr(pytest.mark, backend)) for row in rows]


def assert_within_bound(
    out: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor, name: str = "out", *, roundings: float = 2
) -> None:
    """Assert max|out - exact| <= 2 max|eager - exact| + a few roundings.

    Args:
        out: what is tested; its dtype, shape and device must be eager's.
        eager: the reference in the tested dtype.
        exact: the reference in float64, on the same inputs.
        name: what the message calls `out`.
        roundings: how many roundings of the largest exact value, eps(dtype) each, are allowed on top.
    """
    assert out.dtype == eager.dtype, f"{name}: dtype is {out.dtype}, the reference's {eager.dtype}"
    assert out.shape == eager.shape, f"{name}: shape is {tuple(out.shape)}, the reference's {tuple(eager.shape)}"
    assert out.device == eager.device, f"{name}: device is {out.device}, the reference's {eager.device}"
    if out.numel() == 0:
        return
    error = (out.double() - exact.double()).abs()
    worst = error.max().item()
    eager_error = (eager.double() - exact.double()).abs().max().item()
    rounding = torch.finfo(out.dtype).eps * exact.double().abs().max().item()
    bound = 2 * eager_error + roundings * rounding
    # Written so that a NaN fails.
    if not worst <= bound:
        flat = int(error.nan_to_num(nan=torch.inf).argmax())
        index = [int(i) for i in torch.unravel_index(torch.tensor(flat), out.shape)]
        raise AssertionError(
            f"{name} {list(out.shape)} {out.dtype}: max|out - exact| = {worst:.3e} is over the bound {bound:.3e} "
            f"(2 x eager's {eager_error:.3e} + {roundings} roundings of {rounding:.1e}); worst at {index}: "
            f"out {out[tuple(index)].item():.6g}, eager {eager[tuple(index)].item():.6g}, "
            f"exact {exact[tuple(index)].item():.6g}"
        )


def outputs_and_gradients(
    operation: Operation, tensors: Tensors, seed: int = 57885161, **options: Any
) -> dict[str, torch.Tensor]:
    """Call operation(**tensors, **options); its outputs, and the gradient of every floating-point argument.

    Each floating-point output gets a random gradient, which depends on `seed` and the output's shape alone and is exact
    in every dtype; inputs drawn from the same seed would be correlated with it. Outputs are named out0, out1, ...; the
    gradient of `x` is named dx.
    """
    leaves = {
        name: x.detach().requires_grad_() if x is not None and x.is_floating_point() else x
        for name, x in tensors.items()
    }
    result = operation(**leaves, **options)
    outputs = tuple(result) if isinstance(result, tuple | list) else (result,)
    wanted = {name: x for name, x in leaves.items() if x is not None and x.requires_grad}
    differentiable = [out for out in outputs if out.requires_grad]
    generator = torch.Generator().manual_seed(seed)
    # Rounded to bfloat16, so that every dtype is given the same gradient.
    upstream = [torch.randn(out.shape, generator=generator).bfloat16().to(out) for out in differentiable]
    gradients = torch.autograd.grad(differentiable, list(wanted.values()), upstream, allow_unused=True)
    named = {f"out{i}": out.detach() for i, out in enumerate(outputs)}
    for name, gradient in zip(wanted, gradients, strict=True):
        assert gradient is not None, f"{name} gets no gradient"
        named[f"d{name}"] = gradient
    return named


def assert_matches_reference(
    operation: Operation, reference: Operation, tensors: Tensors, *, roundings: float = 2, **options: Any
) -> None:
    """Assert the tolerance rule for every output and every gradient of an operation.

    Args:
        operation, reference: called with the same keywords.
        tensors: arguments by name; the dtype of the floating-point ones is what is tested.
        roundings: as for `assert_within_bound`.
        options: the other arguments.
    """
    with empty_is_nan():
        got = outputs_and_gradients(operation, tensors, **options)
    eager = outputs_and_gradients(reference, tensors, **options)
    exact = outputs_and_gradients(reference, {name: to_float64(x) for name, x in tensors.items()}, **options)
    for name, out in got.items():
        assert_within_bound(out, eager[name], exact[name], name, roundings=roundings)


def to_float64(x: torch.Tensor | None) -> torch.Tensor | None:
    """x in float64 if it is a floating-point tensor, else x."""
    return x.double() if x is not None and x.is_floating_point() else x


@contextmanager
def kept_bytes(constants: Sequence[torch.Tensor] = ()) -> Iterator[dict[int, int]]:
    """Note what autograd keeps of the operations inside the block: the bytes of each storage, by its address.

    Args:
        constants: tensors whose storages do not count, such as parameters.
    """
    apart = {x.untyped_storage().data_ptr() for x in constants}
    kept: dict[int, int] = {}

    def note(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in apart:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        yield kept


@contextmanager
def empty_is_nan() -> Iterator[None]:
    """Fill what torch.empty and its kin return with NaN (integers with their maximum), to catch what is not written."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]


def assert_operator_is_sound(operator: str, arguments: Sequence[Any]) -> None:
    """torch.library.opcheck of torch.ops.phi1.<operator>: schema, aliasing, fake tensors, autograd, AOT dispatch."""
    torch.library.opcheck(getattr(torch.ops.phi1, operator).default, tuple(arguments))


def assert_compiles_whole(operation: Operation, tensors: Tensors, **options: Any) -> None:
    """Assert that torch.compile(fullgraph=True) traces the operation and its backward, and changes no bit."""
    torch._dynamo.reset()
    compiled = torch.compile(operation, fullgraph=True, backend="aot_eager")
    expected = outputs_and_gradients(operation, tensors, **options)
    got = outputs_and_gradients(compiled, tensors, **options)
    for name, out in got.items():
        assert torch.equal(out, expected[name]), f"{name} differs under torch.compile"


def kernel_device() -> str | None:
    """The device on which Triton kernels run in this process: "cuda" on a GPU, "cpu" in the interpreter, or None."""
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        return "cpu"
    return "cuda" if torch.cuda.is_available() else None


@contextmanager
def launches() -> Iterator[list[str]]:
    """The names of the Triton kernels launched inside the block, in order."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    kind = InterpretedFunction if kernel_device() == "cpu" else JITFunction
    names: list[str] = []
    run = kind.run

    def noted(self: Any, *args: Any, **options: Any) -> Any:
        names.append(self.fn.__name__)
        return run(self, *args, **options)

    kind.run = noted  # type: ignore[method-assign]
    try:
        yield names
    finally:
        kind.run = run  # type: ignore[method-assign]


def attention_inputs(
    shape: Sequence[int], dtype: torch.dtype = torch.float32, device: str | None = None
) -> dict[str, torch.Tensor]:
    """Random q, k and v, where kernels run or on `device`; shape: samples, queries, keys, heads, head size."""
    batch, n_queries, n_keys, n_heads, head_size = shape
    generator = torch.Generator().manual_seed(0)
    device = device or kernel_device()
    return {name: torch.randn(batch, tokens, n_heads, head_size, generator=generator).to(device, dtype)
            for name, tokens in (("q", n_queries), ("k", n_keys), ("v", n_keys))}


def qkv_inputs(
    n_rows: int, n_heads: int = 2, head_size: int = 16, dtype: torch.dtype = torch.float32, device: str | None = None
) -> dict[str, torch.Tensor]:
    """A random [n_rows, 3, n_heads, head_size], where kernels run or on `device`."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n_rows, 3, n_heads, head_size, generator=generator)
    return {"qkv": x.to(device or kernel_device(), dtype)}


def rotary_tables(
    rotary_size: int, n_positions: int = 150, device: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary's cosines and sines, float32 [n_positions, rotary_size / 2], where kernels run or on `device`."""
    angle = torch.outer(torch.arange(n_positions).double(), 10000 ** (-torch.arange(0, rotary_size, 2) / rotary_size))
    device = device or kernel_device()
    return angle.cos().float().to(device), angle.sin().float().to(device)


def block_inputs(
    shape: Sequence[int], dtype: torch.dtype = torch.float32, device: str | None = None
) -> dict[str, torch.Tensor]:
    """Random rows and parameters of a parallel block, where kernels run or on `device`; shape: samples, tokens, width,
    heads, MLP width, and more that is not looked at."""
    batch, tokens, width, _, inner, *_ = shape
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "x": torch.randn(batch * tokens, width, generator=generator),
        "norm_weight": 1 + 0.1 * torch.randn(width, generator=generator),
        "norm_bias": 0.1 * torch.randn(width, generator=generator),
        "in_weight": torch.randn(3 * width + inner, width, generator=generator) / width**0.5,
        "in_bias": 0.1 * torch.randn(3 * width + inner, generator=generator),
        "out_weight": torch.randn(width, width + inner, generator=generator) / (width + inner) ** 0.5,
        "out_bias": 0.1 * torch.randn(2, width, generator=generator),
    }
    return {name: x.to(device or kernel_device(), dtype) for name, x in tensors.items()}


def load_kernels(
    files: Sequence[str], constants: Mapping[tuple[str, str], Any], monkeypatch: pytest.MonkeyPatch, folder: Path,
    file: str = "", text: str = "", replacement: str = "", times: int = 0,
) -> None:
    """Load files of kernels anew, one text of one of them replaced; operations import them when they run.

    Args:
        files: `gelu` or `block/launch` for a _triton.py, each behind those that it imports, up to those that the
            operations import.
        constants: (file, name) -> the value that it gets there.
        monkeypatch: takes the files back.
        folder: where the broken file is written.
        file, text, replacement, times: `text`, which `file` must hold so many times, becomes `replacement`.
    """
    root = Path(kernels.__path__[0])
    for name in files:
        (path,) = root.glob(f"**/{name}_triton.py")
        module_name = ".".join(("phi1.kernels", *path.relative_to(root).with_suffix("").parts))
        if name == file:
            source = path.read_text()
            assert source.count(text) == times, f"{name} has {text!r} {source.count(text)} times: mend the mutation"
            path = folder / path.name
            path.write_text(source.replace(text, replacement))
        spec = importlib.util.spec_from_file_location(module_name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        for (where, constant), value in constants.items():
            if where == name:
                setattr(module, constant, value)
