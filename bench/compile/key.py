"""A short key of all that a row of the table depends on: the sources of the kernel and of what it calls, what the
compiler is told of a launch, the target, and `read.py`, which calls the compiler and reads its output.

Sources count as Python understands them, so that comments, docstrings and a move, even to another file, change no key,
and the key is the same under every Triton version.
"""

from __future__ import annotations

import ast
import hashlib
import json
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import triton.language as tl
from triton.runtime.jit import JITFunction

from phi1.bench.compile.arch import ARCHS
from phi1.bench.harness.counting import Launch

READER = Path(__file__).with_name("read.py")


def key_of(launch: Launch, arch: str) -> str:
    """12 hexadecimal digits that change when the compiled code may change, or what is read off it."""
    gpu = ARCHS[arch]
    parts = {
        "reading": _meaning(READER),
        "target": [gpu.backend, gpu.version, gpu.warp, gpu.tensor_instruction],
        "source": _sources(launch.kernel),
        "types": sorted(launch.types.items()),
        "constants": sorted((name, repr(value)) for name, value in launch.constants.items()),
        "aligned": sorted(launch.aligned),
        "options": sorted(launch.options.items()),
    }
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


def multiplies(kernel: JITFunction) -> bool:
    """True where a kernel, or a function that it calls, multiplies matrices."""
    return any("tl.dot(" in source for _, source in _sources(kernel))


@lru_cache
def _meaning(path: Path) -> str:
    """A file without its comments, its docstrings and the messages of its assertions."""
    tree = _without_docstrings(ast.parse(path.read_text()))
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert):
            node.msg = None
    return ast.unparse(tree)


@lru_cache
def _sources(kernel: JITFunction) -> tuple[tuple[str, str], ...]:
    """(name, source without comments) of a kernel, of each jit function that it calls and of each global constant."""
    found: set[tuple[str, str]] = set()
    seen, waiting = {kernel.fn}, [kernel]
    while waiting:
        function = waiting.pop()
        name, tree = function.fn.__qualname__, _without_docstrings(ast.parse(function.src))
        found.add((name, ast.unparse(tree)))
        for used, value in _globals_of(tree, function.fn.__globals__):
            if not isinstance(value, JITFunction):
                found.add((f"{name}:{used}", repr(value.value if isinstance(value, tl.constexpr) else value)))
            elif value.fn not in seen:
                seen.add(value.fn)
                waiting.append(value)
    return tuple(sorted(found))


def _globals_of(tree: ast.AST, names: dict[str, Any]) -> list[tuple[str, Any]]:
    """The jit functions and constants of ours that a function refers to, by name or as an attribute of a module."""
    found = []
    for node in ast.walk(tree):
        value: Any = None
        if isinstance(node, ast.Name):
            value = names.get(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = names.get(node.value.id)
            if isinstance(module, ModuleType) and not module.__name__.startswith("triton"):
                value = getattr(module, node.attr, None)
        ours = isinstance(value, JITFunction) and not value.fn.__module__.startswith("triton.")
        if ours or isinstance(value, tl.constexpr | int | float | str):
            found.append((ast.unparse(node), value))
    return found


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.Module) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return tree
