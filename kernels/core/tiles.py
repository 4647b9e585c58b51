"""Tile shapes of the Triton kernels, read from the tables in `tuned/`; nothing is tuned at a user's first call.

`tuned/<op>.json` maps each kernel of the operation to a list of rows, {"gpu": ..., "when": {...}, "tile": {...}}. The
first row that fits is taken. Its "gpu" is an architecture ("sm_80", "sm_90", "sm_100", "gfx942") or "any"; each name
under "when" has an exact value or a range [lowest, highest]. Rows of an architecture stand above the rows for any GPU,
whose tiles need at most 64 KiB of shared memory. `architecture` says which rows a GPU takes. These tiles were chosen
from compiled register counts.

`tuned/gpus/<name>.json` holds the rows measured on one GPU, by operation and kernel. They come before the rows above,
and their "gpu" is not compared. `phi1 tune` writes the file, by means of `recorded` and `forced`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Any

import torch

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
# The newest first: (lowest compute capability, bytes of shared memory that a program may use).
NVIDIA = {"sm_100": ((10, 0), 232_448), "sm_90": ((9, 0), 232_448), "sm_80": ((8, 0), 166_912)}
Value = int | str | bool
_PACKAGE = __name__.removesuffix(".core.tiles")


@dataclass(frozen=True)
class Lookup:
    """One lookup in the tables."""

    op: str
    kernel: str
    shape: tuple[tuple[str, Value], ...]


TILES: dict[tuple[str, str], list[dict[str, int]]] = {}
"""(operation, kernel) -> the tiles that `phi1 tune` may try. Each file of kernels adds its own when it is imported."""
_forced: dict[tuple[str, str], dict[str, int]] = {}
_record: list[Lookup] | None = None


def tile(op: str, kernel: str, device: torch.device, **shape: Value) -> dict[str, int]:
    """Return the tile of one kernel for a shape on a device, for example {"rows": 4, "num_warps": 4}.

    Raises:
        NotImplementedError: no row of the table fits this shape.
    """
    if _record is not None:
        _record.append(Lookup(op, kernel, tuple(sorted(shape.items()))))
    if _forced and (op, kernel) in _forced:
        return _forced[op, kernel]
    return first_fit(op, kernel, gpu_name(device), architecture(device), tuple(sorted(shape.items())))["tile"]


def tile_for(op: str, kernel: str, arch: str, **shape: Value) -> dict[str, int]:
    """Return the tile for an architecture, without a GPU of it. Measured rows of single GPUs are not used."""
    if (op, kernel) in _forced:
        return _forced[op, kernel]
    return first_fit(op, kernel, "", arch, tuple(sorted(shape.items())))["tile"]


@contextmanager
def forced(op: str, kernel: str, tile: Mapping[str, int]) -> Iterator[None]:
    """Give one kernel this tile for every shape inside the block, in this process."""
    before = dict(_forced)
    _forced[op, kernel] = dict(tile)
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


@contextmanager
def recorded() -> Iterator[list[Lookup]]:
    """Record every lookup inside the block, in order."""
    global _record
    before, _record = _record, []
    try:
        yield _record
    finally:
        _record = before


@lru_cache
def architecture(device: torch.device) -> str:
    """Return the architecture whose rows a device takes: one of ARCHITECTURES, or "any".

    An NVIDIA GPU takes the rows of the newest architecture that is not newer than itself: 8.7 takes those of sm_80;
    10.1, 10.3 and 11.0 take those of sm_100. It takes "any" if it has less shared memory than that architecture (8.6,
    8.9 and 12.x have 99 KiB a program) or is older than sm_80. Every AMD gfx9 takes the rows of gfx942, because it has
    at least 64 KiB.
    """
    if device.type != "cuda":
        return "any"
    if torch.version.hip:
        return "gfx942" if torch.cuda.get_device_properties(device).gcnArchName.startswith("gfx9") else "any"
    gpu: Any = torch.cuda.get_device_properties(device)  # PyTorch does not type all fields
    for arch, (oldest, shared) in NVIDIA.items():
        if (gpu.major, gpu.minor) >= oldest:
            return arch if gpu.shared_memory_per_block_optin >= shared else "any"
    return "any"


def gpu_file(name: str) -> str:
    """Return the file name under tuned/gpus/: "NVIDIA H100 80GB HBM3" -> "nvidia-h100-80gb-hbm3.json"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") + ".json"


@lru_cache
def table(op: str) -> dict[str, list[dict[str, Any]]]:
    """Return an operation's table: kernel -> rows."""
    return json.loads((files(_PACKAGE) / "tuned" / f"{op}.json").read_text())


@lru_cache
def measured(gpu: str) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Return the rows measured on a GPU: operation -> kernel -> rows. Empty if none were."""
    path = files(_PACKAGE) / "tuned" / "gpus" / gpu_file(gpu)
    return json.loads(path.read_text()) if gpu and path.is_file() else {}


@lru_cache
def gpu_name(device: torch.device) -> str:
    """Return the GPU's name as its driver gives it, "" for a CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


@lru_cache(maxsize=1024)
def first_fit(op: str, kernel: str, gpu: str, arch: str, shape: tuple[tuple[str, Value], ...]) -> dict[str, Any]:
    """Return the row that a GPU of this name and architecture takes for a shape.

    Raises:
        NotImplementedError: no row fits.
    """
    rows = measured(gpu).get(op, {}).get(kernel, [])
    rows = rows + [row for row in table(op)[kernel] if row["gpu"] in (arch, "any")]
    for row in rows:
        if fits(shape, row["when"]):
            return row
    what = ", ".join(f"{name} {value}" for name, value in shape)
    raise NotImplementedError(f"{op}: no tile for the {kernel} kernel at {what}; see kernels/tuned/{op}.json")


def fits(shape: tuple[tuple[str, Value], ...], when: Mapping[str, Any]) -> bool:
    """True where a row is for a shape."""
    sizes = dict(shape)
    return all(rule[0] <= sizes[name] <= rule[1] if isinstance(rule, list) else sizes[name] == rule
               for name, rule in when.items())
