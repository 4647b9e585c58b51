"""phi-1 with fused Triton kernels: `phi1.load`, `phi1.generate`, `phi1.save`; the operations are in `phi1.kernels`.

The names below are imported on first use, so that `import phi1` costs neither torch nor Triton.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from phi1.config import PRESETS, Phi1Config, preset
    from phi1.generation import generate
    from phi1.integrations.attention import register_attention
    from phi1.integrations.patch import patch, patch_transformers, unpatch, unpatch_transformers
    from phi1.mixed_precision import WorkingCopies
    from phi1.model import Cache, Phi1
    from phi1.tokenizer import load_tokenizer
    from phi1.weights.huggingface import load, save

__version__ = "0.1.0"
_HOME = {
    "PRESETS": "config", "Phi1Config": "config", "preset": "config",
    "Cache": "model", "Phi1": "model",
    "generate": "generation",
    "patch": "integrations.patch", "patch_transformers": "integrations.patch", "unpatch": "integrations.patch",
    "unpatch_transformers": "integrations.patch", "register_attention": "integrations.attention",
    "load": "weights.huggingface", "save": "weights.huggingface",
    "load_tokenizer": "tokenizer",
    "WorkingCopies": "mixed_precision",
}
__all__ = ["PRESETS", "Cache", "Phi1", "Phi1Config", "WorkingCopies", "generate", "load", "load_tokenizer", "patch",
           "patch_transformers", "preset", "register_attention", "save", "unpatch", "unpatch_transformers"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'phi1' has no attribute {name!r}")
    import numpy  # noqa: F401  (before PyTorch, which imports it as well, but swallows a Ctrl-C that comes meanwhile)

    return getattr(importlib.import_module(f"phi1.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
