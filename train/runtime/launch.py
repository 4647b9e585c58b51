"""The place of a process among the others, how the processes find each other, and how a refused run ends.

torchrun prints a block of its own for every worker that fails, and always exits with 1. Therefore a run is refused
before any process group exists: rank 0 prints one line, writes the same line where torchrun looks for the root cause,
and exits with 2; the other ranks wait until torchrun stops them.

torchrun itself exits with 1 whenever a worker exits with anything but 0. The worker's code is in torchrun's report.
"""

from __future__ import annotations

import functools
import json
import math
import os
import shlex
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from phi1.arguments import one_line

if TYPE_CHECKING:
    from torch.distributed import Store

# Exit codes beside 0 (complete), 1 (our mistake) and 141 (128 + SIGPIPE).
MISTAKE = 2  # the user can mend it
GO_ON = 75  # EX_TEMPFAIL: saved, or nothing lost; the same command goes on
INTERRUPTED = 130  # 128 + SIGINT; nothing is saved
LONGEST_PREPARATION = timedelta(days=2)  # rank 0 may have to tokenise a large corpus while the others wait
# torchrun stops the other ranks about a second after rank 0 has exited, and names the first that exits as the cause.
# If all ranks refuse alike, the others give rank 0 longer, since a busy machine may delay its message.
GRACE_SECONDS, ALIKE_SECONDS = 20, 180
# The variables that torchrun sets for each process, with their values without it, in the order of Rank's fields.
_ENVIRONMENT = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
                "TORCHELASTIC_RESTART_COUNT": "0"}
_LAUNCHERS = ("torchrun", "torch.distributed.run", "torch.distributed.launch", "run.py")


class RunError(Exception):
    """An error that the user can mend. Its text is one line: what, where, and the fix."""


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
    """Process id of torchrun; 0 without it."""

    @classmethod
    def from_environment(cls) -> Rank:
        """Read what torchrun has set. Raises RunError for values that it would not set."""
        if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            return cls()
        found = {name: os.environ.get(name, default) for name, default in _ENVIRONMENT.items()}
        if not all(text.isdecimal() and len(text) < 10 for text in found.values()) or not (
                int(found["RANK"]) < int(found["WORLD_SIZE"])
                and int(found["LOCAL_RANK"]) < int(found["LOCAL_WORLD_SIZE"]) <= int(found["WORLD_SIZE"])):
            raise RunError("torchrun numbers the processes it starts; for one alone unset RANK and WORLD_SIZE; got "
                           + ", ".join(f"{name}={text}" for name, text in found.items()))
        place = cls(*map(int, found.values()))
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            return place
        launcher_options(os.getppid())
        return replace(place, launcher=os.getppid())

    def is_orphan(self) -> bool:
        """Return True once torchrun has ended."""
        return self.launcher not in (0, os.getppid())

    def shard_group(self, asked: int) -> int:
        """Return how many processes share one copy of a model: the number asked for, or for 0 all of this machine.

        Raises:
            RunError: the number of processes is not a multiple of it.
        """
        if asked and self.world_size % asked:
            raise RunError(f"run.shard_group must divide the number of processes, {self.world_size}; got {asked}")
        return asked or self.local_world_size  # machines of unequal size are refused once all processes have met

    def command(self, arguments: str) -> str:
        """Return the command line that starts this script in the same way, with other arguments, on every machine."""
        if not self.launcher:
            return f"python {sys.argv[0]} {arguments}"
        if given := launcher_options(self.launcher):
            return f"torchrun {given} {sys.argv[0]} {arguments}"
        nodes = self.world_size // self.local_world_size
        where = f"--nnodes {nodes} --rdzv-backend c10d --rdzv-endpoint HOST:PORT" if nodes > 1 else "--standalone"
        processes = f" --nproc-per-node {self.local_world_size}" if self.local_world_size > 1 else ""
        return f"torchrun {where}{processes} {sys.argv[0]} {arguments}"


@functools.cache  # the first call is made while torchrun runs
def launcher_options(process: int) -> str:
    """Return the options that torchrun was given, as text for a shell; "" if the system does not tell them.

    A machine's own number is replaced by NUMBER, so that the line serves on every machine.
    """
    try:
        words = Path(f"/proc/{process}/cmdline").read_bytes().decode().split("\0")
        given = words[:words.index(sys.argv[0])]
    except (OSError, ValueError):
        return ""
    first = next((at + 1 for at, word in enumerate(given) if word.split("/")[-1] in _LAUNCHERS), len(given))
    options: list[str] = []
    for word in given[first:]:
        name, equals, _ = word.replace("_", "-").partition("=")
        if name == "--node-rank" and equals:
            word = "--node-rank=NUMBER"
        elif options and options[-1].replace("_", "-") == "--node-rank":
            word = "NUMBER"
        options.append(word)
    return shlex.join(options)


def time_left(rank: Rank, limit: float) -> float:
    """Return the seconds until a limit of minutes since the launch; infinity for 0, no limit."""
    return 60 * limit - _age(rank.launcher or os.getpid()) if limit else math.inf


def _age(process: int) -> float:
    """Return the seconds since a process was started; 0 if the system does not say."""
    try:
        started = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):
        return 0.0


def say(text: str = "", to: TextIO | None = None, end: str = "\n") -> None:
    """Print at once, to standard output or `to`. A line that cannot be written, on a full disk say, is dropped.

    Raises:
        BrokenPipeError: the reader of standard output has gone away.
    """
    try:
        print(text, file=to, end=end, flush=True)
    except OSError as error:
        if isinstance(error, BrokenPipeError) and to is None:
            raise


def stop_with(message: str, rank: Rank, program: str = "pretrain", alike: bool = False,
              code: int = MISTAKE) -> NoReturn:
    """End this process with an exit code, after rank 0 has said why; `alike`: every process has found the same error.

    A restarted attempt meets the same error again, so only attempt 0 prints it.
    """
    line = one_line(message)
    if rank.rank == 0:
        if rank.attempt == 0:
            say(f"{program}: error: {line}", sys.stderr)
        write_root_cause(f"{program}: error: {line}")
    elif rank.launcher:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(ALIKE_SECONDS if alike else GRACE_SECONDS)
        # Not stopped by torchrun: rank 0 has no such error, and waits for this process.
        say(f"{program}: error: rank {rank.rank}: {line}", sys.stderr)
        write_root_cause(f"{program}: error: rank {rank.rank}: {line}")
    leave(code)  # a rank that waits inside a collective would otherwise be joined at exit


def leave(code: int) -> NoReturn:
    """End this process without Python's own shutdown, during which a thread of gloo that frees a buffer would abort."""
    try:
        say(end="")
    except BrokenPipeError:
        code = 141  # 128 + SIGPIPE: the reader of our output has gone away
    say(to=sys.stderr, end="")
    os._exit(code)


def write_root_cause(line: str) -> None:
    """Write why this process ends where torchrun looks for the root cause."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        detail = {"py_callstack": line, "timestamp": str(int(time.time()))}  # torchrun shows the "call stack" alone
        with suppress(OSError), open(path, "w") as file:  # the line is on stderr already
            json.dump({"message": {"message": line, "extraInfo": detail}}, file)


def on_signals(handler: Callable[[int, FrameType | None], object] | signal.Handlers) -> None:
    """Set the handler of SIGINT, SIGTERM and SIGUSR1 in this process."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, handler)


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def limit_spinning() -> None:
    """Let idle CPU threads sleep soon. Call this before torch is imported, which is when OpenMP reads the variable.

    By default GNU OpenMP's threads spin for milliseconds at the end of each operation. On two busy cores nano trained
    at 200 to 600 tokens/s so, and at 2,100 with a count of 3000; on two idle cores at 7,000 with both, where a count of
    1000 cost 8 %.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")


def connect(rank: Rank) -> Store:
    """Return the store through which the processes find each other.

    Each attempt has its own prefix: torchrun gives restarted workers the same store, which still holds the addresses of
    the dead ones.
    """
    from torch.distributed import HashStore, PrefixStore, TCPStore

    if rank.world_size == 1:
        return HashStore()
    try:
        hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        where = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        if hosted:  # if nobody answers any more, TCPStore tries for nine minutes and prints stacks of C++
            socket.create_connection(where, 60).close()
        tcp = TCPStore(*where, rank.world_size, is_master=not hosted and rank.rank == 0, wait_for_workers=False)
    except KeyError as error:
        raise RunError(f"RANK and WORLD_SIZE are set but {error.args[0]} is not: start several processes with "
                       "torchrun") from None
    except (ValueError, TypeError):  # the latter of TCPStore, for a number beyond 16 bits
        raise RunError(f"MASTER_PORT must be a port, 1 to 65535; got {os.environ['MASTER_PORT']!r:.100}") from None
    except OSError as error:
        raise RunError(f"torchrun does not answer at {where[0]}:{where[1]}: {error.strerror or error}") from None
    except RuntimeError as error:  # DistNetworkError derives from it: its port is taken, say
        raise RunError(f"{where[0]}:{where[1]}, MASTER_ADDR and MASTER_PORT: {str(error).splitlines()[0]}") from None
    return PrefixStore(f"phi1/attempt{rank.attempt}", tcp)


def exchange(store: Store, rank: Rank, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the facts, JSON values, of all processes in the order of their ranks, before any process group exists."""
    store.set(f"facts{rank.rank}", json.dumps(facts))
    names = [f"facts{other}" for other in range(rank.world_size)]
    store.wait(names, LONGEST_PREPARATION)  # the watchdog is earlier
    at_once = store.has_extended_api()  # type: ignore[attr-defined]  # the stubs lack it; a FileStore cannot
    texts = store.multi_get(names) if at_once else map(store.get, names)
    return [json.loads(text) for text in texts]


def announce(store: Store, rank: Rank, decision: str) -> str:
    """Return rank 0's decision on all processes, after it has checked the run and prepared the data.

    If rank 0 is gone, the others end quietly, since it has said why.
    """
    if rank.rank == 0:
        store.set("start", decision)
        return decision
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's own handler would wait for the store to answer
    try:
        store.wait(["start"], LONGEST_PREPARATION)
        return store.get("start").decode()
    except RuntimeError:  # DistStoreError and DistNetworkError derive from it
        time.sleep(GRACE_SECONDS)
        os._exit(MISTAKE)
