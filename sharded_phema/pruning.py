"""Pruning: removing the snapshots of a run that a wish can do without, while it trains and afterwards."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sharded_phema.folder import Folder
from sharded_phema.kept import Kept, Moment, keep
from sharded_phema.retention import Retention, parse_retention
from sharded_phema.source import movement_in, noise_of, sources_of
from sharded_phema.store import (
    Run,
    Snapshot,
    Waste,
    check_unclaimed,
    claim_run,
    open_run,
    remove_snapshot,
    remove_waste,
    waste_of,
)
from sharded_phema.target import parse_target

__all__ = ["Pruning", "plan_kept", "plan_pruning", "prune", "remover"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Pruning:
    """What would be removed from a run folder.

    Attributes:
        run: The run.
        kept: Which of its snapshots stay, and what that costs each target.
        waste: What else lies there that no average is rebuilt from.
    """

    run: Run
    kept: Kept
    waste: Waste

    @property
    def dropped(self) -> tuple[Snapshot, ...]:
        """Snapshots of the living timeline that the wish can do without."""
        return tuple(self.run.snapshots[index] for index in self.kept.dropped)

    @property
    def freed(self) -> int:
        """Bytes that removing it all frees."""
        return self.kept.freed + self.waste.nbytes


def plan_pruning(root: str, targets: Sequence[str], limits: Sequence[str]) -> Pruning:
    """Decide what of a run that is over can go. Removes nothing.

    Args:
        root: Run folder.
        targets: What its snapshots are kept for. Without any, all of them stay, and only waste goes.
        limits: Exactly one if there are targets, such as ``"tolerance=1e-2"``, ``"count=20"`` or ``"bytes=10GB"``.

    Raises:
        StoreError: There is no run, or nothing in it.
        TargetError: A target or limit is none, or the wish cannot be met.
    """
    run = open_run(root)
    words = [*targets, *limits]
    kept = plan_kept(run, parse_retention(" ".join(words)), ongoing=False) if words else _all_of(run)
    return Pruning(run, kept, waste_of(run, [run.snapshots[index] for index in kept.kept]))


def prune(plan: Pruning) -> None:
    """Remove what was planned, under a claim of its own, so that no training begins meanwhile.

    Raises:
        OrderError: A process may be training into the folder.
        StoreError: Something cannot be removed; what was removed before is gone, every snapshot that is left is whole.
    """
    run = plan.run
    check_unclaimed(run.root, run.record)
    claim = claim_run(run.root, run.record)
    try:
        for snapshot in plan.dropped:
            remove_snapshot(snapshot)
        remove_waste(run, plan.waste)
    finally:
        claim.release()


def plan_kept(run: Run, wish: Retention, *, ongoing: bool) -> Kept:
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


def remover(wish: Retention | str | None) -> Callable[[Folder], object]:
    """What is done after each snapshot of a training that keeps only what a wish needs; nothing without a wish.

    Raises:
        TargetError: The wish is none.
    """
    if wish is None:
        return lambda folder: None
    retention = parse_retention(wish) if isinstance(wish, str) else wish

    def remove(folder: Folder) -> None:
        run = open_run(folder)
        kept = plan_kept(run, retention, ongoing=True)
        freed = sum(remove_snapshot(run.snapshots[index]) for index in kept.dropped)
        if freed:
            _log.info("%d snapshots removed, %d bytes freed", len(kept.dropped), freed)

    return remove


def _all_of(run: Run) -> Kept:
    return Kept(tuple(range(len(run.snapshots))), (), (), 0)
