"""Pytest plugin: runs each test of kernels on the backends that this process has.

"eager" is PyTorch's code on the CPU. "triton" is the kernels: on a GPU, or on the CPU in Triton's interpreter, which
needs a process of its own because TRITON_INTERPRET acts on import. test_interpreter.py starts those processes, and
there the tests of kernels run alone.

- A test with the argument `device` runs on every backend; the backend is in force inside.
- A test, or one row of its parameters, marked `triton` or `eager` runs on that backend alone.
- A row marked `not_interpreted` runs on the CPU and on a GPU, and not in the interpreter.
- Every other test runs once, outside of the interpreter.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from kernel_checks import kernel_device

from phi1.kernels import backend

INTERPRETED = kernel_device() == "cpu"
BACKENDS = [name for name, here in (("eager", not INTERPRETED), ("triton", kernel_device() is not None)) if here]
MARKS = {
    "eager": "on PyTorch's code alone",
    "triton": "on the Triton kernels alone: on a GPU, or in Triton's interpreter",
    "not_interpreted": "on every backend but Triton's interpreter",
}


def pytest_configure(config: pytest.Config) -> None:
    if INTERPRETED:
        from quick_interpreter import quicken

        quicken()
    for name, meaning in MARKS.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")


@pytest.fixture(params=BACKENDS)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """The device of the backend under test, which is in force for the test."""
    if request.param == "eager":
        yield "cpu"
        return
    with backend("triton"):
        yield str(kernel_device())


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what other backends run, and mark what runs on kernels, so that `-m triton` selects it."""
    left_out = [item for item in items if not _runs_here(item)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]
    for item in items:
        if _backend_of(item) == "triton":
            item.add_marker("triton")


def _backend_of(item: pytest.Item) -> str:
    chosen = item.callspec.params.get("device") if hasattr(item, "callspec") else None
    if chosen in ("eager", "triton"):
        return chosen
    return "triton" if item.get_closest_marker("triton") else "eager"


def _runs_here(item: pytest.Item) -> bool:
    name = _backend_of(item)
    other = "eager" if name == "triton" else "triton"
    wrong = item.get_closest_marker(other) or (INTERPRETED and item.get_closest_marker("not_interpreted"))
    return name in BACKENDS and not wrong
