"""The command line of train/pretrain.py and train/finetune.py: `[--config FILE.toml] [--section.key value ...]`."""

from __future__ import annotations

from pathlib import Path

from phi1.arguments import user_path
from phi1.train.recipe.file import read_recipe, unknown
from phi1.train.recipe.recipe import KEYS, Recipe
from phi1.train.runtime.launch import RunError

SHORT = {"prove-resume": "run.prove_resume", "profile": "run.profile"}


def parse(arguments: list[str], file: Path | None = None) -> Recipe | None:
    """Return the recipe that the command line asks for; None where it asks for help.

    Args:
        arguments: the words after the program's name.
        file: the recipe without --config; the nano run's if None.

    Raises:
        RunError: a word is not understood, or as read_recipe.
    """
    overrides: dict[str, str] = {}
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if word in ("-h", "--help"):
            return None
        if not word.startswith("--"):
            raise RunError(f"{word!r} is not understood: give --config FILE.toml or --section.key value")
        key, equals, value = ("--run.bitwise=true" if word == "--bitwise" else word)[2:].partition("=")
        if not equals:
            if not rest:
                raise RunError(f"{word} needs a value" if SHORT.get(key, key) in (*KEYS, "config") else unknown(key))
            value = rest.pop(0)
        if key == "config":
            try:
                file = user_path("--config", "FILE", value)
            except ValueError as error:
                raise RunError(str(error)) from None
        else:
            overrides[SHORT.get(key, key)] = value
    return read_recipe(file, overrides)
