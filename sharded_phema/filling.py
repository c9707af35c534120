"""Filling: an average into each rank's own shards: a tracked one as it is, any other rebuilt from the snapshots."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from sharded_phema.averages import Averages
from sharded_phema.errors import OrderError
from sharded_phema.layout import ShardLayout
from sharded_phema.losses import Losses, leaving_out
from sharded_phema.per_tensor import Wanted, parse_outputs
from sharded_phema.recipe import Plan, plan_rebuild
from sharded_phema.store import Run
from sharded_phema.sums import fill_shards
from sharded_phema.target import parse_target
from sharded_phema.tracked import TrackedSet
from sharded_phema.world import agree, from_first

__all__ = ["filler", "one_of"]


def filler(
    wanted: Wanted, tracked: TrackedSet, averages: Averages, layout: ShardLayout, *, stored: Callable[[], Run]
) -> Callable[[], object]:
    """What writes an average into the local shards. Called by every rank, as is what it gives.

    Args:
        wanted: A target, or targets by patterns of parameter names.
        tracked: What the averages follow.
        averages: As they are now.
        layout: Live local shards.
        stored: Gives the run, for what is not tracked.

    Raises:
        OrderError: It is not tracked, and there is no snapshot yet.
        TargetError: The target is none, or cannot be rebuilt at its time.
        StoreError: The snapshots are missing or damaged.
    """
    index = None if isinstance(wanted, Mapping) else tracked.find(parse_target(wanted))
    if index is not None:
        return partial(averages.copy_to_params_, index)
    return _rebuilt(wanted, stored, layout, tracked=tracked.asked)


def _rebuilt(
    wanted: Wanted, stored: Callable[[], Run], layout: ShardLayout, *, tracked: Sequence[object]
) -> Callable[[], object]:
    """What writes a rebuilt average into the local shards. Collective, as is what it gives."""
    outputs = parse_outputs([wanted])
    run = agree(stored)
    if not run.snapshots:
        raise OrderError(
            f"swapped: {wanted} is not tracked; this run tracks {list(tracked)}, and has stored no "
            "snapshot from which it could be rebuilt",
            hint="swap one of those, or call ema.snapshot() first",
        )

    def planned(run: Run) -> Plan:
        return plan_rebuild(run, outputs, once=from_first)

    def fill(plan: Plan, losses: Losses) -> None:
        agree(lambda: fill_shards(plan, layout, losses))

    plan = planned(run)
    return lambda: leaving_out(plan, planned, fill)


def one_of(target: Wanted | None, sigma_rel: float | None) -> Wanted:
    """The one that is given.

    Raises:
        OrderError: None or both are.
    """
    given = [value for value in (target, sigma_rel) if value is not None]
    if len(given) != 1:
        raise OrderError(f"swapped takes one average, found {len(given)}", hint="for example swapped(sigma_rel=0.10)")
    return given[0]
