"""Reads a checkpoint's tensors and runs none of its code: a checkpoint may come from a stranger.

PyTorch's checkpoint format keeps its table of contents, `.metadata`, as a pickle, and every value that is no tensor as
another. A pickle can call any function. The table is read here with an unpickler that knows the format's own names
alone, and values that are no tensors are refused: a trainer keeps its numbers as JSON in trainer.json.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo, _StoragePrefix
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem

from phi1.train.runtime.launch import RunError
from phi1.user_files import MIB, read_file

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
_RECORDS = (Metadata, MetadataIndex, StorageMeta, TensorStorageMetadata, ChunkStorageMetadata, BytesStorageMetadata,
            _StorageInfo, _StoragePrefix)
_OPCODES = (  # what Python writes for such a table, in protocols 2 to 5
    *(pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK, pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE),
    *(pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1, pickle.BINUNICODE, pickle.SHORT_BINUNICODE),
    *(pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3),
    *(pickle.EMPTY_LIST, pickle.APPEND, pickle.APPENDS, pickle.EMPTY_DICT, pickle.SETITEM, pickle.SETITEMS),
    *(pickle.BINGET, pickle.LONG_BINGET, pickle.BINPUT, pickle.LONG_BINPUT, pickle.MEMOIZE),
    *(pickle.GLOBAL, pickle.STACK_GLOBAL, pickle.REDUCE, pickle.NEWOBJ, pickle.BUILD),
)
LARGEST = 16 * MIB  # bytes of .metadata; phi-1's has 0.1 MB for each process that wrote it


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
        except (RunError, OSError):
            raise
        except Exception as error:  # a damaged pickle raises any kind
            raise RunError(f"{path} is no table of a checkpoint: {type(error).__name__} {error!s:.200}") from None
        if not isinstance(metadata, Metadata) or type(metadata.storage_data) is not dict:
            raise RunError(f"{path} is no table of a checkpoint")
        for place in metadata.storage_data.values():
            name = place.relative_path if isinstance(place, _StorageInfo) else ""
            if not isinstance(name, str) or not name or Path(name).name != name:
                raise RunError(f"{path} names {name!r:.100}, which is not one of the checkpoint's files")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Unpickler(pickle._Unpickler):
    """Reads the few operations and names that the table needs. In Python, because the one in C has a memo that grows
    with any index that the file gives, and sets attributes of classes for the whole process.
    """

    stack: list[Any]
    pop_mark: Callable[[], list[Any]]
    dispatch: ClassVar[dict[int, Any]] = {
        code[0]: pickle._Unpickler.dispatch[code[0]] for code in _OPCODES}

    def load(self) -> Any:
        try:
            return super().load()
        except KeyError as error:
            raise RunError(f".metadata has an operation that no checkpoint needs: {error}") from None

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _NAMES:
            raise RunError(f".metadata asks for {f'{module}.{name}'!r:.100}, which no checkpoint needs; it is not run")
        return super().find_class(module, name)

    def load_build(self) -> None:
        """Set the fields of a new object; a class or function, which the whole process shares, has none to set."""
        state, made = self.stack.pop(), self.stack[-1]
        if type(made) is TensorProperties and type(state) is tuple:
            made.__setstate__(state)
        elif type(made) in _RECORDS and type(state) is dict and state.keys() <= {each.name for each in fields(made)}:
            made.__dict__.update(state)
        else:
            raise RunError(f".metadata sets attributes of {_name(made)}, which no checkpoint needs")

    def load_setitem(self) -> None:
        self._put([self.stack.pop(-2), self.stack.pop()])

    def load_setitems(self) -> None:
        self._put(self.pop_mark())

    def _put(self, items: list[Any]) -> None:
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) is MetadataIndex:
                plain = type(key.fqn) is str and isinstance(key.offset, torch.Size | None) and \
                    isinstance(key.index, int | None)
            else:  # the hash of a tuple in a tuple in a tuple ... would overflow the stack of C
                plain = type(key) in (str, int)
            if not plain:
                raise RunError(f".metadata has a key of type {type(key).__name__}, which no checkpoint needs")
            self.stack[-1][key] = value

    dispatch |= {pickle.BUILD[0]: load_build, pickle.SETITEM[0]: load_setitem, pickle.SETITEMS[0]: load_setitems}


def _name(made: Any) -> str:
    return str(getattr(made, "__name__", type(made).__name__))


class _Tensors(DefaultLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> NoReturn:
        raise RunError(f"{read_item.dest_index.fqn!r:.100} is no tensor but a pickle, which is not read")
