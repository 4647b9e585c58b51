"""What a run is made of besides its recipe and data: versions, commit, and what changed since it was last started."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("phi1", "torch", "triton", "numpy")


def versions() -> dict[str, str]:
    """Of Python and of the packages that decide a run's numbers; those that are not installed are left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The commit of the checkout that this package runs from, with "+changes" where files differ; None outside one."""
    here = Path(__file__).resolve().parent
    try:
        _git(here, "ls-files", "--error-unmatch", Path(__file__).name)  # not of a repository around the installation
        head = _git(here, "rev-parse", "--short=12", "HEAD")
        return head + ("+changes" if _git(here, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def changed(before: dict[str, Any], now: dict[str, Any]) -> dict[str, list[Any]]:
    """section.key -> [before, now], of two recipes as nested dictionaries."""
    flat_before, flat_now = ({f"{section}.{key}": value for section, content in recipe.items()
                              for key, value in content.items()} for recipe in (before, now))
    keys = sorted(flat_before | flat_now)
    return {key: [flat_before.get(key), flat_now.get(key)] for key in keys if flat_before.get(key) != flat_now.get(key)}


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
