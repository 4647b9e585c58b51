"""What a run is made of besides its recipe and data: versions, commit, and what changed since it was last started."""

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
_OF_PRODUCTS = re.compile(r"amx_.*|.*(bf16|fp16|vnni|i8mm)|sve.*")


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


@functools.cache
def sources() -> str:
    """A hash of the code that a run's numbers come from: the model, the kernels and their tables, the trainer."""
    digest = hashlib.sha256()
    for module in map(importlib.import_module, ("phi1", "phi1.kernels", "phi1.train")):
        folder = Path(module.__path__[0])
        for path in sorted(path for pattern in ("**/*.py", "tuned/**/*.json") for path in folder.glob(pattern)):
            digest.update(f"{module.__name__}/{path.relative_to(folder)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


@functools.cache
def cpu() -> str:
    """The model of this machine's CPU, and which of those instructions it has that products are chosen by."""
    import torch  # only here: what says nothing of CPUs does without it

    try:
        told = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        told = None
    capable: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # older versions do not say
    flags = sorted(name for name, value in capable.items() if value is True and _OF_PRODUCTS.fullmatch(name))
    return " ".join([told[1] if told else platform.machine(), torch.backends.cpu.get_cpu_capability(), *flags])


def changed(before: dict[str, Any], now: dict[str, Any]) -> dict[str, list[Any]]:
    """section.key -> [before, now], of two recipes as nested dictionaries."""
    flat_before, flat_now = ({f"{section}.{key}": value for section, content in config.items()
                              for key, value in content.items()} for config in (before, now))
    keys = sorted(flat_before | flat_now)
    return {key: [flat_before.get(key), flat_now.get(key)] for key in keys if flat_before.get(key) != flat_now.get(key)}


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()
