"""Bytes of the tensors that a piece of code makes."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):
    """The most bytes that tensors made inside held at once, and those that they hold now; `given` are left out."""

    def __init__(self, given: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.seen = {x.untyped_storage().data_ptr() for x in given}
        self.held = self.most = 0

    @property
    def workspace(self) -> int:
        """The most bytes held on the way beyond those that are held now."""
        gc.collect()
        return self.most - self.held

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "phi1":  # what is made inside of it counts
            with self:
                return OPDEFS[f"phi1::{func._opname}"]._init_fn(*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in self.seen:
                self._hold(x.untyped_storage())
        return out

    def _hold(self, storage: torch.UntypedStorage) -> None:
        pointer, n_bytes = storage.data_ptr(), storage.nbytes()
        if not n_bytes:
            return
        self.seen.add(pointer)
        self.held += n_bytes
        weakref.finalize(storage, self._release, pointer, n_bytes)
        if self.held > self.most:
            gc.collect()  # the interpreter's frames hold their arguments in cycles
            self.most = max(self.most, self.held)

    def _release(self, pointer: int, n_bytes: int) -> None:
        self.seen.discard(pointer)
        self.held -= n_bytes
