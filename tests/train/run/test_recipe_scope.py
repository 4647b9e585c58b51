"""How far the recipe reaches: most of the trainer takes a section or a value, not the whole recipe."""

import ast
from pathlib import Path

import phi1.train

TRAIN = Path(phi1.train.__path__[0])


def names(source):
    """The names that a file reads, binds as a parameter, or imports."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.ImportFrom):
            yield from (alias.name for alias in node.names)


def test_at_most_fifteen_files_hold_the_recipe():
    holders = [path.relative_to(TRAIN).as_posix() for path in sorted(TRAIN.rglob("*.py"))
               if {"Recipe", "recipe"} & set(names(path.read_text()))]
    assert "recipe/recipe.py" in holders
    assert len(holders) <= 15, holders


def test_a_file_that_takes_a_recipe_without_naming_its_type_is_found():
    assert "recipe" in set(names("def train(recipe, folder): pass"))
    assert "Recipe" in set(names("from phi1.train.recipe.recipe import Recipe"))
    assert "recipe" not in set(names("def train(steps): 'of the recipe'"))
