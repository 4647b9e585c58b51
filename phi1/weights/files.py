"""Model folders: find one or download it, list its weight files, and stream their tensors one by one."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from phi1 import user_files
from phi1.arguments import is_whole, listed, require, shown, user_path
from phi1.atomic import identity
from phi1.tokenizer import HUB_ID

WINDOW = 64 * 1024 * 1024
HEADER = 8 * user_files.MIB  # the largest header of a safetensors file; that of phi-1 has 32 kB
_SAFETENSORS, _PICKLED = ("model*.safetensors",), ("pytorch_model*.bin",)
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


def locate(name_or_folder: str | Path, revision: str | None = None) -> Path:
    """Return the folder or .gguf file itself, or the local copy of a Hugging Face Hub repository, downloaded if needed.

    Raises:
        TypeError, ValueError: the name is no path, or a folder has a revision.
        FileNotFoundError: there is neither; one line gives the reason.
    """
    folder = user_path("load", "name_or_folder", name_or_folder)
    if identity(folder) and folder.is_dir():
        require(revision is None, "load", "revision goes with a Hub id", f"{revision!r}, and {folder} is a folder")
        return folder
    if folder.exists():
        if folder.suffix == ".gguf":
            return folder
        raise FileNotFoundError(f"load: {folder} is a file; give the folder that holds config.json and the weights")
    name = os.fspath(name_or_folder)
    if not HUB_ID.fullmatch(name):
        raise FileNotFoundError(f"load: there is no folder {name}")
    return _download(name, revision)


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ("config.json", "generation_config.json", "*.index.json", "tokenizer*.json", "vocab.json",
                "merges.txt", "added_tokens.json")
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=[*patterns, *_SAFETENSORS]))
        if not any(folder.glob(_SAFETENSORS[0])):
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=[*patterns, *_PICKLED]))
    except Exception as error:  # errors of the Hub, its HTTP client and the system: a dozen types
        reason = " ".join(str(error).split())
        raise FileNotFoundError(f"load: there is no folder {name}, and the Hugging Face Hub did not give that model"
                                f"{f' at revision {revision}' if revision else ''}: {reason}") from error
    return folder


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, or holds no object.
    """
    try:
        value = user_files.read_json(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"load: {path} is missing") from None
    except OSError as error:
        raise ValueError(f"load: {path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"load: {path} is damaged or truncated: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"load: {path} must hold a JSON object; got {type(value).__name__}")
    return value


def read_end_ids(path: Path) -> tuple[int, ...]:
    """Return the ids of a generation_config.json that end a text; none if there is no such file or key."""
    given = read_json(path).get("eos_token_id") if path.is_file() else None
    ids = given if isinstance(given, list) else [] if given is None else [given]
    require(all(is_whole(i) and i >= 0 for i in ids), "load", f"{path}: eos_token_id must be an id or a list of ids",
            shown(given))
    return tuple(ids)


def weight_files(folder: Path) -> list[Path]:
    """Return the files that hold the tensors: safetensors before pickles, a single file before an index.

    Raises:
        FileNotFoundError: there is no such file, or the index names shards that are missing; all of them are listed.
        ValueError: the index is damaged.
    """
    for index_name, single in zip(_INDEXES, ("model.safetensors", "pytorch_model.bin"), strict=True):
        if (folder / single).is_file():
            return [folder / single]
        if (folder / index_name).is_file():
            return _shards(folder, index_name)
    raise FileNotFoundError(f"load: {folder} holds no weights; looked for model.safetensors, pytorch_model.bin, "
                            f"{' and '.join(_INDEXES)}")


def _shards(folder: Path, index_name: str) -> list[Path]:
    mapping = read_json(folder / index_name).get("weight_map")
    if not isinstance(mapping, dict) or not all(isinstance(name, str) for name in mapping.values()):
        raise ValueError(f"load: {folder / index_name} must map tensors to files under 'weight_map'")
    names = sorted(set(mapping.values()))
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise ValueError(f"load: {folder / index_name} must name files of its own folder; got "
                         f"{listed(map(repr, outside))}")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"load: {folder} lacks the shards {listed(missing)} that {index_name} names")
    return [folder / name for name in names]


def open_tensors(path: Path) -> dict[str, Tensor]:
    """Return the file's tensors by name, as views of the mapped file.

    Raises:
        ValueError: the file is damaged or truncated, or is a pickle that holds other things than tensors.
    """
    try:
        if path.suffix == ".safetensors":
            with user_files.open_regular(path) as file:
                begin = file.read(64)
            size = int.from_bytes(begin[:8], "little")
            require(size <= HEADER or bool(user_files.pretender(begin)), "its header",
                    f"must have at most {HEADER:,} bytes", size)
            return load_file(path)
        # Files from before PyTorch 1.6 are no zip archives and cannot be mapped.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (SafetensorError, RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
        with user_files.open_regular(path) as file:
            what = user_files.pretender(file.read(64))
        reason = [what] if what else str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"load: {path} is damaged, truncated or no file of tensors: {reason[0]}") from error
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ValueError(f"load: {path} must hold a dictionary of tensors and nothing else")
    return state


def stream(path: Path, names: list[str]) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) for the named tensors of one file. Each tensor is valid until the next one."""
    return _read(path, names) if path.suffix == ".safetensors" else _map(path, names)


def _read(path: Path, names: list[str]) -> Iterator[tuple[str, Tensor]]:
    """Read into one buffer, which is three times as fast as page faults on the mapped file."""
    described = open_tensors(path)  # checks the header; no data is read through it
    buffer = torch.empty(max(described[name].nbytes for name in names), dtype=torch.uint8)
    with path.open("rb", buffering=0) as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        for name in names:
            start, end = header[name]["data_offsets"]
            file.seek(8 + size + start)
            _fill(file, buffer[: end - start])
            yield name, buffer[: end - start].view(described[name].dtype).view(described[name].shape)


def _fill(file: io.FileIO, buffer: Tensor) -> None:
    view, done = buffer.numpy().data, 0
    while done < len(view):  # one read returns 2 GiB at most
        count = file.readinto(view[done:])
        if not count:
            raise ValueError(f"load: {file.name} is damaged, truncated: it ends within a tensor")
        done += count


def _map(path: Path, names: list[str]) -> Iterator[tuple[str, Tensor]]:
    """Yield views of the mapped file. Map it anew every WINDOW bytes, because pages that were read count as memory."""
    tensors, read = open_tensors(path), 0
    for name in names:
        if read >= WINDOW:
            tensors.clear()  # before the file is mapped again, so the process never holds two windows
            tensors, read = open_tensors(path), 0
        read += tensors[name].nbytes
        yield name, tensors.pop(name)
