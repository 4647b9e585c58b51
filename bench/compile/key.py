"""What a row of the table depends on, as a short key: the kernel's source, its callees', its types, constants and tile;
the target; and how the compiler is called and its output read, which is what `static_read.py` says.

Source counts as Python understands it, so that comments, docstrings and a move within the file change no key, and the
key is the same under every Triton version.
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

from phi1.bench.compile.case import Case
from phi1.bench.compile.gate import ARCHS

READER = Path(__file__).with_name("read.py")


def key_of(case: Case, arch: str) -> str:
    """12 hexadecimal digits that change when the compiled code may change, or what is read off it."""
    types, constants, multiples = case.arguments()
    gpu = ARCHS[arch]
    parts = {
        "reading": _meaning(READER),
        "target": [gpu.backend, gpu.version, gpu.warp, gpu.tensor_instruction],
        "source": sorted(_sources(case.kernel).items()),
        "types": sorted(types.items()),
        "constexprs": sorted((name, _constant(value)) for name, value in constants.items()),
        "multiples": multiples,
        "unaligned": sorted(case.unaligned),
        "tile": [case.num_warps, case.num_stages],
    }
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


@lru_cache
def _meaning(path: Path) -> str:
    """A file without its comments, its docstrings and the messages of its assertions."""
    tree = _without_docstrings(ast.parse(path.read_text()))
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert):
            node.msg = None
    return ast.unparse(tree)


@lru_cache
def _sources(kernel: JITFunction) -> dict[str, str]:
    """Name -> meaning of a kernel, of each jit function that it calls and of each global constant that it reads."""
    found: dict[str, str] = {}
    waiting = [kernel]
    while waiting:
        function = waiting.pop()
        name = f"{function.fn.__module__}.{function.fn.__qualname__}"
        if name in found:
            continue
        tree = _without_docstrings(ast.parse(function.src))
        found[name] = ast.unparse(tree)
        for used, value in _globals_of(tree, function.fn.__globals__):
            if isinstance(value, JITFunction):
                waiting.append(value)
            else:
                found[f"{name}:{used}"] = _constant(value)
    return found


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


def _constant(value: Any) -> str:
    if isinstance(value, JITFunction):
        return json.dumps(sorted(_sources(value).items()))
    return repr(value.value if isinstance(value, tl.constexpr) else value)


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.Module) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return tree
