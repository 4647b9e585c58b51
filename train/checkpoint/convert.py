"""Converts a checkpoint to a model in Hugging Face's layout, in one process, for any number that wrote it."""

from __future__ import annotations

import logging
import tomllib
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from phi1 import Phi1, Phi1Config
from phi1.train.checkpoint.files import Notes, checkpoints, find_damage
from phi1.train.checkpoint.reader import load_tensors
from phi1.train.runtime.all_ranks import attempt
from phi1.train.runtime.launch import RunError
from phi1.user_files import MIB, read_file


def read_weights(checkpoint: Path) -> tuple[dict[str, torch.Tensor], Phi1Config]:
    """Read the fp32 parameters and the model's configuration.

    Raises:
        RunError: the checkpoint is damaged, not there, or of a model that this version does not know.
    """
    try:
        return _read_weights(checkpoint)
    except (RunError, OSError):
        if checkpoint.is_dir():
            raise
    newer = checkpoints(checkpoint.parent)  # a run that continues replaces older checkpoints by newer ones
    raise RunError(f"checkpoint {checkpoint} is not there" + (f"; the newest is {newer[-1]}" if newer else ""))


def _read_weights(checkpoint: Path) -> tuple[dict[str, torch.Tensor], Phi1Config]:
    if damage := find_damage(checkpoint):
        raise RunError(f"checkpoint {checkpoint} is damaged: {damage}")
    shape = {key.removeprefix("model."): value for key, value in Notes(checkpoint)["defining"].items()
             if key.startswith("model.")}
    try:
        config = Phi1Config(**shape)
    except (TypeError, ValueError) as error:
        raise RunError(f"checkpoint {checkpoint}: this version of phi1 has no such model: {error}") from None
    weights = {name: torch.empty(tensor.shape, dtype=torch.float32)
               for name, tensor in Phi1(config, device="meta").state_dict().items()}
    before = logging.root.manager.disable
    logging.disable()  # hides tracebacks of an error that is reported below in one line
    try:
        with warnings.catch_warnings(action="ignore"):  # the warning that there is only one process
            problem, _ = attempt(lambda: load_tensors({"model": weights}, checkpoint, no_dist=True))
    finally:
        logging.disable(before)
    if problem:
        raise RunError(f"checkpoint {checkpoint} cannot be loaded: {problem}")
    return weights, config


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

    weights, config = read_weights(checkpoint)
    tokenizer = tokenizer or find_tokenizer(checkpoint)
    save_state_dict(weights, config, out, tokenizer=None if tokenizer is None else load_tokenizer(str(tokenizer)),
                    dtype=dtype, replace=False, card=card and card(config, Notes(checkpoint)["step"]))
    return config.num_parameters
