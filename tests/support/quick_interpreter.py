"""Takes more than half of the time out of Triton's interpreter, for the processes that run kernels in it.

What the interpreter repeats is done once, and no result changes:

- `triton.language` is patched once. The interpreter patches it for each launch and for each function that a kernel
  calls, and finds nothing left to patch in most of them.
- The NumPy dtype of a Triton dtype is looked up in a table that exists.
- Sums and products of 32 bits are not computed a second time in 64 bits. Compiled kernels do not do it either:
  `sanitize_overflow` is False there. test_bounds turns it on, where addresses are large.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from contextlib import contextmanager

import triton.language as tl
from triton.language import core
from triton.runtime import interpreter


def quicken() -> None:
    """Change the interpreter of this process."""
    interpreter._patch_lang(_sees_the_language)
    nothing_to_restore = interpreter._LangPatchScope()
    interpreter._patch_lang = lambda fn: nothing_to_restore
    of_scalar = functools.cache(interpreter._get_np_dtype)
    pointer = interpreter._get_np_dtype(tl.pointer_type(tl.int8))
    interpreter._get_np_dtype = lambda dtype: pointer if dtype.scalar.is_ptr() else of_scalar(dtype.scalar)
    _check_overflow(False)


@contextmanager
def overflow_checked() -> Iterator[None]:
    """Hold every sum and product of 32 bits against its range inside."""
    _check_overflow(True)
    try:
        yield
    finally:
        _check_overflow(False)


def _check_overflow(checked: bool) -> None:
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=checked)


def _sees_the_language() -> tuple[object, object]:
    """Stand for a kernel: the interpreter patches the modules among a function's globals."""
    return tl, core
