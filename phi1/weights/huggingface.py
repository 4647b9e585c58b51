"""Load phi-1 from any published layout, and save it in the current Hugging Face one.

`phi1/weights/layouts.py` has the names and layouts, `phi1/weights/files.py` the files. Loading needs memory for the
model and one tensor; no parameter exists twice.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from phi1.arguments import check_flag, check_instance, check_text, check_whole, listed, shown, user_path
from phi1.atomic import read_unreplaced
from phi1.config import Phi1Config
from phi1.kernels.core.checks import check_device_option, check_tensors
from phi1.model import Phi1
from phi1.tokenizer import Tokenizer
from phi1.tokenizer_rules import check_tokenizer
from phi1.weights.files import locate, open_tensors, read_end_ids, read_json, stream, weight_files
from phi1.weights.folder import filled
from phi1.weights.gguf_file import read_gguf
from phi1.weights.layouts import (
    LAYOUTS,
    WRITTEN,
    ParameterSlice,
    is_derived,
    misfits,
    parameter_slices,
    read_config,
    recognise,
    written_config,
)

_DTYPES = {
    "float16": torch.float16, "fp16": torch.float16, "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
    "float32": torch.float32, "fp32": torch.float32,
}
_WRAPPERS = {"_orig_mod.": "torch.compile", "module.": "DataParallel or DistributedDataParallel"}
_ENDOFTEXT = 50256  # of phi-1's tokenizer


def load(name_or_folder: str | Path, *, device: torch.device | str | None = None,
         dtype: torch.dtype | str | None = None, revision: str | None = None) -> Phi1:
    """Load a model from a folder or from the Hugging Face Hub, in eval mode.

    If the folder is replaced while it is read, it is read once more. The result is one model or an error, no mixture.

    Args:
        name_or_folder: a folder with config.json and weights (safetensors or pytorch_model.bin, in one file or in
            shards; any of the four published layouts), a .gguf file (F16, Q8_0), or a Hub id such as "microsoft/phi-1".
        device: the parameters' device; by default the CUDA device if there is one, else the CPU.
        dtype: the parameters' dtype, a torch dtype or "float16", "bfloat16", "float32"; by default the file's.
        revision: branch, tag or commit of the Hub repository.

    Returns:
        The model. Its `end_ids` are the eos_token_id of generation_config.json, one or several. Nothing else in that
        file is read: `generate` takes its options from its arguments, and repeats, forces or forbids no token.

    Raises:
        TypeError: an argument has another type.
        FileNotFoundError: no such folder or Hub model, no weights in it, or shards missing.
        ValueError: a damaged file, another architecture, tensors that do not fit the configuration (the message names
            the missing, the unexpected and the misshapen, ten of each), or a folder that is replaced in both reads.
        NotImplementedError: a variant of the architecture that phi-1 does not use.
    """
    target_dtype = None if dtype is None else _as_dtype("load", dtype)
    target_device = _as_device(device)
    if revision is not None:
        check_text("load", revision=revision)
    folder = locate(name_or_folder, revision)
    return read_unreplaced("load", folder, lambda: _read(folder, target_device, target_dtype))


def _read(folder: Path, device: torch.device, dtype: torch.dtype | None) -> Phi1:
    if folder.is_file():
        config, file_dtype, tensors, end_ids = read_gguf(folder)
    else:
        config = config_of(folder / "config.json")
        table, homes, file_dtype = _survey(folder, config)
        tensors = ((table[name], tensor) for path, names in homes.items() for name, tensor in stream(path, names))
        end_ids = read_end_ids(folder / "generation_config.json")
    model = Phi1(config, device="meta", dtype=dtype or file_dtype)
    model.to_empty(device=device)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for part, tensor in tensors:
            part.fill(parameters[part.parameter], tensor)
    model.init_tables()
    model.end_ids = end_ids
    return model.eval()


def _as_dtype(caller: str, dtype: torch.dtype | str) -> torch.dtype:
    check_instance(caller, "dtype", dtype, (str, torch.dtype), "a torch.dtype or its name")
    found = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or found not in _DTYPES.values():
        raise ValueError(f"{caller}: dtype must be one of {', '.join(_DTYPES)}; got {dtype}")
    return found


def _as_device(device: torch.device | str | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check_device_option("load", device)
    return torch.device(device)


def config_of(path: Path) -> Phi1Config:
    """Read a config.json of any published layout. Raises as `load`."""
    raw = read_json(path)
    try:
        return read_config(raw)
    except NotImplementedError as error:
        raise NotImplementedError(f"load: {path}: {error}") from error
    except (ValueError, TypeError, OverflowError) as error:
        if str(error).startswith("load: "):
            raise
        raise ValueError(f"load: {path}: {error}") from error


def _survey(folder: Path, config: Phi1Config) -> tuple[dict[str, ParameterSlice], dict[Path, list[str]], torch.dtype]:
    """Check every tensor before one is copied. Return the slices, the names of each file and the embedding's dtype."""
    found: dict[str, tuple[Path, tuple[int, ...], torch.dtype]] = {}
    for path in weight_files(folder):
        for name, tensor in open_tensors(path).items():
            if not is_derived(name):
                found[name] = (path, tuple(tensor.shape), tensor.dtype)
    table = recognise(found, config)
    wrapper = next((prefix for prefix in _WRAPPERS if found and all(name.startswith(prefix) for name in found)), None)
    if wrapper:
        raise ValueError(f"load: every tensor in {folder} is called {wrapper}..., by the wrapper of "
                         f"{_WRAPPERS[wrapper]}; save the model inside the wrapper, or take the prefix off")
    if table is None:
        raise ValueError(f"load: {folder} holds no phi-1 in any of the published layouts ({'; '.join(LAYOUTS)}); "
                         f"its tensors are called {', '.join(list(found)[:3]) or 'nothing: there are none'}")
    problems = misfits({name: part.shape for name, part in table.items()},
                       {name: shape for name, (_, shape, _) in found.items()})
    integers = [f"{name} ({dtype})" for name, (_, _, dtype) in found.items()
                if name in table and not dtype.is_floating_point]
    if integers:
        problems.append(f"not floating point: {listed(integers)}")
    if problems:
        raise ValueError(f"load: the tensors in {folder} are not those of its config.json; {'; '.join(problems)}")
    homes: dict[Path, list[str]] = {}
    for name, (path, _, _) in found.items():
        homes.setdefault(path, []).append(name)
    return table, homes, found[next(iter(table))][2]


def save(model: Phi1, folder: str | Path, *, tokenizer: Tokenizer | None = None,
         max_shard_bytes: int = 5_000_000_000, replace: bool = True) -> None:
    """Write the model in the current Hugging Face layout, which `phi1.load` and transformers read.

    Args:
        model: any dtype, any device; compiled or wrapped in DataParallel as well. Parameters that share memory are
            written apart.
        folder: made, with its parents. If it exists, it must be empty or hold only a saved model, which is replaced.
            After a stop or kill at any moment the folder holds either the old model or the new one, never a mixture. If
            a kill comes between the two renames, the next save to the folder puts the old one back.
        tokenizer: saved beside the model, and its end-of-text id goes into the configuration.
        max_shard_bytes: the largest size of one file; more tensors go into several files, with an index.
        replace: if False, the folder must be new or empty, now and at the end.

    Raises:
        TypeError: an argument has another type.
        ValueError: the folder holds other files, or got some meanwhile.
        OSError: no space or no permission; nothing is left behind, and an old model stays in place.
    """
    inside: object = model
    while not isinstance(inside, Phi1):
        inner = getattr(inside, "_orig_mod", None) or getattr(inside, "module", None)
        if not isinstance(inner, torch.nn.Module):
            raise TypeError(f"save: model must be a phi1.Phi1; got {shown(model)}")
        inside = inner
    _save(inside.state_dict(), inside.config, folder, tokenizer, None, max_shard_bytes, replace, inside.end_ids, None)


def save_state_dict(state: Mapping[str, Tensor], config: Phi1Config, folder: str | Path, *,
                    tokenizer: Tokenizer | None = None, dtype: torch.dtype | str | None = None,
                    max_shard_bytes: int = 5_000_000_000, replace: bool = True, card: str | None = None) -> None:
    """Save a plain state dict of whole tensors, such as one gathered from a sharded model.

    Args:
        state: `Phi1.state_dict()`'s names and shapes.
        config: the model's configuration.
        folder, tokenizer, max_shard_bytes, replace: as in `save`.
        dtype: dtype of the saved tensors; by default that of each tensor.
        card: text of a README.md; with it, SHA256SUMS is written too.

    Raises:
        ValueError: as in `save`, or names or shapes that are not the model's; the message names them.
        OSError: as in `save`.
    """
    _save(state, config, folder, tokenizer, dtype, max_shard_bytes, replace, (), card)


def _save(state: Mapping[str, Tensor], config: Phi1Config, folder: str | Path, tokenizer: Tokenizer | None,
          dtype: torch.dtype | str | None, max_shard_bytes: int, replace: bool, end_ids: tuple[int, ...],
          card: str | None) -> None:
    target = user_path("save", "folder", folder)
    check_instance("save", "config", config, Phi1Config, "a phi1.Phi1Config")
    check_instance("save", "state", state, Mapping, "a dictionary of tensors")
    check_tensors("save", **{f"state[{name!r}]": tensor for name, tensor in state.items()})
    if tokenizer is not None:
        check_tokenizer("save", tokenizer, "eos_id", "save")
    check_whole("save", low=1, max_shard_bytes=max_shard_bytes)
    check_flag("save", replace=replace)
    if card is not None:
        check_text("save", card=card)
    expected = {name: tuple(tensor.shape) for name, tensor in Phi1(config, device="meta").state_dict().items()}
    problems = misfits(expected, {name: tuple(tensor.shape) for name, tensor in state.items()})
    if problems:
        raise ValueError(f"save: the state dict does not fit the configuration; {'; '.join(problems)}")
    target_dtype = state["embed.weight"].dtype if dtype is None else _as_dtype("save", dtype)
    cast = None if dtype is None else target_dtype
    with filled(target, replace, card) as temporary:
        _write_tensors(state, config, temporary, cast, max_shard_bytes)
        _write_configs(config, temporary, tokenizer, end_ids, str(target_dtype).removeprefix("torch."))
        if tokenizer is not None:
            tokenizer.save(temporary)


def _write_configs(config: Phi1Config, folder: Path, tokenizer: Tokenizer | None, end_ids: tuple[int, ...],
                   dtype: str) -> None:
    eos_id = _ENDOFTEXT if config.vocab_size > _ENDOFTEXT else None
    if tokenizer is not None:
        eos_id = tokenizer.eos_id
    _write_json(folder / "config.json", written_config(config, eos_id, dtype))
    ends = list(dict.fromkeys(i for i in (eos_id, *end_ids) if i is not None))
    _write_json(folder / "generation_config.json", {"_from_model_config": True, "bos_token_id": eos_id,
                                                    "eos_token_id": ends if len(ends) > 1 else next(iter(ends), None)})


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _write_tensors(state: Mapping[str, Tensor], config: Phi1Config, folder: Path, cast: torch.dtype | None,
                   max_shard_bytes: int) -> None:
    table = parameter_slices(LAYOUTS[WRITTEN], config)
    sizes = {name: state[part.parameter][part.index].numel() * (cast or state[part.parameter].dtype).itemsize
             for name, part in table.items()}
    free = shutil.disk_usage(folder).free
    if sum(sizes.values()) > free:
        raise OSError(f"save: the model needs {sum(sizes.values()) / 1e9:.2f} GB at {folder.parents[1]}; "
                      f"{free / 1e9:.2f} GB are free")
    shards = list(_shards(sizes, max_shard_bytes))
    weight_map = {}
    for i, names in enumerate(shards):
        file = "model.safetensors" if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        tensors: dict[str, Tensor] = {}
        for name in names:
            tensor = _published(state, table[name], cast)
            shared = any(tensor.data_ptr() == other.data_ptr() for other in tensors.values())
            tensors[name] = tensor.clone() if shared else tensor
        try:
            save_file(tensors, folder / file, metadata={"format": "pt"})
        except Exception as error:  # safetensors reports the system's errors under a type of its own
            raise OSError(f"save: {folder / file} could not be written: {error}") from error
        weight_map.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        _write_json(folder / "model.safetensors.index.json",
                    {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map})


def _published(state: Mapping[str, Tensor], part: ParameterSlice, cast: torch.dtype | None) -> Tensor:
    return state[part.parameter].detach()[part.index].to("cpu", cast or state[part.parameter].dtype).contiguous()


def _shards(sizes: Mapping[str, int], limit: int) -> Iterator[list[str]]:
    """Yield groups of consecutive names that fit the limit; a tensor beyond the limit is a group of its own."""
    names: list[str] = []
    held = 0
    for name, size in sizes.items():
        if names and held + size > limit:
            yield names
            names, held = [], 0
        names.append(name)
        held += size
    yield names
