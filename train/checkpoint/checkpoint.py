"""Save and load a trainer: parameters, optimizer, loss scaler and step, by torch.distributed.checkpoint.

The state is copied, and the training goes on while each process writes its shards into `.step-N.X.tmp`, forces them to
the disk and hashes them; when all have, rank 0 adds the manifest and renames. A process that dies at any moment leaves
the earlier checkpoints as they were.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor

from phi1 import Phi1
from phi1.train.checkpoint.files import (
    STATE,
    Notes,
    checkpoint_name,
    checkpoints,
    commit,
    describe,
    prune,
    step_of,
)
from phi1.train.runtime.all_ranks import Failed, all_ranks, attempt, fail, reason_of
from phi1.train.runtime.engine import PATIENCE, all_sum, gather
from phi1.train.runtime.launch import RunError
from phi1.train.step.trainer import Trainer

# Metadata, manifest and rounding to blocks, beside the tensors' own bytes.
MARGIN = 1 << 20


class Saver:
    """Writes checkpoints while the training goes on: one at a time, each committed when all processes have written.

    Args:
        folder: the run's checkpoints/, on a disk that all processes share.
        keep: newest checkpoints to keep.
        keep_every: also keep those whose step is a multiple of this; 0 for none.
    """

    def __init__(self, folder: Path, keep: int, keep_every: int = 0) -> None:
        self.folder, self.keep, self.keep_every = folder, keep, keep_every
        # A group of its own: its collectives run in another thread, beside the training's.
        self._group = dist.new_group(backend="gloo", timeout=PATIENCE) if dist.get_world_size() > 1 else None
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._flying: _Flying | None = None

    @property
    def in_flight(self) -> bool:
        """Whether a checkpoint has been begun and neither committed nor given up; the same on every process."""
        return self._flying is not None

    def writes(self) -> bool:
        """Whether this process still writes."""
        return self._flying is not None and not self._flying.job.done()

    def begin(self, trainer: Trainer, facts: dict[str, Any]) -> None:
        """Collective: copy the state of a trainer that rests between two steps, and begin to write it.

        Args:
            trainer: it may go on when this returns.
            facts: JSON values to keep beside the tensors; the checkpoint of the step of "best" is kept as well.

        Raises:
            RunError: on every process, if there is no space, or no folder can be made.
        """
        assert not self.in_flight, "one checkpoint at a time"
        began = time.perf_counter()
        final = self.folder / checkpoint_name(trainer.finished)
        # A name of this save alone: a worker of the attempt before may still be writing the same step.
        temporary = final.with_name(f".{final.name}.{all_ranks(lambda: secrets.token_hex(4))[0]}.tmp")
        state = _state(trainer)
        (held,) = all_sum(_local_bytes(state))
        notes = _counts(trainer) | facts
        best = facts["best"]["step"] if "best" in facts else None
        # A shard that several processes hold is written by one of them.
        flying = _Flying(final, temporary, int(held / trainer.engine.replicas), began, best)
        writer = dcp.FileSystemWriter(temporary)
        try:
            all_ranks(lambda: _make_room(temporary, flying.needed) if dist.get_rank() == 0 else None)
            (copied,) = all_ranks(lambda: self._copy(state, writer), keep=True)
        except Failed as error:
            raise self._given_up(flying, error) from None
        flying.job = self._pool.submit(attempt, lambda: self._write(copied, writer, notes))
        flying.stall = time.perf_counter() - began
        self._flying = flying

    def finish(self) -> Saved:
        """Collective: wait until every process has written, and give the checkpoint its name.

        Raises:
            RunError: on every process, if it could not be written anywhere; earlier checkpoints are intact.
        """
        assert self._flying is not None
        flying, self._flying = self._flying, None
        began = time.perf_counter()
        error, files = flying.job.result()
        try:
            parts = all_ranks(lambda: fail(error) if error else files)
            listed = {name: description for part in parts for name, description in (part or {}).items()}
            all_ranks(lambda: self._commit(flying, listed) if dist.get_rank() == 0 else None)
        except Failed as failure:
            raise self._given_up(flying, failure) from None
        now = time.perf_counter()
        return Saved(flying.final, step_of(flying.final), flying.needed, flying.stall + now - began, now - flying.began)

    def _copy(self, state: dict[str, Any], writer: dcp.FileSystemWriter) -> dict[str, Any]:
        """The state in this process's memory, with a thread that waits to write it.

        dcp.async_save does both and begins its collectives at once: where memory or threads lack on one process alone,
        the others would be left in them, and the next save would read their messages.
        """
        self._pool.submit(int).result()
        return writer.stage(state)

    def _write(self, copied: dict[str, Any], writer: dcp.FileSystemWriter,
               notes: dict[str, Any]) -> dict[str, list[int | str]]:
        dcp.save(copied, storage_writer=writer, process_group=self._group)
        return _describe_own(Path(writer.path), notes)

    def _commit(self, flying: _Flying, files: dict[str, list[int | str]]) -> None:
        commit(flying.temporary, flying.final, files)
        prune(self.folder, self.keep, self.keep_every, flying.best)

    def _given_up(self, flying: _Flying, error: Failed) -> RunError:
        reason = _shortage(self.folder, flying.needed) or str(error)
        if dist.get_rank() == 0:
            shutil.rmtree(flying.temporary, ignore_errors=True)
        intact = "; earlier checkpoints are intact" if checkpoints(self.folder) else ""
        return RunError(f"checkpoint {flying.final} could not be written: {reason}{intact}")


@dataclass
class _Flying:
    """A checkpoint that is being written."""

    final: Path
    temporary: Path
    needed: int
    began: float
    best: int | None
    stall: float = 0.0
    job: Future[tuple[str | None, dict[str, list[int | str]] | None]] = field(default_factory=Future)


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is there, and what it cost."""

    path: Path
    step: int
    n_bytes: int
    stall: float
    """Seconds in which the training waited."""
    seconds: float
    """From its begin to its commit."""

    def measured(self) -> dict[str, float]:
        return {"bytes": self.n_bytes, "stall_seconds": self.stall, "seconds": self.seconds}


def load_checkpoint(trainer: Trainer, checkpoint: Path) -> dict[str, Any]:
    """Collective: bring a new trainer to a verified checkpoint's state, at any number of processes.

    One from before the usual loss or the skips in a row were noted begins those anew, which matters to
    train.max_loss_jump and train.max_skips alone.

    Returns:
        The facts that were saved with it.

    Raises:
        RunError: it does not fit the trainer's model, or its notes lack something.
    """
    state = _state(trainer)
    try:
        dcp.load(state, storage_reader=dcp.FileSystemReader(checkpoint))
    except CheckpointException as error:
        raise RunError(f"checkpoint {checkpoint} cannot be loaded: {reason_of(error)}") from None
    set_state_dict(trainer.model, trainer.optimizer, model_state_dict=state["model"],
                   optim_state_dict=state["optimizer"])
    notes = Notes(checkpoint)
    trainer.scaler.load_state_dict(notes["scaler"])
    trainer.finished, trainer.skipped = notes["step"], notes["skipped"]
    trainer.usual_loss, trainer.skips = notes.get("usual_loss", 0.0), notes.get("skips", 0)
    return notes


def state_hash(trainer: Trainer) -> str:
    """Collective: a hash over all that a checkpoint holds of a trainer, bit by bit. Other shards give another one."""
    digest = hashlib.sha256(repr(_counts(trainer)).encode())

    def add(value: Any) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                digest.update(f"{key}".encode())
                add(item)
            return
        if isinstance(value, DTensor):
            value = value.to_local()
        if isinstance(value, Tensor):
            value = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        digest.update(value if isinstance(value, bytes) else f"{value}".encode())

    add(_state(trainer))
    parts = all_ranks(digest.hexdigest)
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def gather_weights(model: Phi1) -> dict[str, Tensor]:
    """Collective: the whole fp32 parameters on rank 0's CPU; nothing on the other processes. Raises as `gather`."""
    weights: dict[str, Tensor] = {}
    own = dist.get_rank() == 0
    gather(model, lambda name, whole: weights.update({name: whole.cpu()}) if own else None)
    return weights


def _state(trainer: Trainer) -> dict[str, Any]:
    model, optimizer = get_state_dict(trainer.model, trainer.optimizer)
    return {"model": model, "optimizer": optimizer}


def _counts(trainer: Trainer) -> dict[str, Any]:
    return {"step": trainer.finished, "skipped": trainer.skipped, "skips": trainer.skips,
            "usual_loss": trainer.usual_loss, "scaler": trainer.scaler.state_dict()}


def _local_bytes(value: Any) -> int:
    if isinstance(value, dict):
        return sum(_local_bytes(item) for item in value.values())
    if isinstance(value, DTensor):
        value = value.to_local()
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0


def _make_room(temporary: Path, needed: int) -> None:
    """An empty folder on a disk with enough space."""
    temporary.parent.mkdir(parents=True, exist_ok=True)
    if _shortage(temporary.parent, needed):
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
