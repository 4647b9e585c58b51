"""Actions that each process does on its own and that count only if all succeed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn, TypeVar, cast

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from phi1.train.runtime.launch import RunError

T = TypeVar("T")


class Failed(RunError):
    """A process could not do its part; every process raises this with the same text."""


def all_ranks(action: Callable[[], T], keep: bool = False) -> list[T]:
    """Collective: do `action` on every process; return all results, or raise Failed on all if one has failed.

    With `keep` the results are not exchanged: the list holds this process's alone.
    """
    error, result = attempt(action)
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, (error, None if keep else result))
    for message, _ in outcomes:
        if message is not None:
            raise Failed(message)
    return [cast(T, result)] if keep else [own for _, own in outcomes]


def attempt(action: Callable[[], T]) -> tuple[str | None, T | None]:
    """Return (None, result), or (reason, None) if the action failed."""
    try:
        return None, action()
    except (Exception, CheckpointException) as error:  # the latter derives from BaseException
        return reason_of(error), None


def fail(message: str) -> NoReturn:
    """Raise Failed with a reason that `attempt` has returned."""
    raise Failed(message)


def reason_of(error: BaseException) -> str:
    """Return an error's reason in one line; of PyTorch's checkpointing, which collects one per process, the first."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text, kind = " ".join(f"{error}".split())[:500], type(error).__name__
    return text if text and isinstance(error, Exception | CheckpointException) else f"{kind} {text}".strip()
