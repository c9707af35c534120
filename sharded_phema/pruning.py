"""Pruning: removing the snapshots of a run that a wish can do without, while it trains and afterwards."""

from __future__ import annotations

import logging
from collections.abc import Callable

from sharded_phema.kept import Kept, Moment, keep
from sharded_phema.retention import Retention, parse_retention
from sharded_phema.source import movement_in, noise_of, sources_of
from sharded_phema.store import Run, remove_snapshot
from sharded_phema.target import parse_target

__all__ = ["plan_prune", "prune", "remover"]

_log = logging.getLogger(__name__)


def plan_prune(run: Run, wish: Retention, *, ongoing: bool) -> Kept:
    """Decide which snapshots of a run stay. Removes nothing.

    Args:
        run: The run.
        wish: What its snapshots are kept for.
        ongoing: Whether it still trains.

    Raises:
        StoreError: The run has no snapshots.
        TargetError: The wish cannot be met.
    """
    pool = sources_of(run)
    movement = movement_in(run, "auto")
    moments = [Moment(snapshot.t, snapshot.start, snapshot.size) for snapshot in run.snapshots]
    tracked = [parse_target(label) for label in run.record.averages]
    noise = noise_of(pool, movement)
    return keep(moments, tracked, wish, movement=movement, noise=noise, ongoing=ongoing)


def prune(run: Run, kept: Kept) -> int:
    """Remove what is not kept of the living timeline. Called by one process.

    Returns:
        Bytes that were freed.

    Raises:
        StoreError: Something cannot be removed; what was removed before is gone, the rest is whole.
    """
    return sum(remove_snapshot(run.snapshots[index]) for index in kept.dropped)


def remover(wish: Retention | str | None) -> Callable[[Run], object]:
    """What is done after each snapshot of a training that keeps only what a wish needs; nothing without a wish.

    Raises:
        TargetError: The wish is none.
    """
    if wish is None:
        return lambda run: None
    retention = parse_retention(wish) if isinstance(wish, str) else wish

    def remove(run: Run) -> None:
        kept = plan_prune(run, retention, ongoing=True)
        freed = prune(run, kept)
        if freed:
            _log.info("%d snapshots removed, %d bytes freed", len(kept.dropped), freed)

    return remove
