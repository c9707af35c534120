"""Source: one stored average of a run, and how much the rounding of storage counts against what weights move."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sharded_phema.errors import StoreError
from sharded_phema.movement import Movement
from sharded_phema.profile import Profile
from sharded_phema.quadrature import quadrature
from sharded_phema.rounding import rounding_noise
from sharded_phema.store import Run, Snapshot
from sharded_phema.target import parse_target

__all__ = ["Source", "movement_per_time", "noise_of", "sources_of"]

_STORED = "float32"


@dataclass(frozen=True, slots=True)
class Source:
    """One stored average: which of the run's averages, and in which snapshot."""

    snapshot: Snapshot
    average: int

    @property
    def profile(self) -> Profile:
        """What it averages."""
        label = self.snapshot.record.averages[self.average]
        return parse_target(label).profile(self.snapshot.t, self.snapshot.start)


def sources_of(run: Run) -> tuple[Source, ...]:
    """Every stored average of a run, in order of time.

    Raises:
        StoreError: The run has no snapshots.
    """
    if not run.snapshots:
        raise StoreError(
            f"{run.root} holds no finished snapshot", hint="train past the first snapshot_every, or call ema.close()"
        )
    return tuple(Source(snapshot, k) for snapshot in run.snapshots for k in range(len(run.record.averages)))


def noise_of(sources: Sequence[Source], movement: Movement) -> tuple[float, ...]:
    """Rounding noise of each source over the movement of the weights in a unit of time, as ``fit`` takes it.

    All 0 where the movement cannot be told: the run tracks one average, or its weights do not move.
    """
    speed = _latest_movement(sources, movement)
    norms = (source.snapshot.norms for source in sources)
    if speed == 0.0:
        return (0.0,) * len(sources)
    return tuple(
        rounding_noise(_STORED, norm[source.average]) / speed if norm else 0.0
        for source, norm in zip(sources, norms, strict=True)
    )


def movement_per_time(snapshot: Snapshot, movement: Movement) -> float:
    """Squared distance that the weights walk in a unit of time, from what averages of one snapshot differ by.

    Two averages of weights that walk randomly differ by ``|avg_i - avg_j|^2 = D ∫ (F_i - F_j)^2 s^2 dtau``, s being
    the relative movement. 0 where the snapshot holds no two averages that differ.
    """
    profiles = [Source(snapshot, k).profile for k in range(len(snapshot.record.averages))]
    rule = quadrature(profiles, movement)
    paths = rule.paths(profiles)
    pairs = itertools.combinations(range(len(profiles)), 2)
    spans = [float(np.square(paths[:, i] - paths[:, j]).sum()) * rule.scale for i, j in pairs]
    return sum(snapshot.gaps) / sum(spans) if snapshot.gaps and sum(spans) > 0.0 else 0.0


def _latest_movement(sources: Sequence[Source], movement: Movement) -> float:
    """Movement at the last snapshot that tells it, nearest to what is rebuilt."""
    latest = {source.snapshot.t: source.snapshot for source in sources}
    speeds = (movement_per_time(latest[t], movement) for t in sorted(latest, reverse=True))
    return next((speed for speed in speeds if speed > 0.0), 0.0)
