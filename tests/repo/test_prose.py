"""Docstrings begin with a verb or a noun, so that a reader meets the subject first."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ("kernels", "phi1", "train", "bench", "tests", "examples", "conftest.py", "setup.py")
OPENINGS = {"Of", "As", "What", "Whether", "Where", "That", "Those", "Who", "If"}  # they begin a clause, not a sentence


def wrong_openings(source):
    """Yield (line, first word) of every docstring in a source that begins with one of OPENINGS.

    Strings below a constant or a field are its docstring, so they count as well.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            word = (node.value.value.split() or [""])[0].rstrip(",.:;")
            if word in OPENINGS:
                yield node.lineno, word


def files(name):
    path = ROOT / name
    return [path] if path.is_file() else sorted(path.rglob("*.py"))


@pytest.mark.parametrize("source", SOURCES)
def test_no_docstring_begins_with_a_clause(source):
    found = [f"{path.relative_to(ROOT)}:{line}: {word}" for path in files(source)
             for line, word in wrong_openings(path.read_text(encoding="utf-8"))]
    assert not found, f"{len(found)} docstrings begin with one of {', '.join(sorted(OPENINGS))}:\n" + "\n".join(found)


@pytest.mark.parametrize("source", [
    '"""What it is."""', 'class A:\n    """Of a row."""', 'def f():\n    """\n    Whether it runs.\n    """',
    'async def f():\n    """If, and only if, it runs."""', 'N = 3\n"""That many rows."""',
])
def test_a_clause_is_found_at_any_docstring(source):
    assert len(list(wrong_openings(source))) == 1


def test_a_subject_and_other_strings_pass():
    assert not list(wrong_openings('"""Asynchronous reads."""\nword = "What"\ndef f(x="If"):\n    """Return x."""\n'))
    assert all(files(name) for name in SOURCES)
