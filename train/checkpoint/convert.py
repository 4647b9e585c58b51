"""Converts a checkpoint to a model in Hugging Face's layout, in one process, for any number that wrote it."""

from __future__ import annotations

import json
import logging
import tomllib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from phi1 import Phi1, Phi1Config
from phi1.train.checkpoint.files import Notes, checkpoints, find_damage
from phi1.train.checkpoint.reader import load_tensors
from phi1.train.recipe.recipe import LORA
from phi1.train.runtime.adapters import MODULES, shapes, updates
from phi1.train.runtime.all_ranks import attempt
from phi1.train.runtime.launch import RunError
from phi1.user_files import MIB, read_file


@dataclass(frozen=True)
class Stored:
    """The contents of a checkpoint that make a model."""

    weights: dict[str, torch.Tensor]
    """fp32 parameters, adapters apart."""
    config: Phi1Config
    notes: Notes
    lora: tuple[int, float] | None
    """Rank and alpha of the adapters, if there are any."""

    def merged(self) -> dict[str, torch.Tensor]:
        """Return the parameters of a plain model: adapters are added, in place, to the weights that they update."""
        if self.lora:
            rank, alpha = self.lora
            for layer in range(self.config.num_hidden_layers):
                adapters = {name: self.weights.pop(f"blocks.{layer}.lora.{name}") for name in shapes(self.config, rank)}
                for module, added in updates(adapters, alpha / rank).items():
                    self.weights[f"blocks.{layer}.{module}.weight"] += added
        return self.weights


def read_weights(checkpoint: Path) -> tuple[dict[str, torch.Tensor], Phi1Config]:
    """Read the fp32 parameters of a plain model, and its configuration.

    Raises:
        RunError: as `read_stored`.
    """
    stored = read_stored(checkpoint)
    return stored.merged(), stored.config


def read_stored(checkpoint: Path) -> Stored:
    """Read a checkpoint at once: a run that continues may remove it at any time.

    Raises:
        RunError: the checkpoint is damaged, not there, or of a model that this version does not know.
    """
    try:
        return _read(checkpoint)
    except (RunError, OSError):
        if checkpoint.is_dir():
            raise
    newer = checkpoints(checkpoint.parent)  # a run that continues replaces older checkpoints by newer ones
    raise RunError(f"checkpoint {checkpoint} is not there" + (f"; the newest is {newer[-1]}" if newer else ""))


def _read(checkpoint: Path) -> Stored:
    if damage := find_damage(checkpoint):
        raise RunError(f"checkpoint {checkpoint} is damaged: {damage}")
    notes = Notes(checkpoint)
    shape = {key.removeprefix("model."): value for key, value in notes["defining"].items() if key.startswith("model.")}
    rank, alpha = (shape.pop(key, 0) for key in LORA)
    try:
        config = Phi1Config(**shape)
    except (TypeError, ValueError) as error:
        raise RunError(f"checkpoint {checkpoint}: this version of phi1 has no such model: {error}") from None
    weights = {name: torch.empty(tensor.shape, dtype=torch.float32)
               for name, tensor in Phi1(config, device="meta").state_dict().items()}
    weights |= {f"blocks.{layer}.lora.{name}": torch.empty(shape)
                for layer in range(config.num_hidden_layers if rank else 0)
                for name, shape in shapes(config, rank).items()}
    before = logging.root.manager.disable
    logging.disable()  # hides tracebacks of an error that is reported below in one line
    try:
        with warnings.catch_warnings(action="ignore"):  # the warning that there is only one process
            problem, _ = attempt(lambda: load_tensors({"model": weights}, checkpoint, no_dist=True))
    finally:
        logging.disable(before)
    if problem:
        raise RunError(f"checkpoint {checkpoint} cannot be loaded: {problem}")
    return Stored(weights, config, notes, (rank, alpha) if rank else None)


def find_tokenizer(checkpoint: Path) -> Path | None:
    """Find the tokenizer of the corpus in the run's config.toml, or of the run's export; None if neither is there."""
    run = checkpoint.resolve().parent.parent
    places = [run / "export"]
    try:
        corpus = tomllib.loads(read_file(run / "config.toml", MIB).decode())["data"]["folder"]
        places.insert(0, Path(corpus) / "tokenizer")
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    return next((place for place in places if (place / "tokenizer.json").is_file()), None)


def convert(checkpoint: Path, out: Path, tokenizer: str | Path | None, dtype: str | None,
            card: Callable[[Phi1Config, int], str] | None = None) -> int:
    """Write `out`; returns the number of parameters.

    Args:
        checkpoint: step-N of a run.
        out: a new or empty folder.
        tokenizer: a folder or Hub id; by default the run's own, if it is found.
        dtype: "float16", "bfloat16" or "float32"; by default float32, as in the run.
        card: makes the README.md of a model and the step of the checkpoint.

    Raises:
        RunError: as `read_weights`.
        ValueError, OSError: as `phi1.save`.
    """
    from phi1.tokenizer import load_tokenizer
    from phi1.weights.huggingface import save_state_dict

    stored = read_stored(checkpoint)
    config = stored.config
    tokenizer = tokenizer or find_tokenizer(checkpoint)
    save_state_dict(stored.merged(), config, out, dtype=dtype, replace=False,
                    tokenizer=None if tokenizer is None else load_tokenizer(str(tokenizer)),
                    card=card and card(config, stored.notes["step"]))
    return config.num_parameters


def convert_adapter(checkpoint: Path, out: Path) -> int:
    """Write the adapters of a checkpoint as peft stores them, for transformers' model; returns their parameters.

    Args:
        checkpoint: step-N of a run with model.lora_rank.
        out: a new or empty folder.

    Raises:
        RunError: as `read_weights`, or the run has no adapters.
        ValueError, OSError: as `phi1.save`.
    """
    from safetensors.torch import save_file

    from phi1.weights.folder import filled

    stored = read_stored(checkpoint)
    weights, config, lora = stored.weights, stored.config, stored.lora
    if lora is None:
        raise RunError(f"checkpoint {checkpoint} has no adapters: its run had no model.lora_rank")
    rank, alpha = lora
    tensors = {f"base_model.model.model.layers.{layer}.{module}.lora_{part.upper()}.weight":
               weights[f"blocks.{layer}.lora.{name}_{part}"]
               for layer in range(config.num_hidden_layers) for name, module in MODULES.items() for part in "ab"}
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": alpha, "lora_dropout": 0.0,
                "bias": "none", "target_modules": [module.split(".")[1] for module in MODULES.values()],
                "base_model_name_or_path": stored.notes["recipe"]["model"].get("init"), "inference_mode": True}
    with filled(out, replace=False) as folder:
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return sum(tensor.numel() for tensor in tensors.values())
