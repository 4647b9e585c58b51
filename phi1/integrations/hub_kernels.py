"""`make hub-kernels`: attention, layer norm, linear cross-entropy and partial rotary embedding as one package.

The package is in the layout of Hugging Face's `kernels`, which loads it from a folder or the Hub. It needs PyTorch and
Triton alone: imports become relative, and the operators get a namespace of their own, so that the package and an
installed phi1 can be used in one process.

    OUT/README.md, LICENSE
    OUT/build/torch-universal/metadata.json
    OUT/build/torch-universal/phi1_kernels/       the rooms of phi1.kernels, and arguments.py
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import sys
from importlib.metadata import version
from pathlib import Path

from phi1 import arguments, kernels

NAME = "phi1_kernels"
PUBLIC = {"attention.attention": ("attention",), "core.backend": ("backend",), "core.philox": ("Dropout",),
          "cross_entropy.linear_cross_entropy": ("linear_cross_entropy",),
          "pointwise.layer_norm": ("add_layer_norm", "layer_norm"), "pointwise.rotary": ("rotary", "rotary_")}
_ROOMS = ("core", "pointwise", "attention", "cross_entropy")
_TABLES = ("attention", "layer_norm", "linear_cross_entropy", "rotary")
_IMPORT = re.compile(r"^( *)from phi1\.(?:kernels\.([\w.]+)|(arguments)) import ", re.MULTILINE)
_CARD = """---
library_name: kernels
license: mit
tags:
- kernels
---

# phi-1's operations

Attention (causal or not, packed or left-padded, with dropout), layer norm, linear cross-entropy without all logits, and
partial rotary embedding (NeoX style), each with its gradients. Triton kernels run on CUDA devices, and PyTorch code
elsewhere. Made by phi1 {version}.

```python
import torch
from kernels import get_local_kernel

phi1_kernels = get_local_kernel("path/of/this/folder")
x = torch.randn(4, 2048)
y = phi1_kernels.layer_norm(x, torch.ones(2048), torch.zeros(2048))
```

`help(phi1_kernels.attention)` and the other functions' docstrings give shapes and errors.
"""


def build(out: Path) -> Path:
    """Write the package.

    Args:
        out: a new or empty folder.

    Returns:
        The folder build/torch-universal in it.

    Raises:
        ValueError: out holds files.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"hub_kernels: out must be a new or empty folder; {out} is not")
    source = Path(kernels.__path__[0])
    files = {path.relative_to(source).as_posix(): path for room in _ROOMS for path in (source / room).glob("*.py")}
    texts = {name: path.read_text(encoding="utf-8") for name, path in files.items()}
    texts |= {f"tuned/{table}.json": (source / "tuned" / f"{table}.json").read_text(encoding="utf-8")
              for table in _TABLES}
    texts["arguments.py"] = Path(arguments.__file__).read_text(encoding="utf-8")
    digest = hashlib.sha256("".join(f"{name}\n{text}" for name, text in sorted(texts.items())).encode()).hexdigest()
    namespace = f"_{NAME}_{digest[:12]}"
    texts["__init__.py"] = _init()
    variant = out / "build" / "torch-universal"
    for name, text in texts.items():
        place = variant / NAME / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(_relocated(text, name, namespace) if name.endswith(".py") else text, encoding="utf-8")
    (variant / "metadata.json").write_text(json.dumps({
        "id": namespace, "name": NAME.replace("_", "-"), "version": 1, "license": "MIT", "python-depends": [],
        "backend": {"type": "cuda"}}, indent=1) + "\n", encoding="utf-8")
    (out / "README.md").write_text(_CARD.format(version=version("phi1")), encoding="utf-8")
    licence = Path(os.path.realpath(source)).parent / "LICENSE"
    if licence.is_file():  # it is in the checkout, and not beside an installed package
        shutil.copyfile(licence, out / "LICENSE")
    return variant


def _relocated(text: str, name: str, namespace: str) -> str:
    """Make imports relative to the file `name`, and give the operators another namespace."""
    dots = "." * (1 + name.count("/"))
    text = _IMPORT.sub(lambda found: f"{found[1]}from {dots}{found[2] or found[3]} import ", text)
    return text.replace('"phi1::', f'"{namespace}::').replace("torch.ops.phi1.", f"torch.ops.{namespace}.")


def _init() -> str:
    lines = ['"""phi-1\'s operations: Triton kernels on CUDA devices, PyTorch code elsewhere."""\n']
    lines += [f"from .{module} import {', '.join(names)}" for module, names in PUBLIC.items()]
    lines += ["from .core.backend import built_for_gpus, load_kernels\n", "if built_for_gpus():",
              "    load_kernels()\n",
              f"__all__ = {sorted(name for names in PUBLIC.values() for name in names)}\n"]
    return "\n".join(lines)


def main() -> int:
    """Run the script; returns the exit code."""
    parser = argparse.ArgumentParser(description="Build a package for Hugging Face's kernels.")
    parser.add_argument("--out", type=arguments.path_option, required=True, help="a new or empty folder")
    try:
        print(build(parser.parse_args().out))
    except (ValueError, OSError) as error:
        print(f"hub_kernels: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
