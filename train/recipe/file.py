"""Reads a recipe: a TOML file, overridden by the command line's `--section.key value`; one line for each mistake."""

from __future__ import annotations

import difflib
import json
import tomllib
import types
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import TypeAdapter, ValidationError

from phi1.arguments import expanded
from phi1.train.recipe.recipe import KEYS, Recipe, changes
from phi1.train.runtime.launch import RunError
from phi1.user_files import read_file, read_json

DEFAULT_FILE = Path(__file__).parents[1] / "configs" / "nano.toml"
SHOWN_PATH = "train/configs/nano.toml"
LARGEST = 32 << 10  # bytes; a recipe has 3 kB, and tomllib takes minutes for a key of 50,000 dots
_ADAPTER = TypeAdapter(Recipe)


def read_recipe(file: Path | None, overrides: dict[str, str], shown: str | None = None) -> Recipe:
    """Read the recipe in `file` (the nano run's if None), with the command line's values in place of the file's.

    Args:
        file: a TOML file; unset keys take the defaults of `Recipe`.
        overrides: `section.key` -> the text given on the command line.
        shown: name of the file in error messages, if not its path.

    Raises:
        RunError: no such file, bad TOML, an unknown key or a value that breaks its rule; one line names it.
    """
    name = shown or (SHOWN_PATH if file is None else str(file))
    data = _read_toml(file or DEFAULT_FILE, name)
    flat: dict[str, Any] = {}
    for section, content in data.items():
        if not isinstance(content, dict):
            if section in {known.name for known in fields(Recipe)}:
                raise RunError(f"{name}: {section} must be a section, a line [{section}] with the keys below it; got "
                               f"{content!r}")
            raise RunError(f"{name}: {unknown(section)}")
        flat |= {f"{section}.{key}": value for key, value in content.items()}
    for key in flat:
        if key not in KEYS:
            raise RunError(f"{name}: {unknown(key)}")
    for key, text in overrides.items():
        if key not in KEYS:
            raise RunError(unknown(key))
        flat[key] = _from_text(key, text)
    for key, text in changes(str(flat.get("run.change", ""))).items():
        if "run.change" in overrides or key not in overrides:  # a stored change is older than the command line
            flat[key] = _from_text(key, text)
    for key, value in flat.items():
        if isinstance(value, str) and _is_text(KEYS[key]):
            try:
                flat[key] = expanded(value)
            except ValueError as error:
                raise RunError(f"{key}{str(error).removeprefix(': the path')}") from None
    sections: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        section, leaf = key.split(".", 1)
        sections.setdefault(section, {})[leaf] = value
    return _validated(sections, overrides, name)


def _read_toml(file: Path, name: str) -> dict[str, Any]:
    try:
        if file.is_dir():  # a checkpoint, whose notes hold the recipe that it was trained with
            return _of_checkpoint(file)
        return tomllib.loads(read_file(file, LARGEST).decode("utf-8-sig"))
    except RecursionError:
        raise RunError(f"--config {name}: not valid TOML: nested too deeply") from None
    except OSError as error:
        raise RunError(f"--config {name}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise RunError(f"--config {name}: not UTF-8 ({error.reason} at byte {error.start})") from None
    except tomllib.TOMLDecodeError as error:
        raise RunError(f"--config {name}: not valid TOML: {error}") from None


def _of_checkpoint(folder: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = read_json(folder / "trainer.json")["recipe"]
        if isinstance(found, dict):
            return found
        raise TypeError
    except (ValueError, KeyError, TypeError, FileNotFoundError):
        raise RunError(f"--config {folder}: neither a TOML file nor a checkpoint that holds its recipe") from None


def unknown(key: str) -> str:
    """Say that a key is unknown, and name the nearest known one, by its whole name or by its last part."""
    leaf = key.rsplit(".", 1)[-1]

    def likeness(known: str) -> float:
        same_section = "." in key and key.split(".")[0] == known.split(".")[0]
        return max(difflib.SequenceMatcher(None, key, known).ratio(),
                   difflib.SequenceMatcher(None, leaf, known.split(".")[1]).ratio() - (0 if same_section else 0.05))

    return f"{key!r} is not a key; the nearest is {max(KEYS, key=likeness)} (--help lists them all)"


def _from_text(key: str, text: str) -> Any:
    """Convert a command line's text to the TOML value that the key expects; strings need no quotes."""
    if _is_text(KEYS[key]):
        return text
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _is_text(hint: Any) -> bool:
    while get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    if get_origin(hint) is types.UnionType:
        return any(_is_text(part) for part in get_args(hint))
    return hint is str or get_origin(hint) is Literal


def _validated(sections: dict[str, dict[str, Any]], overrides: dict[str, str], name: str) -> Recipe:
    try:
        # As JSON, because strict validation of Python objects would require tuples and finished dataclasses.
        return _ADAPTER.validate_json(json.dumps(sections, default=str), strict=True)
    except ValidationError as failure:
        error = failure.errors(include_url=False)[0]
        section, leaf, *index = error["loc"]
        key = f"{section}.{leaf}"
        shown = key + "".join(f"[{i}]" for i in index if isinstance(i, int))
        where = "" if key in overrides else f"{name}: "
        raise RunError(f"{where}{shown}: {_rule(error, key)}; got {sections[str(section)][str(leaf)]!r}") from None


def _rule(error: Any, key: str) -> str:
    """Say what a value must be: in pydantic's words, or in ours if those do not say what to write."""
    if error["type"].startswith("bool_"):
        return "input should be true or false"
    if error["type"] in ("tuple_type", "missing", "too_long"):
        section, leaf = key.split(".")
        return f"input should be of the form {json.dumps(getattr(getattr(Recipe(), section), leaf))}"
    return error["msg"][0].lower() + error["msg"][1:]


def show_help(purpose: str | None, file: Path | None) -> None:
    """Print the help; `file` is the recipe without --config, the nano run's if None. Raises RunError if it cannot."""
    try:
        print(f"{purpose}\nWithout --config: {file or SHOWN_PATH}. Keys, with what stands where no file sets them:\n\n"
              f"{help_text()}", flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise RunError(f"--help: {error.strerror}") from None


def help_text() -> str:
    """Return every key with its default and its line of documentation."""
    lines = []
    for section in fields(Recipe):
        cls = section.default_factory
        lines += ["", f"[{section.name}]  {cls.__doc__}"]  # type: ignore[union-attr]
        for item in fields(cls):  # type: ignore[arg-type]
            notes = [note.description for note in KEYS[f"{section.name}.{item.name}"].__metadata__
                     if getattr(note, "description", None)]
            default = "" if item.default is None else f" (default {json.dumps(item.default)})"
            lines.append(f"  --{section.name}.{item.name}  {notes[-1]}{default}")
    return "\n".join(lines).lstrip("\n")
