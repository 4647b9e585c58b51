"""Reads a checkpoint's tensors and runs none of its code: a checkpoint may come from a stranger.

PyTorch's checkpoint format keeps its table of contents, `.metadata`, as a pickle, and every value that is no tensor as
another. A pickle can call any function. The table is read here with an unpickler that knows the format's own names
alone, and values that are no tensors are refused: a trainer keeps its numbers as JSON in trainer.json.
"""

from __future__ import annotations

import io
import pickle
from enum import Enum
from pathlib import Path
from types import BuiltinFunctionType, FunctionType
from typing import Any, ClassVar, NoReturn

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

from phi1.train.runtime.launch import RunError
from phi1.user_files import read_file

_FORMAT = "torch.distributed.checkpoint"
_NAMES = {
    *((f"{_FORMAT}.metadata", name) for name in (
        "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "TensorStorageMetadata", "ChunkStorageMetadata",
        "BytesStorageMetadata", "_MEM_FORMAT_ENCODING")),
    (f"{_FORMAT}.filesystem", "_StorageInfo"), (f"{_FORMAT}.filesystem", "_StoragePrefix"),
    ("torch", "Size"), ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"), ("pathlib._local", "PosixPath"),
    *(("torch", name) for name in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "uint8", "bool")),
}
LARGEST = 64 << 20  # bytes of .metadata; phi-1's has 0.1 MB for each process that wrote it


def load_tensors(state: dict[str, Any], checkpoint: Path, **options: Any) -> None:
    """Fill the tensors of a nested dictionary with those of the same names in a checkpoint.

    Args:
        state: its tensors keep their memory and are written in place.
        checkpoint: its folder.
        options: for dcp.load, such as no_dist=True.

    Raises:
        RunError: `.metadata` names what the format has no use for, or holds something else than tensors where the state
            has them. dcp.load wraps it in a CheckpointException.
    """
    dcp.load(state, storage_reader=_Reader(checkpoint), planner=_Tensors(), **options)


class _Reader(dcp.FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self.path) / ".metadata"
        try:
            metadata = _Unpickler(io.BytesIO(read_file(path, LARGEST))).load()
        except OSError as error:
            raise RunError(f"{path}: {error.strerror}") from None
        except RunError:
            raise
        except Exception as error:  # a pickle that is cut or nonsense raises a dozen types
            raise RunError(f"{path} is no table of a checkpoint: {error}") from None
        if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
            raise RunError(f"{path} is no table of a checkpoint")
        for place in metadata.storage_data.values():
            if not isinstance(place, _StorageInfo) or Path(place.relative_path).name != place.relative_path:
                raise RunError(f"{path} names {place.relative_path!r:.100}, which is not one of the checkpoint's files")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Unpickler(pickle._Unpickler):  # type: ignore[name-defined]
    """Python's own unpickler and not C's, which allocates as many memo entries as a pickle says."""

    stack: list[Any]
    dispatch: ClassVar = dict(pickle._Unpickler.dispatch)  # type: ignore[attr-defined]

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _NAMES:
            raise RunError(f".metadata asks for {f'{module}.{name}'!r:.100}, which no checkpoint needs; it is not run")
        return super().find_class(module, name)

    def load_build(self) -> None:
        """Fill an object that the pickle has made, and nothing that others share: a class, a function, an Enum's value.

        A state that is no dictionary sets attributes by another way, unless the class takes it itself.
        """
        state, target = self.stack[-1], self.stack[-2]
        shared = isinstance(target, type | FunctionType | BuiltinFunctionType | Enum)
        if shared or not (isinstance(state, dict) or hasattr(target, "__setstate__")):
            raise RunError(".metadata sets attributes of what is no part of a checkpoint; it is not run")
        super().load_build()  # type: ignore[misc]

    dispatch[pickle.BUILD[0]] = load_build  # type: ignore[assignment]


class _Tensors(DefaultLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> NoReturn:
        raise RunError(f"{read_item.dest_index.fqn!r:.100} is no tensor but a pickle, which is not read")
