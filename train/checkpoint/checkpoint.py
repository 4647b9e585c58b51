"""Saves and loads a trainer: parameters, optimizer, loss scaler and step, by torch.distributed.checkpoint.

The state is copied, and training continues while each process writes its shards into `.step-N.X.tmp`, forces them to
the disk and hashes them. When all have done so, rank 0 adds the manifest and renames the folder. If a process dies at
any moment, the earlier checkpoints stay as they were.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
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
from phi1.train.checkpoint.files import STATE, Notes, checkpoint_name, checkpoints, commit, describe, prune, step_of
from phi1.train.checkpoint.reader import load_tensors
from phi1.train.runtime.all_ranks import Failed, all_ranks, fail, reason_of
from phi1.train.runtime.engine import PATIENCE, all_sum, gather
from phi1.train.runtime.launch import RunError
from phi1.train.step.trainer import Trainer

MARGIN = 1 << 20  # metadata, manifest and rounding to blocks, beside the tensors' own bytes


class Saver:
    """Writes checkpoints while training continues: one at a time, each committed when all processes have written.

    Args:
        folder: the run's checkpoints/, on a disk that all processes share.
        keep: newest checkpoints to keep.
        keep_every: also keep those whose step is a multiple of this; 0 for none.
        patience: seconds for which a process waits in a save for another one, which may write longer, or have failed;
            0 for no limit.
    """

    def __init__(self, folder: Path, keep: int, keep_every: int = 0, patience: float = 0.0) -> None:
        self.folder, self.keep, self.keep_every = folder, keep, keep_every
        self.keep_all = False
        """Remove no older checkpoint from now on."""
        self._patience = timedelta(seconds=patience) if patience else PATIENCE
        self._group = self._new_group()
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._flying: _InFlight | None = None

    @property
    def in_flight(self) -> bool:
        """True while a checkpoint is begun and neither committed nor given up; the same on every process."""
        return self._flying is not None

    def writes(self) -> bool:
        """Return True while this process still writes."""
        return self._flying is not None and not self._flying.job.done()

    def begin(self, trainer: Trainer, facts: dict[str, Any]) -> None:
        """Collective: copy the state of a trainer between two steps, and begin to write it.

        Args:
            trainer: it may take its next step when this returns.
            facts: JSON values to keep beside the tensors; the checkpoint of the step in "best" is kept as well.

        Raises:
            RunError: on every process, if there is no space, or no folder can be made.
        """
        assert not self.in_flight, "one checkpoint at a time"
        began = time.perf_counter()
        final = self.folder / checkpoint_name(trainer.finished)
        # The name is unique to this save: a worker of the previous attempt may still be writing the same step.
        temporary = final.with_name(f".{final.name}.{all_ranks(lambda: secrets.token_hex(4))[0]}.tmp")
        state = _state(trainer)
        (held,) = all_sum(_local_bytes(state))
        notes = _counts(trainer) | facts
        best = facts["best"]["step"] if "best" in facts else None
        # A shard that several processes hold is written by one of them.
        flying = _InFlight(final, temporary, int(held / trainer.engine.replicas), began, best)
        writer = dcp.FileSystemWriter(temporary)
        try:
            all_ranks(lambda: _make_room(temporary, flying.needed) if dist.get_rank() == 0 else None)
            (copied,) = all_ranks(lambda: self._copy(state, writer), keep=True)
        except Failed as error:
            raise self._given_up(flying, error) from None
        flying.job = self._pool.submit(self._try_to_write, copied, writer, notes)
        flying.stall = time.perf_counter() - began
        self._flying = flying

    def finish(self) -> Saved:
        """Collective: wait until every process has written, and give the checkpoint its name.

        Raises:
            RunError: on every process, if one could not write it; earlier checkpoints are intact.
        """
        assert self._flying is not None
        flying, self._flying = self._flying, None
        began = time.perf_counter()
        error, files = flying.job.result()
        try:
            try:
                parts = all_ranks(lambda: fail(error) if error else files)
            except Failed:
                if self._group:  # messages of the failed save may still be under way in it
                    dist.destroy_process_group(self._group)
                    self._group = self._new_group()
                raise
            listed = {name: description for part in parts for name, description in (part or {}).items()}
            all_ranks(lambda: self._commit(flying, listed) if dist.get_rank() == 0 else None)
        except Failed as failure:
            raise self._given_up(flying, failure) from None
        now = time.perf_counter()
        return Saved(flying.final, step_of(flying.final), flying.needed, flying.stall + now - began, now - flying.began)

    def _copy(self, state: dict[str, Any], writer: dcp.FileSystemWriter) -> dict[str, Any]:
        """Copy the state in this process's memory, with a thread ready to write it.

        dcp.async_save does the same but begins its collectives at once. If one process lacks memory or threads, the
        others would stay in them, and the next save would read their messages.
        """
        self._pool.submit(int).result()
        return writer.stage(state)

    def _new_group(self) -> dist.ProcessGroup | None:
        """Collective: make a process group for saves alone, since they run in a thread beside the training."""
        return dist.new_group(backend="gloo", timeout=self._patience) if dist.get_world_size() > 1 else None

    def _try_to_write(self, *args: Any) -> tuple[str | None, dict[str, list[int | str]] | None]:
        """Write in the thread: return (None, files) or (reason, None), whatever fails; nobody would catch it there."""
        try:
            return None, self._write(*args)
        except BaseException as error:
            return reason_of(error), None

    def _write(self, copied: dict[str, Any], writer: dcp.FileSystemWriter,
               notes: dict[str, Any]) -> dict[str, list[int | str]]:
        dcp.save(copied, storage_writer=writer, process_group=self._group)
        return _describe_own(Path(writer.path), notes)

    def _commit(self, flying: _InFlight, files: dict[str, list[int | str]]) -> None:
        commit(flying.temporary, flying.final, files)
        if not self.keep_all:
            prune(self.folder, self.keep, self.keep_every, flying.best)

    def _given_up(self, flying: _InFlight, error: Failed) -> RunError:
        reason = _shortage(self.folder, flying.needed) or str(error)
        if dist.get_rank() == 0:
            shutil.rmtree(flying.temporary, ignore_errors=True)
        intact = "; earlier checkpoints are intact" if checkpoints(self.folder) else ""
        return RunError(f"checkpoint {flying.final} could not be written: {reason}{intact}")


@dataclass
class _InFlight:
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
    """A committed checkpoint and its cost."""

    path: Path
    step: int
    n_bytes: int
    stall: float
    """Seconds for which the training waited."""
    seconds: float
    """Time from its begin to its commit."""

    def measured(self) -> dict[str, float]:
        return {"bytes": self.n_bytes, "stall_seconds": self.stall, "seconds": self.seconds}


def load_checkpoint(trainer: Trainer, checkpoint: Path) -> dict[str, Any]:
    """Collective: load a verified checkpoint into a new trainer, with any number of processes; returns its notes.

    Older checkpoints have no usual loss and no count of skips in a row. These begin anew, which only affects
    train.max_loss_jump and train.max_skips.

    Raises:
        RunError: it does not fit the trainer's model, or its notes lack something.
    """
    state = _state(trainer)
    try:
        load_tensors(state, checkpoint)
    except CheckpointException as error:
        raise RunError(f"checkpoint {checkpoint} cannot be loaded: {reason_of(error)}") from None
    _, optimizer = get_state_dict(trainer.model, trainer.optimizer)
    set_state_dict(trainer.model, trainer.optimizer, model_state_dict=state["model"],
                   optim_state_dict=optimizer | state["optimizer"])
    notes = Notes(checkpoint)
    trainer.scaler.load_state_dict(notes["scaler"])
    trainer.finished, trainer.skipped = notes["step"], notes["skipped"]
    trainer.usual_loss, trainer.skips = notes.get("usual_loss", 0.0), notes.get("skips", 0)
    return notes


def state_hash(trainer: Trainer) -> str:
    """Collective: hash every bit of a trainer that a checkpoint holds. The hash depends on the sharding."""
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
    """Collective: return the whole fp32 parameters on rank 0's CPU, nothing on the other ranks. Raises as `gather`."""
    weights: dict[str, Tensor] = {}
    own = dist.get_rank() == 0
    gather(model, lambda name, whole: weights.update({name: whole.cpu()}) if own else None)
    return weights


def _state(trainer: Trainer) -> dict[str, Any]:
    """Return the tensors of a trainer. The optimizer's numbers (rates, betas) are the recipe's and the schedule's."""
    model, optimizer = get_state_dict(trainer.model, trainer.optimizer)
    return {"model": model, "optimizer": {"state": optimizer["state"]}}


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
    """Make an empty folder, if the disk has enough space."""
    temporary.parent.mkdir(parents=True, exist_ok=True)
    if _shortage(temporary.parent, needed):
        raise OSError("not enough disk space")
    temporary.mkdir()


def _shortage(folder: Path, needed: int) -> str:
    """Say how much space or how many inodes the disk lacks, which no error does; "" if it has enough."""
    there = folder if folder.exists() else folder.parent
    try:
        free, files = shutil.disk_usage(there).free, os.statvfs(there)
    except OSError as error:  # the disk has gone away
        return f"{there}: {error.strerror}"
    needed += MARGIN
    if free >= needed:
        of = dist.get_world_size() + 4  # a shard each; metadata, notes, manifest, the folder
        if files.f_files and files.f_favail < of:
            return (f"no inodes: it takes {of} files, the disk has room for {files.f_favail} (df -i); remove "
                    f"{of - files.f_favail} files, or give another --run.folder")
        return ""
    return (f"no disk space: it takes {needed / 1e6:.1f} MB, {free / 1e6:.1f} MB are free; free "
            f"{(needed - free) / 1e6:.1f} MB more, or give another --run.folder")


def _describe_own(temporary: Path, notes: dict[str, Any]) -> dict[str, list[int | str]]:
    """Return sizes and hashes of the files that this process wrote; rank 0 also writes the notes."""
    rank = dist.get_rank()
    own = list(temporary.glob(f"__{rank}_*.distcp"))
    if rank == 0:
        (temporary / STATE).write_text(json.dumps(notes, indent=1) + "\n", encoding="utf-8")
        own += [temporary / ".metadata", temporary / STATE]
    return {path.name: describe(path) for path in own}
