"""Filling: an average into each rank's own live shards: a tracked one as it is, any other rebuilt from snapshots."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import groupby

import torch
from torch import Tensor

from sharded_phema.averages import Averages
from sharded_phema.errors import OrderError
from sharded_phema.feed import Feed
from sharded_phema.layout import ShardLayout
from sharded_phema.losses import Losses, leaving_out
from sharded_phema.per_tensor import Wanted, parse_outputs
from sharded_phema.recipe import Plan, plan_rebuild
from sharded_phema.store import Piece, Run
from sharded_phema.sums import Precision, Strip, Sums, one_thread, strip_of, strips
from sharded_phema.target import parse_target
from sharded_phema.tracked import TrackedSet
from sharded_phema.world import agree, from_first

__all__ = ["fill_shards", "filler", "flattened_shards", "one_of"]


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


@torch.no_grad()
def fill_shards(plan: Plan, shards: ShardLayout, losses: Losses, precision: Precision = "float32") -> None:
    """Write the first output of a plan into local shards, rounded to their dtype. Reads only their boxes.

    Where this fails, some shards may have been written.

    Args:
        plan: What to rebuild.
        shards: One for each parameter of the run, in its order.
        losses: Told which snapshot cannot be read.
        precision: What sums are made in.

    Raises:
        StoreError: A snapshot is damaged or cannot be read.
    """
    feed = Feed(losses)
    shapes, choice = [shard.global_shape for shard in shards], plan.outputs[0].choice
    with flattened_shards(shards) as flats, one_thread():
        sums = Sums(plan, feed, strip_of(plan, precision=precision)[0], precision)
        jobs = (
            Strip((target,), strip)
            for target, chosen in groupby(range(len(shards)), lambda index: choice[index])
            for strip in strips((Piece.of(i, b, shapes[i]) for i in chosen for b in shards[i].boxes), sums.strip)
        )
        slots = _Slots(flats)
        try:
            for job, values in sums.over(jobs):
                slots.put(job.pieces, values[0])
            feed.finish()
        finally:
            feed.close()


@contextmanager
def flattened_shards(shards: ShardLayout) -> Iterator[list[Tensor]]:
    """Shards to be filled, each as one run of elements: aliases where they lie so, else copied back at the end."""
    flats = [s.local.view(-1) if s.local.is_contiguous() else torch.empty_like(s.local).reshape(-1) for s in shards]
    yield flats
    for shard, flat in zip(shards, flats, strict=True):
        if flat.data_ptr() != shard.local.data_ptr():
            shard.local.copy_(flat.view(shard.local.shape))


class _Slots:
    """Puts pieces, which come in the order of the shards and of their boxes, where they belong."""

    def __init__(self, flats: Sequence[Tensor]) -> None:
        self._flats, self._filled = flats, [0] * len(flats)

    def put(self, pieces: Sequence[Piece], values: Tensor) -> None:
        for piece, numbers in zip(pieces, torch.split(values, [piece.numel for piece in pieces]), strict=True):
            start = self._filled[piece.parameter]
            self._flats[piece.parameter][start : start + piece.numel].copy_(numbers)
            self._filled[piece.parameter] = start + piece.numel


def one_of(target: Wanted | None, sigma_rel: float | None) -> Wanted:
    """The one that is given.

    Raises:
        OrderError: None or both are.
    """
    given = [value for value in (target, sigma_rel) if value is not None]
    if len(given) != 1:
        raise OrderError(f"swapped takes one average, found {len(given)}", hint="for example swapped(sigma_rel=0.10)")
    return given[0]
