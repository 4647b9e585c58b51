"""Run a program that a model has written, in a process of its own with limits on time and memory.

This guards the machine against accidents: endless loops, endless memory, files left behind. It does not guard against
malice: there is no sandbox, and the program has the rights of the user. Use a container for strangers' models.
"""

from __future__ import annotations

import contextlib
import math
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

MEMORY_BYTES = 4 << 30
PASSED = "passed"
TIMED_OUT = "timed out"
NOT_RUN = "not run: "

# The child process's program. Its last act writes the result to a pipe of its own, so a program that ends early has not
# passed, even with exit code 0. RLIMIT_NPROC keeps every user but root from starting processes. Namespaces of its
# own, where the kernel gives them to every user, keep it from the network.
_CHILD = """
import ctypes, os, resource, sys, types
pipe, seconds, memory, parent = (int(word) for word in sys.argv[1:])
if sys.platform == "linux":
    ctypes.CDLL(None).unshare(0x50000000)  # CLONE_NEWUSER | CLONE_NEWNET
    ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL; last, since a new user namespace clears it
    if os.getppid() != parent:
        os._exit(1)
word, _, program = sys.stdin.buffer.read().partition(b"\\n")
for name, most in (("AS", memory), ("CPU", seconds), ("FSIZE", 1 << 24), ("NOFILE", 64), ("CORE", 0), ("NPROC", 0)):
    limit = getattr(resource, "RLIMIT_" + name)
    hard = resource.getrlimit(limit)[1]
    try:
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(limit, (most, most))
    except (ValueError, OSError):
        pass  # not every system limits everything
try:
    module = sys.modules["program"] = types.ModuleType("program")  # where dataclasses look for a class's module
    exec(compile(program.decode(), "program", "exec"), module.__dict__)  # as text: no cookie says its encoding
except BaseException as error:
    word = f"failed: {type(error).__name__}: {error}"[:300].encode("utf-8", "replace")
os.write(pipe, word)
os._exit(0)
"""


def execute(program: str, seconds: float, memory: int = MEMORY_BYTES) -> str:
    """Run a program to its end.

    Args:
        program: Python; it sees the standard library alone, an empty environment, an empty temporary folder as its
            working directory, no input, and no network where the system has user namespaces.
        seconds: its time limit. Then it is killed, with all processes that it has started and that are in its group.
        memory: bytes of address space.

    Returns:
        "passed" if it ran to its end. Else the reason: "failed: NameError: ...", "timed out" or "ended early, ...".
        "not run: ..." if the system gave no folder, pipe or process for it.
    """
    try:
        return _execute(program, seconds, memory)
    except OSError as error:
        return f"{NOT_RUN}{type(error).__name__}: {error}"


def _execute(program: str, seconds: float, memory: int) -> str:
    nonce = secrets.token_hex(16)
    reading, writing = os.pipe()
    try:
        with _folder() as folder:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _CHILD, str(writing), str(math.ceil(seconds) + 1), str(memory),
                 str(os.getpid())],
                stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=folder, env={},
                pass_fds=(writing,), start_new_session=True)
            end = time.monotonic() + seconds
            try:
                process.communicate(f"{nonce}\n{program}".encode("utf-8", "replace"), timeout=seconds)
            except subprocess.TimeoutExpired:
                return TIMED_OUT
            finally:
                _kill_group(process)
        os.set_blocking(reading, False)
        return _verdict(reading, nonce, process.returncode, late=time.monotonic() > end)
    finally:
        os.close(reading)
        os.close(writing)


@contextlib.contextmanager
def _folder() -> Iterator[str]:
    """Make a temporary folder, and remove it with all that a program leaves there."""
    made = tempfile.TemporaryDirectory(prefix="phi1-execute-", ignore_cleanup_errors=True)
    try:
        yield made.name
    finally:
        try:
            made.cleanup()
        except RecursionError:  # before Python 3.13 it calls itself for each level
            subprocess.run(["rm", "-rf", "--", made.name], stderr=subprocess.DEVNULL, check=False)


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):  # the whole group has ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _verdict(reading: int, nonce: str, code: int, late: bool) -> str:
    try:
        word = os.read(reading, 4096).decode("utf-8", "replace")
    except BlockingIOError:
        word = ""
    if code == 0 and word == nonce:
        return PASSED
    if word.startswith("failed: "):
        return " ".join(word.split())
    if late and code == -signal.SIGKILL:  # killed by its limit of CPU time, while this process did not run
        return TIMED_OUT
    return f"ended early, by {signal.Signals(-code).name}" if code < 0 else f"ended early, with exit code {code}"
