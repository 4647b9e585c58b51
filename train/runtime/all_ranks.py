"""Something that each process does on its own and that counts only if all succeed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn, TypeVar, cast

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from phi1.train.runtime.launch import RunError

T = TypeVar("T")


class Failed(RunError):
    """Some process could not do its part; every process raises this with the same text."""


def all_ranks(action: Callable[[], T], keep: bool = False) -> list[T]:
    """Collective: do `action` on every process; return all results, or raise Failed on all if one has failed.

    With `keep` a result stays in its process: the list has this one's alone.
    """
    error, result = attempt(action)
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, (error, None if keep else result))
    for message, _ in outcomes:
        if message is not None:
            raise Failed(message)
    return [cast(T, result)] if keep else [own for _, own in outcomes]


def attempt(action: Callable[[], T]) -> tuple[str | None, T | None]:
    """(None, the result), or (what went wrong, None)."""
    try:
        return None, action()
    except (Exception, CheckpointException) as error:  # the latter derives from BaseException
        return reason_of(error), None


def fail(message: str) -> NoReturn:
    """Raise what `attempt` has found."""
    raise Failed(message)


def reason_of(error: BaseException) -> str:
    """What went wrong, in one line; of PyTorch's checkpointing, where it collects what each process met, the first."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(f"{error}".split())[:500] or type(error).__name__
