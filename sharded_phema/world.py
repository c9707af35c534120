"""The processes that work together: agreement between them, and only where nothing runs yet.

One process without a process group is a world of one. These functions call
collectives; training calls them once, when the averages are made or restored.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

__all__ = [
    "agree",
    "alone",
    "broadcast",
    "from_first",
    "gather",
    "gather_to_first",
    "grouped",
    "launch_rank",
    "launched",
    "rank_and_size",
    "tried",
]

T = TypeVar("T")

_ALONE: ContextVar[bool] = ContextVar("alone", default=False)


def rank_and_size() -> tuple[int, int]:
    """This process's rank and the number of processes; (0, 1) without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if grouped() else (0, 1)


def gather(value: T) -> list[T]:
    """Every rank's value, in rank order, on every rank. Values are small Python objects."""
    values: list[T] = [value] * rank_and_size()[1]
    if grouped():
        dist.all_gather_object(values, value)
    return values


def gather_to_first(value: T) -> list[T]:
    """Every rank's value, in rank order, on rank 0; nothing on the others. Values are small Python objects."""
    rank, size = rank_and_size()
    values: list[T] = [value] * size if rank == 0 else []
    if grouped():
        dist.gather_object(value, values or None, dst=0)
    return values


def agree(attempt: Callable[[], T]) -> T:
    """Run ``attempt`` on every rank; where it fails on one, the first failure is raised on all.

    A rank that raises alone leaves the others waiting in their next collective.
    """
    value, error = tried(attempt)
    failures = [failure for failure in gather(error) if failure is not None]
    if failures:
        raise failures[0]
    return value  # type: ignore[return-value]


def from_first(attempt: Callable[[], T]) -> T:
    """Run ``attempt`` on rank 0 alone and give its result, or raise its failure, on every rank."""
    outcome = [tried(attempt) if rank_and_size()[0] == 0 else (None, None)]
    if grouped():
        dist.broadcast_object_list(outcome, src=0)
    value, error = outcome[0]
    if error is not None:
        raise error
    return value  # type: ignore[return-value]


def broadcast(tensor: Tensor, source: int) -> None:
    """Fill a contiguous tensor on every rank with what it holds on one."""
    if grouped():
        dist.broadcast(tensor, src=source)


def launch_rank() -> int:
    """Rank that a launcher such as torchrun gave this process, whether or not it has joined; 0 without one."""
    return int(os.environ.get("RANK", "0"))


@contextmanager
def launched() -> Iterator[None]:
    """Join the processes that torchrun started together, if it did; leave on exit.

    Reconstruction exchanges a few small objects only, so gloo serves on every machine.
    """
    if dist.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    dist.init_process_group("gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def grouped() -> bool:
    """Whether there is a process group, and its processes work together."""
    return not _ALONE.get() and dist.is_available() and dist.is_initialized()


@contextmanager
def alone() -> Iterator[None]:
    """Inside, this thread works as if its process were the only one, on what each rank holds whole."""
    before = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(before)


def tried(attempt: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """What an attempt gives and None, or None and why it failed."""
    try:
        return attempt(), None
    except Exception as error:
        return None, error
