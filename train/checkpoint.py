"""Save and load a trainer: parameters, optimizer, loss scaler and step, by torch.distributed.checkpoint.

Each process writes its shards into `.step-N.tmp`, forces them to the disk and hashes them; rank 0 adds the manifest and
renames. A process that dies at any moment leaves the earlier checkpoints as they were.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.tensor import DTensor

from phi1 import Phi1
from phi1.train.checkpoint_files import (
    STATE,
    checkpoint_name,
    checkpoints,
    commit,
    describe,
    prune,
    read_state,
    write_manifest,
)
from phi1.train.engine import all_sum
from phi1.train.launch import RunError
from phi1.train.step import Trainer

T = TypeVar("T")
# Metadata, manifest and rounding to blocks, beside the tensors' own bytes.
MARGIN = 1 << 20


def save_checkpoint(trainer: Trainer, folder: Path, facts: dict[str, Any], keep: int,
                    keep_every: int = 0) -> Path:
    """Collective: write `folder`/step-N and then remove all but the newest `keep` checkpoints.

    Args:
        trainer: at rest between two steps.
        folder: the run's checkpoints/, on a disk that all processes share.
        facts: JSON values to keep beside the tensors.
        keep: newest checkpoints to keep.
        keep_every: also keep those whose step is a multiple of this; 0 for none.

    Returns:
        The new checkpoint's folder.

    Raises:
        RunError: on every process, if it could not be written anywhere; earlier checkpoints are intact.
    """
    final = folder / checkpoint_name(trainer.finished)
    temporary = folder / f".{final.name}.tmp"
    state = _state(trainer)
    (needed,) = all_sum(_local_bytes(state))
    first = dist.get_rank() == 0
    notes = {"step": trainer.finished, "skipped": trainer.skipped, "scaler": trainer.scaler.state_dict()} | facts
    try:
        _together(lambda: _make_room(temporary, int(needed)) if first else None)
        _together(lambda: dcp.save(state, storage_writer=dcp.FileSystemWriter(temporary)))
        parts = _together(lambda: _describe_own(temporary, notes))
        files = {name: description for part in parts for name, description in part.items()}
        _together(lambda: _finish(temporary, final, files, keep, keep_every) if first else None)
    except _Failed as error:
        reason = _shortage(folder, int(needed)) or str(error)
        if first:
            shutil.rmtree(temporary, ignore_errors=True)
        intact = "; earlier checkpoints are intact" if checkpoints(folder) else ""
        raise RunError(f"checkpoint {final} could not be written: {reason}{intact}") from None
    return final


def load_checkpoint(trainer: Trainer, checkpoint: Path) -> dict[str, Any]:
    """Collective: bring a new trainer to a verified checkpoint's state, at any number of processes.

    Returns:
        The facts that were saved with it.

    Raises:
        RunError: it does not fit the trainer's model.
    """
    state = _state(trainer)
    try:
        dcp.load(state, storage_reader=dcp.FileSystemReader(checkpoint))
    except CheckpointException as error:
        raise RunError(f"checkpoint {checkpoint} cannot be loaded: {_innermost(error)}") from None
    set_state_dict(trainer.model, trainer.optimizer, model_state_dict=state["model"],
                   optim_state_dict=state["optimizer"])
    notes = read_state(checkpoint)
    if trainer.scaler.is_enabled() and notes["scaler"]:
        trainer.scaler.load_state_dict(notes["scaler"])
    trainer.finished, trainer.skipped = notes["step"], notes["skipped"]
    return notes


def gather_weights(model: Phi1) -> dict[str, Tensor]:
    """Collective: the whole fp32 parameters on rank 0's CPU; nothing on the other processes."""
    gathered = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return {name: tensor for name, tensor in gathered.items() if isinstance(tensor, Tensor)}


class _Failed(Exception):
    """Some process could not do its part; every process raises this with the same text."""


def _together(action: Callable[[], T]) -> list[T]:
    """Do `action` on every process; return all results, or raise on all if one has failed."""
    try:
        outcome: tuple[str | None, T | None] = (None, action())
    except (Exception, CheckpointException) as error:  # the latter derives from BaseException
        outcome = (_innermost(error), None)
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, outcome)
    for message, _ in outcomes:
        if message is not None:
            raise _Failed(message)
    return [result for _, result in outcomes]


def _innermost(error: BaseException) -> str:
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(f"{error}".split())[:200] or type(error).__name__


def _state(trainer: Trainer) -> dict[str, Any]:
    model, optimizer = get_state_dict(trainer.model, trainer.optimizer)
    return {"model": model, "optimizer": optimizer}


def _local_bytes(value: Any) -> int:
    if isinstance(value, dict):
        return sum(_local_bytes(item) for item in value.values())
    if isinstance(value, DTensor):
        value = value.to_local()
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0


def _make_room(temporary: Path, needed: int) -> None:
    """An empty folder on a disk with enough space."""
    temporary.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(temporary, ignore_errors=True)
    free = shutil.disk_usage(temporary.parent).free
    if free < needed + MARGIN:
        raise OSError("not enough disk space")
    temporary.mkdir()


def _shortage(folder: Path, needed: int) -> str:
    """What to say if the disk is full, which PyTorch's message does not; "" if it is not."""
    free, needed = shutil.disk_usage(folder if folder.exists() else folder.parent).free, needed + MARGIN
    if free >= needed:
        return ""
    return (f"no disk space: it takes {needed / 1e6:.1f} MB, {free / 1e6:.1f} MB are free; free "
            f"{(needed - free) / 1e6:.1f} MB more, or give another --run.folder")


def _describe_own(temporary: Path, notes: dict[str, Any]) -> dict[str, list[int | str]]:
    """Sizes and hashes of the files that this process wrote; rank 0 also writes the notes."""
    rank = dist.get_rank()
    own = list(temporary.glob(f"__{rank}_*.distcp"))
    if rank == 0:
        (temporary / STATE).write_text(json.dumps(notes, indent=1) + "\n", encoding="utf-8")
        own += [temporary / ".metadata", temporary / STATE]
    return {path.name: describe(path) for path in own}


def _finish(temporary: Path, final: Path, files: dict[str, list[int | str]], keep: int, keep_every: int) -> None:
    write_manifest(temporary, files)
    commit(temporary, final)
    prune(final.parent, keep, keep_every)
