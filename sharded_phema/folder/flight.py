"""Requests in flight: many small waits at the same time instead of one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

__all__ = ["IN_FLIGHT", "in_flight"]

IN_FLIGHT = 16
"""Requests at a time: waits of tens of milliseconds are hidden, and a server's limits are far away.

A client may hold it down further by its connections: s3fs has 10, unless its ``config_kwargs`` say otherwise.
"""

Item = TypeVar("Item")
Found = TypeVar("Found")


def in_flight(act: Callable[[Item], Found], items: Sequence[Item]) -> tuple[Found, ...]:
    """``act`` of each item, in order. The first failure is raised, and what has not begun by then is left."""
    if len(items) < 2:
        return tuple(act(item) for item in items)
    with ThreadPoolExecutor(min(IN_FLIGHT, len(items)), "sharded_phema_folder") as pool:
        futures = [pool.submit(act, item) for item in items]
        try:
            return tuple(future.result() for future in futures)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
