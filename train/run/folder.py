"""A run's folder: its paths, its lock and its stored recipe.

    config.toml   ledger.jsonl   heartbeat.json   checkpoints/step-N/   samples/   export/   summary.json
    tensorboard/   wandb/   not-proven.txt   went-back.txt
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from phi1.train.checkpoint.files import LEDGER, give_back
from phi1.train.runtime.launch import RunError

_NO_LOCKS = (": its file system has no locks (flock), which keep a second run out; mount it with locks (Lustre: -o "
             "flock), or give a --run.folder on another one")
NETWORK_SECONDS = 10  # limit of the time until other machines see a new file


class RunFolder:
    """Paths of a run, and the lock that allows one process to write there; `lock` makes a missing folder."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.toml"
        self.ledger = self.path / LEDGER
        self.heartbeat = self.path / "heartbeat.json"
        self.checkpoints = self.path / "checkpoints"
        self.samples = self.path / "samples"
        self.export = self.path / "export"
        self.summary = self.path / "summary.json"
        self.not_proven = self.path / "not-proven.txt"
        self.went_back = self.path / "went-back.txt"
        self._lock: int | None = None
        self._is_new = False

    def lock(self) -> None:
        """Lock the folder for this process until it ends, and restore a checkpoint that a killed save had set aside.

        Raises:
            RunError: another process has it, or it cannot be written.
        """
        for _ in range(10):
            try:
                self._is_new = not self.path.exists()
                self.path.mkdir(parents=True, exist_ok=True)
                self._lock = lock_file(self.path / ".lock")
                break
            except BlockingIOError:
                raise RunError(f"run.folder {self.path} is in use by process {self._owner()}: wait until it ends, or "
                               "give another --run.folder") from None
            except OSError as error:  # also when a refused start has just removed the folder that it had made
                problem = error
        else:
            raise RunError(f"run.folder {self.path}: {problem.strerror}"
                           + (_NO_LOCKS if problem.errno in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP) else ""))
        try:
            give_back(self.checkpoints)
        except OSError as error:
            raise RunError(f"run.folder {self.path}: {error.filename}: {error.strerror}") from None

    def check_shared(self, rank: int) -> None:
        """Collective: check that every process sees what rank 0 writes here; else checkpoints would lie in parts.

        Raises:
            Failed: on every process, if one does not.
        """
        from phi1.train.runtime.all_ranks import all_ranks, fail  # imports torch, which a complete run does not need

        name, *_ = all_ranks(lambda: self._mark() if rank == 0 else "")
        mark = self.path / name

        def find() -> None:
            end = time.monotonic() + NETWORK_SECONDS
            while not mark.exists():
                if time.monotonic() > end:
                    fail(f"run.folder {self.path}: rank {rank} on {socket.gethostname()} does not find there what rank "
                         "0 writes: it must lie on a disk that all machines share")
                time.sleep(0.05)

        try:
            all_ranks(find)
        finally:
            if rank == 0:
                mark.unlink(missing_ok=True)

    def _mark(self) -> str:
        name = f".shared-{secrets.token_hex(8)}"  # a new name, which no machine has cached as missing
        (self.path / name).touch()
        return name

    def _owner(self) -> str:
        try:
            return (self.path / ".lock").read_text() or "unknown"
        except OSError:
            return "unknown"

    def discard_if_new(self) -> None:
        """Remove the folder of a refused run if `lock` made it, unless another run has written there meanwhile."""
        if self._is_new and self._lock is not None:
            with suppress(OSError):
                if os.listdir(self.path) == [".lock"]:
                    (self.path / ".lock").unlink()
                    self.path.rmdir()

    def store(self, text: str, launch: str | None = None) -> None:
        """Write a recipe's TOML to config.toml, if it has changed. Raises RunError if it cannot be written.

        `launch` is the id of the torchrun launch, if it resumes from an older checkpoint; else None.
        """
        temporary = self.config.with_suffix(".tmp")
        try:
            if launch is not None:
                self.went_back.write_text(launch, encoding="utf-8")
            if not self.config.exists() or self.config.read_text(encoding="utf-8") != text:
                temporary.write_text(text, encoding="utf-8")
                temporary.replace(self.config)
        except OSError as error:
            raise RunError(f"{self.config} cannot be written: {error.strerror}") from None

    def has_gone_back(self, launch: str) -> bool:
        """Return True if a launch of torchrun has already resumed from the older checkpoint that it was given."""
        try:
            return self.went_back.read_text(encoding="utf-8") == launch
        except OSError:
            return False

    def completed(self, steps: int) -> dict[str, Any] | None:
        """Return the summary, if the run is complete with this number of steps."""
        try:
            summary = json.loads(self.summary.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return summary if summary.get("steps") == steps and self.export.is_dir() else None


def lock_file(path: Path) -> int:
    """Lock a file until this process ends. Returns its descriptor.

    Raises:
        BlockingIOError: another process has it.
        FileNotFoundError: another process has removed it before it was locked.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(descriptor), os.stat(path)):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    except OSError:
        os.close(descriptor)
        raise
    os.ftruncate(descriptor, 0)
    os.write(descriptor, str(os.getpid()).encode())
    return descriptor
