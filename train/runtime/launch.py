"""Where a process stands among the others, and how a run ends that the user can mend.

torchrun prints a block of its own for every worker that fails and always exits with 1. So whatever can be refused is
refused before any process group exists: rank 0 prints one line, writes the same line where torchrun looks for the root
cause, and exits with 2; the other ranks wait until torchrun stops them.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import TYPE_CHECKING, NoReturn, TextIO

if TYPE_CHECKING:
    from torch.distributed import Store

# Rank 0 may have to tokenise a large corpus before the others are needed.
LONGEST_PREPARATION = timedelta(days=2)
# torchrun stops the other ranks about a second after rank 0 has exited; whoever exits first is named as the cause.
# What every rank refuses alike they leave to rank 0 for longer: a busy machine may keep it from saying so.
GRACE_SECONDS, ALIKE_SECONDS = 20, 180
# What torchrun sets for each process, with what holds without it, in the order of Rank.
_ENVIRONMENT = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
                "TORCHELASTIC_RESTART_COUNT": "0"}


class RunError(Exception):
    """Something that the user can mend. Its text is one line: what, where, and the fix."""


@dataclass(frozen=True)
class Rank:
    """This process among the others, as torchrun describes it in the environment."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    attempt: int = 0
    """How often torchrun has restarted the workers."""
    launcher: int = 0
    """The process that is torchrun; 0 without it."""

    @classmethod
    def from_environment(cls) -> Rank:
        """Raises RunError for what torchrun would not set."""
        if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            return cls()
        found = {name: os.environ.get(name, default) for name, default in _ENVIRONMENT.items()}
        if not all(map(str.isdecimal, found.values())) or int(found["RANK"]) >= int(found["WORLD_SIZE"]):
            raise RunError("torchrun numbers the processes it starts; for one alone unset RANK and WORLD_SIZE; got "
                           + ", ".join(f"{name}={text}" for name, text in found.items()))
        return cls(*map(int, found.values()), *([os.getppid()] if "TORCHELASTIC_RUN_ID" in os.environ else []))

    def is_orphan(self) -> bool:
        """Whether torchrun has ended."""
        return self.launcher not in (0, os.getppid())

    def shard_group(self, asked: int) -> int:
        """Processes that share out one copy of a model: as many as are asked for, or those of this machine for 0.

        Raises:
            RunError: the number of processes is not a multiple of it.
        """
        group = asked or self.local_world_size
        if self.world_size % group:
            raise RunError(f"run.shard_group must divide the number of processes, {self.world_size}; got {group}"
                           + ("" if asked else ", the processes of this machine"))
        return group

    def command(self, arguments: str) -> str:
        """The command line that starts this script as it was started, with other arguments."""
        if not self.launcher:
            return f"python {sys.argv[0]} {arguments}"
        nodes = self.world_size // self.local_world_size
        where = f"--nnodes {nodes} --rdzv-backend c10d --rdzv-endpoint HOST:PORT" if nodes > 1 else "--standalone"
        processes = f" --nproc-per-node {self.local_world_size}" if self.local_world_size > 1 else ""
        return f"torchrun {where}{processes} {sys.argv[0]} {arguments}"


def say(text: str = "", to: TextIO | None = None, end: str = "\n") -> None:
    """Print at once, to standard output or `to`. What cannot be written, on a full disk say, is lost, and ends no run.

    Raises:
        BrokenPipeError: the reader of standard output has gone away.
    """
    try:
        print(text, file=to, end=end, flush=True)
    except OSError as error:
        if isinstance(error, BrokenPipeError) and to is None:
            raise


def stop_with(message: str, rank: Rank, program: str = "pretrain", alike: bool = False) -> NoReturn:
    """End this process with exit code 2; rank 0 says why, once, for all where every process has found the same.

    A restarted attempt meets the same error again, so that only attempt 0 prints it.
    """
    line = " ".join(str(message).split())
    if rank.rank == 0:
        if rank.attempt == 0:
            say(f"{program}: error: {line}", sys.stderr)
        _write_root_cause(f"{program}: error: {line}")
    elif rank.launcher:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(ALIKE_SECONDS if alike else GRACE_SECONDS)
        # Still here: rank 0 has no such error, and waits for this process.
        say(f"{program}: error: rank {rank.rank}: {line}", sys.stderr)
        _write_root_cause(f"{program}: error: rank {rank.rank}: {line}")
    leave(2)  # a rank that waits inside a collective would otherwise be joined at exit


def leave(code: int) -> NoReturn:
    """End this process, whose work is done, without Python's own ending.

    A thread of gloo that still drops what a collective held would meet an interpreter that is gone, and abort.
    """
    try:
        say(end="")
    except BrokenPipeError:
        code = 141  # 128 + SIGPIPE: the reader of our output has gone away
    say(to=sys.stderr, end="")
    os._exit(code)


def _write_root_cause(line: str) -> None:
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        detail = {"py_callstack": line, "timestamp": str(int(time.time()))}  # torchrun shows the "call stack" alone
        with suppress(OSError), open(path, "w") as file:  # the line is on stderr already
            json.dump({"message": {"message": line, "extraInfo": detail}}, file)


def on_signals(handler: Callable[[int, FrameType | None], object] | signal.Handlers) -> None:
    """From now on SIGINT, SIGTERM and SIGUSR1 do this in this process."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, handler)


def limit_spinning() -> None:
    """Let idle CPU threads sleep soon. To be called before torch is imported, which is when OpenMP reads this.

    By default GNU OpenMP's threads spin for milliseconds at the end of each operation. On two cores that other
    processes wanted as well, nano made 200 to 600 tokens/s so, and 2,100 with this count; on two idle ones 7,000 either
    way, where 1,000 would cost 8 %.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")


def connect(rank: Rank) -> Store:
    """The store through which the processes find each other.

    A prefix per attempt: torchrun gives restarted workers the same store, in which they would read the addresses of
    the dead ones.
    """
    from torch.distributed import HashStore, PrefixStore, TCPStore

    if rank.world_size == 1:
        return HashStore()
    try:
        hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        where = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        if hosted:  # where nobody answers any more, TCPStore tries for nine minutes, and prints stacks of C++
            socket.create_connection(where, 60).close()
        tcp = TCPStore(*where, rank.world_size, is_master=not hosted and rank.rank == 0, wait_for_workers=False)
    except KeyError as error:
        raise RunError(f"RANK and WORLD_SIZE are set but {error.args[0]} is not: start several processes with "
                       "torchrun") from None
    except OSError as error:
        raise RunError(f"torchrun does not answer at {where[0]}:{where[1]}: {error.strerror or error}") from None
    return PrefixStore(f"phi1/attempt{rank.attempt}", tcp)


def announce(store: Store, rank: Rank, decision: str) -> str:
    """Return rank 0's decision on all processes, once it has checked all that can be refused and prepared the data.

    Where rank 0 is gone, the others end quietly, since it has said why.
    """
    if rank.rank == 0:
        store.set("start", decision)
        return decision
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's own handler would wait for the store to answer
    try:
        store.wait(["start"], LONGEST_PREPARATION)
        return store.get("start").decode()
    except RuntimeError:  # of which DistStoreError and DistNetworkError are kinds
        time.sleep(GRACE_SECONDS)
        os._exit(2)
