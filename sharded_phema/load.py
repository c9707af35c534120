"""Loading: a rebuilt average, straight into a live model, each rank its own pieces, without a gather."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sharded_phema.errors import ModelMismatch
from sharded_phema.filling import fill_shards, flattened_shards
from sharded_phema.fit import Metric
from sharded_phema.grid import BLOCK
from sharded_phema.layout import Box, ParamShard, ShardLayout, cut, flattened
from sharded_phema.losses import Losses, leaving_out
from sharded_phema.manifest import Parameter, RawTensor, RunRecord
from sharded_phema.mapping import held_by
from sharded_phema.per_tensor import Wanted, parse_outputs
from sharded_phema.recipe import Plan, plan_rebuild
from sharded_phema.replicas import Shared, shared_out, spread
from sharded_phema.select import Tolerance
from sharded_phema.source import MovementWish
from sharded_phema.store import Run, Snapshot, open_whole
from sharded_phema.sums import Precision
from sharded_phema.swap import Own
from sharded_phema.world import agree, from_first

__all__ = ["load_into"]


def load_into(
    model: Any,
    target: Wanted,
    root: str | Path | Run,
    *,
    optimizer: Any = None,
    tolerance: Tolerance = "auto",
    metric: Metric = "trajectory",
    movement: MovementWish = "auto",
    precision: Precision = "float32",
) -> Plan:
    """Rebuild an average into a live model, sharded or not. Called by every rank.

    Each rank reads its own pieces, from snapshots that any number of ranks wrote. All that the run holds of the model
    is loaded: averages, and beside them, as of the target's time, what was copied into snapshots or stored once.
    Buffers that the run does not hold stay as they are. Until it is done, a copy of this rank's pieces is kept in host
    memory: where it fails, the model is what it was.

    Args:
        model: A module, plain, inside DistributedDataParallel, or sharded with FSDP1, FSDP2 or tensor parallelism; or
            a DeepSpeed engine.
        target: ``0.12``, ``"window:0.2"``, ``"decay:linear:0.2"``, or a mapping from patterns of parameter names to
            targets, as ``reconstruct`` takes them.
        root: Run folder, or a run, as ``reconstruct`` takes them.
        optimizer: As ``PostHocEMA`` takes it.
        tolerance: As ``reconstruct`` takes it.
        metric: The same.
        movement: The same.
        precision: The same.

    Returns:
        The plan, with the forecast of the target.

    Raises:
        ModelMismatch: The run is of another model.
        PhemaError: The target or the run folder will not do. The model is what it was.
    """
    outputs = parse_outputs([target])
    run = agree(lambda: open_whole(root))
    backend, held = held_by(model, optimizer, alike=False)
    live = agree(lambda: _live(run.record, held))

    def planned(run: Run) -> Plan:
        return plan_rebuild(run, outputs, tolerance=tolerance, metric=metric, movement=movement, once=from_first)

    def fill(plan: Plan, losses: Losses) -> None:
        agree(lambda: _fill(plan, live, losses, precision))

    plan = planned(run)
    own = Own((*live.averaged, *live.raw), live.shared, offload=True)
    try:
        done = leaving_out(plan, planned, fill)
        spread(live.shared)
    except BaseException:
        own.put_back()
        backend.publish(model, optimizer)
        raise
    backend.publish(model, optimizer)
    return done


@dataclass(frozen=True, slots=True)
class _Live:
    """This rank's pieces of a model, in the order of a run's record; of what all ranks hold, its part."""

    averaged: ShardLayout
    raw: ShardLayout
    shared: tuple[Shared, ...]


def _live(record: RunRecord, layout: ShardLayout) -> _Live:
    by_name = {shard.name: shard for shard in layout}
    averaged = shared_out(_chosen(record.parameters, by_name))
    raw = shared_out(_chosen(record.raw, by_name))
    known = {tensor.name for tensor in (*averaged[0], *raw[0])}
    for shard in layout:
        if shard.name not in known and shard.kind != "buffer":
            raise ModelMismatch(
                f"{shard.name}: expected a parameter of the run, found none of that name",
                hint="build the model as it was when the run was trained",
            )
    return _Live(averaged[0], raw[0], (*averaged[1], *raw[1]))


def _chosen(tensors: Iterable[Parameter | RawTensor], by_name: dict[str, ParamShard]) -> ShardLayout:
    found = []
    for tensor in tensors:
        shard = by_name.get(tensor.name)
        if shard is None or shard.global_shape != tensor.shape:
            has = "no tensor of that name" if shard is None else f"one of shape {shard.global_shape}"
            raise ModelMismatch(
                f"{tensor.name}: expected a tensor of shape {tensor.shape} in the model, found {has}",
                hint="build the model as it was when the run was trained",
            )
        found.append(shard)
    return tuple(found)


def _fill(plan: Plan, live: _Live, losses: Losses, precision: Precision) -> None:
    fill_shards(plan, live.averaged, losses, precision)
    snapshot, copied = plan.run.snapshots[plan.snapshot_of(plan.outputs[0])], len(plan.run.record.copied)
    with losses.reading(snapshot):
        _fill_raw(snapshot, 0, live.raw[:copied])
    # Frozen tensors are no snapshot's own: without them, no other snapshot would do either.
    _fill_raw(snapshot, copied, live.raw[copied:])


@torch.no_grad()
def _fill_raw(snapshot: Snapshot, first: int, shards: ShardLayout) -> None:
    with flattened_shards(shards) as flats:
        for index, (shard, flat) in enumerate(zip(shards, flats, strict=True), first):
            for start in range(0, flat.numel(), BLOCK):
                stop = min(start + BLOCK, flat.numel())
                parts = [_read(snapshot, index, shard, box) for box in cut(shard.boxes, start, stop)]
                flat[start:stop].copy_(torch.cat(parts))


def _read(snapshot: Snapshot, index: int, shard: ParamShard, box: Box) -> Tensor:
    run = flattened(box, shard.global_shape)
    if run is not None:
        return snapshot.read_raw(index, run.offsets[0], run.offsets[0] + run.numel)
    return snapshot.read_raw_box(index, box).reshape(-1)
