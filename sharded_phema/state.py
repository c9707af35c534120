"""The state of a run's averages: a clock and the tensors, to and from checkpoints and snapshots."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from sharded_phema.errors import ModelMismatch, StoreError
from sharded_phema.layout import ParamShard, ShardLayout, whole
from sharded_phema.store import BoxTensor, Run, Snapshot

__all__ = ["Clock", "fill_from_snapshot", "load_state", "state_of"]

Averages = Mapping[str, ShardLayout]
"""Each tracked average's shards, by its label."""


@dataclass(frozen=True, slots=True)
class Clock:
    """Where a run stands, in its unit of training time.

    Attributes:
        t: Last call of update.
        updated: Last update of the averages; weights since then are not in them yet.
        start: First update of the averages, infinity before it.
    """

    t: float = 0.0
    updated: float = 0.0
    start: float = math.inf

    def at(self, t: float) -> Clock:
        """The clock at a later time."""
        return replace(self, t=t)

    def after_update(self) -> Clock:
        """The clock after the averages were updated now."""
        return replace(self, updated=self.t, start=min(self.start, self.t))


def state_of(clock: Clock, averages: Averages) -> dict[str, Any]:
    """State as nested dictionaries of tensors: float64 clock, and aliases of the float32 averages."""
    tensors = {label: {shard.name: _tensor(shard) for shard in layout} for label, layout in averages.items()}
    return {"clock": {key: torch.tensor(value, dtype=torch.float64) for key, value in asdict(clock).items()}, **tensors}


def _tensor(shard: ParamShard) -> Tensor:
    # A parameter that is whole on this rank stays an ordinary tensor, so that torch.save takes it too.
    if shard.boxes == (whole(shard.global_shape),):
        return shard.local.view(shard.global_shape)
    return BoxTensor.of(shard)


@torch.no_grad()
def load_state(state: Mapping[str, Any], averages: Averages) -> Clock:
    """Copy a state into the averages and give its clock; a state that does not fit changes nothing.

    Raises:
        ModelMismatch: An average or parameter is missing, too many, or of another shape.
    """
    _check_keys("the state", {"clock", *averages}, set(state))
    _check_keys("the state's clock", {field.name for field in fields(Clock)}, set(state["clock"]))
    for label, layout in averages.items():
        _check_keys(label, {shard.name for shard in layout}, set(state[label]))
        for shard in layout:
            _check_piece(label, shard, state[label][shard.name])
    for label, layout in averages.items():
        for shard in layout:
            for offsets, piece in BoxTensor.of(shard).pieces.items():
                piece.copy_(_piece(state[label][shard.name], offsets, piece))
    return Clock(**{key: float(value) for key, value in state["clock"].items()})


def _check_keys(where: str, expected: set[str], found: set[str]) -> None:
    if expected != found:
        raise ModelMismatch(
            f"{where}: expected also {sorted(expected - found)[:3]}, found unexpected {sorted(found - expected)[:3]}",
            hint="load the state into a PostHocEMA of the same model with the same averages",
        )


def _check_piece(label: str, shard: ParamShard, value: object) -> None:
    if not isinstance(value, Tensor):
        raise ModelMismatch(
            f"{label}: {shard.name} is a {type(value).__name__} in the state, expected a tensor",
            hint="load a state that PostHocEMA.state_dict gave",
        )
    missing = isinstance(value, BoxTensor) and set(BoxTensor.of(shard).pieces) - set(value.pieces)
    if tuple(value.shape) != shard.global_shape or missing:
        raise ModelMismatch(
            f"{label}: {shard.name} has shape {tuple(value.shape)} in the state, the model has {shard.global_shape}"
            + (f", and the boxes at {sorted(map(tuple, missing))} are not on this rank" if missing else ""),
            hint="load through torch.distributed.checkpoint, which brings each rank its own boxes",
        )


def _piece(value: Tensor, offsets: torch.Size, like: Tensor) -> Tensor:
    if isinstance(value, BoxTensor):
        return value.pieces[offsets]
    return value[tuple(slice(o, o + s) for o, s in zip(offsets, like.shape, strict=True))]


@torch.no_grad()
def fill_from_snapshot(run: Run, t: float | None, averages: Averages) -> Clock:
    """Copy this rank's boxes of the snapshot at ``t`` (None: the last) into the averages, and give its clock.

    Raises:
        StoreError: No such snapshot, or it is damaged.
    """
    snapshot = _snapshot_at(run, t)
    try:
        for index, layout in enumerate(averages.values()):
            for parameter, shard in enumerate(layout):
                for box, piece in zip(shard.boxes, BoxTensor.of(shard).pieces.values(), strict=True):
                    piece.copy_(torch.from_numpy(snapshot.read_box(index, parameter, box)))
    except StoreError as error:
        before = [other.t for other in run.snapshots if other.t < snapshot.t]
        mend = f"resume(t={before[-1]:.17g}), with weights of that time" if before else "start a new run elsewhere"
        raise StoreError(error.message, hint=f"restore the file from a backup, or {mend}") from error
    return Clock(snapshot.t, snapshot.t, snapshot.start)


def _snapshot_at(run: Run, t: float | None) -> Snapshot:
    found = [snapshot for snapshot in run.snapshots if t is None or snapshot.t == t]
    times = ", ".join(f"{snapshot.t:g}" for snapshot in run.snapshots) or "none"
    last = run.snapshots[-1].t if run.snapshots else 0.0
    broken = [
        each
        for each in run.damaged
        if not each.abandoned and (each.facts is None or (each.facts.t > last if t is None else each.facts.t == t))
    ]
    if broken and (t is None or not found):
        # It may be the last one: going back unasked to the one before would average other weights in.
        raise StoreError(
            f"{run.root.url}: {broken[0].name} is damaged, and may be the one to resume from; whole ones: {times}. "
            f"{broken[0].reason}",
            hint="restore it from a backup, or resume from the time of a whole one, with weights of the same time",
        )
    if not found:
        raise StoreError(
            f"{run.root.url}: no snapshot {'at all' if t is None else f'at t={t:.17g}'}; there are: {times}",
            hint="resume from a time in the list, or start a new run in its own folder",
        )
    return found[-1]
