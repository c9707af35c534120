"""Source: one stored average of a run, and what the norms beside it tell: how weights moved, what rounding counts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from sharded_phema.errors import StoreError, TargetError
from sharded_phema.movement import STEADY, Movement, Rate, movement_of
from sharded_phema.profile import Profile
from sharded_phema.quadrature import quadrature
from sharded_phema.rounding import rounding_noise
from sharded_phema.store import Run, Snapshot
from sharded_phema.target import parse_target

__all__ = ["MovementWish", "Source", "movement_in", "movement_per_time", "noise_of", "sources_of"]

MovementWish = Rate | Literal["auto", "measured", "constant"]
"""A learning rate, or where the movement of the weights is taken from."""

# The rate at the end is at least this share of the last one measured.
_LEAST = 0.02
# Weights that end slower than this share of their fastest are not taken for a steady walk.
_SLOW = 0.1


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
            f"{run.root.url} holds no finished snapshot",
            hint="train past the first snapshot_every, or call ema.close()",
        )
    return tuple(Source(snapshot, k) for snapshot in run.snapshots for k in range(len(run.record.averages)))


def movement_in(run: Run, wish: MovementWish) -> Movement:
    """How fast the weights of a run moved, relative to the most: as its snapshots tell, as its learning rate, or alike.

    ``auto`` takes the weights for a steady walk unless the snapshots tell that they all but stopped, as they do when
    the learning rate falls to 0: then it is as measured. A steady walk needs fewer sources and is nearly as good where
    the rate stays; where weights stop, it expects far too much of the distance to the raw weights.

    What snapshots tell is the movement at the time that the gap between their averages looks at. Between these times
    lie straight lines; from the last one to the end of the run the line of the last two goes on, not below a fiftieth.

    Raises:
        TargetError: The learning rate is none.
    """
    end = run.snapshots[-1].t
    if wish == "constant":
        return STEADY
    if wish not in ("auto", "measured"):
        if isinstance(wish, str):
            raise TargetError(
                f"movement: expected auto, measured, constant or a learning rate, found {wish!r}",
                hint="a learning rate is a function of training time, or (times, rates)",
            )
        return movement_of(wish, end)
    measured = _measured(run, end)
    steady = wish == "auto" and float(measured.at(np.array([end]))[0]) >= _SLOW
    return STEADY if steady else measured


def _measured(run: Run, end: float) -> Movement:
    # Later snapshots look at later times; what rounding or a resume put out of order tells nothing new.
    looks: list[tuple[float, float]] = []
    for snapshot in run.snapshots:
        speed, time = _look(snapshot, STEADY)
        if speed > 0.0 and (not looks or time > looks[-1][0]):
            looks.append((time, math.sqrt(speed)))
    if len(looks) < 2:
        return STEADY
    (before, slower), (last, rate) = looks[-2:]
    ahead = rate + (rate - slower) / (last - before) * (end - last)
    times, rates = zip(*looks, (end, max(ahead, _LEAST * rate)), strict=True)
    return movement_of((times, rates), end)


def noise_of(sources: Sequence[Source], movement: Movement) -> tuple[float, ...]:
    """Rounding noise of each source over the movement of the weights in a unit of time, as ``fit`` takes it.

    All 0 where the movement cannot be told: the run tracks one average, or its weights do not move.
    """
    latest = {source.snapshot.t: source.snapshot for source in sources}
    # The last snapshot that tells the movement is nearest to what is rebuilt.
    speeds = (movement_per_time(latest[t], movement) for t in sorted(latest, reverse=True))
    speed = next((speed for speed in speeds if speed > 0.0), 0.0)
    if speed == 0.0:
        return (0.0,) * len(sources)
    norms = (source.snapshot.norms for source in sources)
    return tuple(
        rounding_noise(source.snapshot.record.dtype, norm[source.average]) / speed if norm else 0.0
        for source, norm in zip(sources, norms, strict=True)
    )


def movement_per_time(snapshot: Snapshot, movement: Movement) -> float:
    """Squared distance that the weights walk in a unit of time, at the largest rate of the movement.

    Two averages of weights that walk randomly differ by ``|avg_i - avg_j|^2 = D ∫ (F_i - F_j)^2 s^2 dtau``, s being
    the relative movement. 0 where the snapshot holds no two averages that differ.
    """
    return _look(snapshot, movement)[0]


def _look(snapshot: Snapshot, movement: Movement) -> tuple[float, float]:
    """Movement per time as one snapshot tells it, and the mean time that it looks at."""
    profiles = [Source(snapshot, k).profile for k in range(len(snapshot.record.averages))]
    rule = quadrature(profiles, movement)
    tau = rule.nodes * rule.scale
    paths = [profile.cumulative(tau) for profile in profiles]
    kernel = sum((np.square(a - b) for a, b in itertools.combinations(paths, 2)), np.zeros(tau.size))
    kernel = kernel * np.square(rule.roots * rule.speed)
    span = float(kernel.sum()) * rule.scale
    if not (snapshot.gaps and span > 0.0):
        return 0.0, 0.0
    return math.fsum(snapshot.gaps) / span, float(kernel @ tau / kernel.sum())
