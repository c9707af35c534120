"""Crowd: the ranks of a process group as threads of one process, so that many small worlds are tried in a second."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar
from unittest import mock

import torch.distributed as dist

from sharded_phema import commit, world

T = TypeVar("T")
WAIT_S = 60.0


class Crowd:
    """Stands in for ``torch.distributed`` where each thread is a rank. Collectives are for small objects only."""

    def __init__(self, size: int) -> None:
        self.store = dist.HashStore()
        self._size, self._here = size, threading.local()
        self._barrier = threading.Barrier(size)
        self._values: list[Any] = [None] * size

    def each(self, act: Callable[[int], T]) -> list[T]:
        """Run ``act`` on every rank; what the first raises is raised once all are over."""

        def on(rank: int) -> T:
            self._here.rank = rank
            return act(rank)

        with self._seen(), ThreadPoolExecutor(self._size) as pool:
            futures = [pool.submit(on, rank) for rank in range(self._size)]
        return [future.result() for future in futures]

    @contextmanager
    def _seen(self) -> Iterator[None]:
        connection = mock.patch.object(commit, "_connection", lambda: self.store)
        with mock.patch.object(world, "dist", self), connection:
            yield

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def get_rank(self) -> int:
        return self._here.rank

    def get_world_size(self) -> int:
        return self._size

    def all_gather_object(self, values: list[Any], value: Any) -> None:
        self._values[self.get_rank()] = value
        self._barrier.wait(WAIT_S)
        values[:] = self._values
        self._barrier.wait(WAIT_S)

    def gather_object(self, value: Any, values: list[Any] | None, dst: int) -> None:
        found = [None] * self._size
        self.all_gather_object(found, value)
        if self.get_rank() == dst:
            values[:] = found

    def broadcast_object_list(self, values: list[Any], src: int) -> None:
        found = [None] * self._size
        self.all_gather_object(found, list(values))
        values[:] = found[src]
