"""Kernels broken on purpose: the driver of the mutation tests.

A mutant is a file of kernels with one text replaced. It and all files that build on it are loaded in place of the real
ones, and a comparison with the reference must fail.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from kernel_checks import Operation, Tensors, assert_matches_reference, load_kernels

from phi1.kernels.core import tiles


class Mutant(NamedTuple):
    """`text`, which occurs `times` times in `file`, becomes `replacement`; `check` names the case that notices it."""

    file: str
    text: str
    replacement: str
    times: int
    check: str


class Case(NamedTuple):
    """A call of an operation and of its reference, under tiles by operation and kernel."""

    operation: Operation
    reference: Operation
    tensors: Tensors
    options: Mapping[str, Any]
    tiles: Mapping[tuple[str, str], Mapping[str, int]] = {}


def mutation_tests(
    files: Sequence[str], constants: Mapping[tuple[str, str], Any], mutants: Mapping[str, Mutant],
    case: Callable[[str], Case],
) -> tuple[Callable[..., None], Callable[..., None]]:
    """The two tests of a table of mutants: every check passes without one, and its check notices each.

    Args:
        files: of kernels, in the order of their imports.
        constants: (file, name) -> a size that few rows go over.
        mutants: by name.
        case: the inputs of a check, by its name.
    """
    def compare(name: str) -> None:
        own = case(name)
        with ExitStack() as stack:
            for (op, kernel), tile in own.tiles.items():
                stack.enter_context(tiles.forced(op, kernel, tile))
            assert_matches_reference(own.operation, own.reference, own.tensors, roundings=8, **own.options)

    def test_without_a_mutant(device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        load_kernels(files, constants, monkeypatch, tmp_path)
        for name in sorted({mutant.check for mutant in mutants.values()}):
            compare(name)

    @pytest.mark.parametrize("mutant", mutants)
    def test_a_mutant(device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mutant: str) -> None:
        *change, name = mutants[mutant]
        load_kernels(files, constants, monkeypatch, tmp_path, *change)
        with pytest.raises(AssertionError, match=r"max\|out - exact\|"):
            compare(name)

    return test_without_a_mutant, test_a_mutant
