"""Checks of arguments that are not tensors, for every folder. This file imports the standard library alone.

A message names the function, the argument, the rule and what was given: `generate: top_k must be a whole number; got
1.5`. Checks of tensors are in `kernels/core/checks.py`.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Iterable
from decimal import Decimal
from numbers import Integral, Real
from pathlib import Path
from typing import Any

_SHOWN = 200  # characters of a value that a message repeats


def require(holds: bool, op: str, rule: str, got: object) -> None:
    """Raise ValueError "op: rule; got ..." unless `holds`."""
    if not holds:
        raise ValueError(f"{op}: {rule}; got {got}")


def is_whole(x: object) -> bool:
    """True for an int or a whole number of NumPy, and not for True and False."""
    return isinstance(x, int | Integral) and not isinstance(x, bool)


def is_real(x: object) -> bool:
    """True for a number of Python or NumPy, and not for True and False."""
    return isinstance(x, float | int | Real | Decimal) and not isinstance(x, bool)


def is_finite(x: Any) -> bool:
    """True for a number that a float can hold, neither infinite nor NaN."""
    try:
        return -math.inf < float(x) < math.inf
    except OverflowError:  # a whole number too large for a float
        return False


def check_flag(op: str, **flags: object) -> None:
    """Raise TypeError unless every argument is True or False."""
    for name, x in flags.items():
        if not isinstance(x, bool):
            raise TypeError(f"{op}: {name} must be True or False; got {shown(x)}")


def check_whole(op: str, *, low: int | None = None, **numbers: object) -> None:
    """Raise unless every argument is a whole number that fits in 64 bits, `low` or more if it is given.

    True and False are not numbers.
    """
    for name, x in numbers.items():
        if not is_whole(x):
            raise TypeError(f"{op}: {name} must be a whole number; got {shown(x)}")
        if not -(2**63) <= x < 2**63:  # type: ignore[operator]
            raise ValueError(f"{op}: {name} must fit in 64 bits; got {shown(x)}")
        if low is not None and x < low:  # type: ignore[operator]
            raise ValueError(f"{op}: {name} must be {low} or more; got {x}")


def check_real(op: str, **numbers: object) -> None:
    """Raise unless every argument is a finite number. True and False are not numbers."""
    for name, x in numbers.items():
        if not is_real(x):
            raise TypeError(f"{op}: {name} must be a number; got {shown(x)}")
        if not is_finite(x):
            raise ValueError(f"{op}: {name} must be finite; got {shown(x)}")


def check_text(op: str, **texts: object) -> None:
    """Raise unless every argument is a str of whole characters: half of a surrogate pair has no bytes in UTF-8."""
    for name, x in texts.items():
        if not isinstance(x, str):
            raise TypeError(f"{op}: {name} must be a str; got {shown(x)}")
        try:
            x.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{op}: {name} must be valid Unicode text; got {error.object[error.start]!r}, a lone "
                             f"surrogate, at {error.start}") from None


def check_instance(op: str, name: str, x: object, kind: type | tuple[type, ...], what: str) -> None:
    """Raise TypeError unless x is of a kind, which messages call `what`."""
    if not isinstance(x, kind):
        raise TypeError(f"{op}: {name} must be {what}; got {shown(x)}")


def user_path(op: str, name: str, x: object) -> Path:
    """Return the path that a user gave, with `~` and `~user` expanded. Every path of a user comes through here.

    Raises:
        TypeError: x is no str and no Path.
        ValueError: x is empty, holds a NUL, or names the home of nobody.
    """
    if not isinstance(x, str | os.PathLike) or not isinstance(os.fspath(x), str):
        raise TypeError(f"{op}: {name} must be a path, a str or a pathlib.Path; got {shown(x)}")
    text = os.fspath(x)
    require("\0" not in text, op, f"{name} must hold no NUL character", shown(text))
    require(text != "", op, f"{name} must name a file or folder", "an empty path")
    path = os.path.expanduser(text)
    require(not path.startswith("~"), op, f"{name} must be ./~... where ~ is no user's home", shown(text))
    return Path(path)


def expanded(name: str) -> str:
    """Return a folder's name, or an id that stands in its place, with `~` expanded."""
    return str(user_path("", "the path", name)) if name.startswith("~") else name


def path_option(text: str) -> Path:
    """Return the path of a command's option, for `type=` of argparse."""
    try:
        return user_path("", "the path", text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix(": ")) from None


def name_option(text: str) -> str:
    """Return the folder or id of a command's option, for `type=` of argparse."""
    return str(path_option(text)) if text.startswith("~") else text


def listed(names: Iterable[object], most: int = 10) -> str:
    """Return names for a message: the first ten, and how many more there are."""
    texts = [str(name) for name in names]
    return ", ".join(texts[:most]) + (f" and {len(texts) - most:,} more" if len(texts) > most else "")


def one_line(message: object, most: int = 2000) -> str:
    """Return a message as one printable line. What would move a terminal's cursor is escaped; the middle may be cut."""
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(str(message).split()))
    return line if len(line) <= most else f"{line[:most // 2]} [...] {line[-most // 4:]}"


def shown(x: Any) -> str:
    """Return a short text that shows x in a message."""
    if isinstance(x, int):
        return f"a number of {x.bit_length()} bits" if x.bit_length() > 64 else repr(x)
    try:
        if hasattr(x, "shape") and hasattr(x, "dtype"):
            return f"{'a tensor' if hasattr(x, 'requires_grad') else 'an array'} of shape {list(x.shape)}"
        text = repr(x)
    except Exception:  # an object half made, a nested tensor, a list of numbers too long for a text
        return f"a {type(x).__name__}"
    return text if len(text) <= _SHOWN and "\n" not in text else f"a {type(x).__name__}"
