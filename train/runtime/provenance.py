"""The origin of a run's numbers besides its recipe and data: versions, commit, sources, CPU; changes of a recipe."""

from __future__ import annotations

import functools
import hashlib
import importlib
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("phi1", "torch", "triton", "numpy")
_MATMUL_FLAGS = re.compile(r"amx_.*|.*(bf16|fp16|vnni|i8mm)|sve.*")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages that decide a run's numbers."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """Return the commit of this package's checkout, with "+changes" if files differ; None if it is not in one."""
    here = Path(__file__).resolve().parent
    try:
        _git(here, "ls-files", "--error-unmatch", Path(__file__).name)  # fails in a repository around an installation
        head = _git(here, "rev-parse", "--short=12", "HEAD")
        return head + ("+changes" if _git(here, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


@functools.cache
def sources() -> str:
    """Return a hash of the code that decides a run's numbers: the model, the kernels and their tables, the trainer."""
    digest = hashlib.sha256()
    for module in map(importlib.import_module, ("phi1", "phi1.kernels", "phi1.train")):
        folder = Path(module.__path__[0])
        for path in sorted(path for pattern in ("**/*.py", "tuned/**/*.json") for path in folder.glob(pattern)):
            digest.update(f"{module.__name__}/{path.relative_to(folder)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


@functools.cache
def cpu() -> str:
    """Return the CPU's model and its instruction sets for matrix products, by which oneDNN chooses its kernels."""
    import torch  # only here, because the other functions work without it

    try:
        told = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        told = None
    capable: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # older versions do not say
    flags = sorted(name for name, value in capable.items() if value is True and _MATMUL_FLAGS.fullmatch(name))
    return " ".join([told[1] if told else platform.machine(), torch.backends.cpu.get_cpu_capability(), *flags])


def changed(before: dict[str, Any], now: dict[str, Any]) -> dict[str, list[Any]]:
    """Compare two recipes, given as nested dictionaries; returns section.key -> [before, now]."""
    flat_before, flat_now = ({f"{section}.{key}": value for section, content in config.items()
                              for key, value in content.items()} for config in (before, now))
    keys = sorted(flat_before | flat_now)
    return {key: [flat_before.get(key), flat_now.get(key)] for key in keys if flat_before.get(key) != flat_now.get(key)}


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()
