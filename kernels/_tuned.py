"""Tile shapes of the Triton kernels, read from the tables in `tuned/`; nothing is tuned at a user's first call.

`tuned/<op>.json` maps each kernel of the operation to a list of rows, {"gpu": ..., "when": {...}, "tile": {...}}. The
first row that fits is taken: its "gpu" is the device's name as torch.cuda.get_device_name gives it, or "any"; each name
under "when" is an exact value or a range [lowest, highest]. Measured rows stand above the rows for any GPU. So a GPU or
a shape that was not measured has the tile of the "any" row that holds its shape, chosen from compiled register counts.
"""

from __future__ import annotations

import json
from functools import lru_cache
from importlib.resources import files
from typing import Any

import torch


def tile(op: str, kernel: str, device: torch.device, **shape: int | str) -> dict[str, int]:
    """The tile of one kernel for a shape on a device, for example {"rows": 4, "num_warps": 4}.

    Raises:
        NotImplementedError: no row of the table holds this shape.
    """
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "none"
    return _first_fit(op, kernel, gpu, tuple(sorted(shape.items())))


@lru_cache(maxsize=1024)
def _first_fit(op: str, kernel: str, gpu: str, shape: tuple[tuple[str, int | str], ...]) -> dict[str, int]:
    for row in table(op)[kernel]:
        if row["gpu"] in (gpu, "any") and all(_fits(dict(shape)[name], rule) for name, rule in row["when"].items()):
            return row["tile"]
    what = ", ".join(f"{name} {value}" for name, value in shape)
    raise NotImplementedError(f"{op}: no tile for the {kernel} kernel at {what}; see kernels/tuned/{op}.json")


@lru_cache
def table(op: str) -> dict[str, list[dict[str, Any]]]:
    """The whole table of an operation, kernel by kernel."""
    return json.loads((files("phi1.kernels") / "tuned" / f"{op}.json").read_text())


def _fits(value: int | str, rule: Any) -> bool:
    return rule[0] <= value <= rule[1] if isinstance(rule, list) else value == rule
