"""Losses: snapshots that turn out damaged while they are read, and starting over without them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sharded_phema.errors import StoreError
from sharded_phema.recipe import Plan
from sharded_phema.store import Run, Snapshot
from sharded_phema.world import gather

__all__ = ["Losses", "leaving_out"]


class Losses:
    """Which snapshots could not be read by this process, and why."""

    def __init__(self) -> None:
        self.found: dict[str, str] = {}

    @contextmanager
    def reading(self, snapshot: Snapshot) -> Iterator[None]:
        """Note a failure of what is read of a snapshot, which passes through."""
        try:
            yield
        except StoreError as error:
            self.found.setdefault(snapshot.name, error.message)
            raise


def leaving_out(plan: Plan, again: Callable[[Run], Plan], act: Callable[[Plan, Losses], object]) -> Plan:
    """Do what a plan says, and start over without the snapshots that turn out damaged meanwhile. Collective.

    Each time at least one snapshot less is left, so that this ends.

    Args:
        plan: The plan.
        again: Plans the same with the snapshots that are left.
        act: Reads, noting which snapshot fails. Where it fails, it does so on all ranks, with the same error.

    Returns:
        The plan that was carried out. Its run says what was left out.

    Raises:
        StoreError: No snapshot is left, or what is damaged is part of every snapshot.
        PhemaError: Whatever ``act`` and ``again`` raise otherwise.
    """
    while True:
        losses = Losses()
        try:
            act(plan, losses)
        except StoreError:
            broken = {name: reason for found in gather(losses.found) for name, reason in found.items()}
            if not broken or not plan.run.without(broken).snapshots:
                raise
        else:
            return plan
        plan = again(plan.run.without(broken))
