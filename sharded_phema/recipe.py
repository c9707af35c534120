"""Recipe: which stored averages, with which weights, make up each target. Reads records, no tensors."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from sharded_phema.errors import ForecastError, StoreError, TargetError
from sharded_phema.fit import Fit, Metric, fit
from sharded_phema.profile import Profile
from sharded_phema.store import Run, Snapshot
from sharded_phema.target import Target, parse_target

__all__ = ["Plan", "PlannedTarget", "Source", "plan_rebuild", "recipe_text", "sources_of"]


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


@dataclass(frozen=True, slots=True)
class PlannedTarget:
    """A target, the training time at which it is rebuilt, and its fit to the sources of the plan."""

    target: Target
    t: float
    profile: Profile
    fit: Fit


@dataclass(frozen=True, slots=True)
class Plan:
    """What a reconstruction reads, and with which weights.

    Attributes:
        run: The run folder.
        targets: What is rebuilt.
        sources: Every stored average that some target uses, in order of time.
        coefficients: Weight of each source in each target, float64 of shape (sources, targets).
    """

    run: Run
    targets: tuple[PlannedTarget, ...]
    sources: tuple[Source, ...]
    coefficients: NDArray[np.float64] = field(repr=False)

    @property
    def bytes_to_read(self) -> int:
        """Bytes of all sources, each read once whatever the number of targets."""
        return 4 * len(self.sources) * self.run.numel


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


def plan_rebuild(
    run: Run, targets: Sequence[Target], *, tolerance: float = math.inf, metric: Metric = "trajectory"
) -> Plan:
    """Decide which stored averages make up each target. Reads no tensors.

    Args:
        run: Where the averages are stored.
        targets: What to rebuild. A target without a time is rebuilt at the last snapshot.
        tolerance: Largest forecast error, relative to |raw weights - target|, that is accepted.
        metric: Which error the coefficients minimise.

    Raises:
        StoreError: The run has no snapshots.
        TargetError: A time lies before the first or after the last snapshot.
        ForecastError: The forecast of a target is above the tolerance.
    """
    pool = sources_of(run)
    times = [_time(run, target) for target in targets]
    profiles = [target.profile(t, run.snapshots[0].start) for target, t in zip(targets, times, strict=True)]
    fits: dict[int, Fit] = {}
    weights = np.zeros((len(pool), len(targets)))
    for t in dict.fromkeys(times):
        chosen = [k for k, time in enumerate(times) if time == t]
        # The first snapshot at or after t closes the stretch in which the target's weights lie.
        horizon = min(snapshot.t for snapshot in run.snapshots if snapshot.t >= t)
        usable = [i for i, source in enumerate(pool) if source.snapshot.t <= horizon]
        found = fit([pool[i].profile for i in usable], [profiles[k] for k in chosen], metric=metric)
        fits |= dict(zip(chosen, found, strict=True))
        weights[np.ix_(usable, chosen)] = np.stack([one.coefficients for one in found], axis=1)
    planned = tuple(PlannedTarget(targets[k], times[k], profiles[k], fits[k]) for k in range(len(targets)))
    _check_tolerance(run, planned, tolerance)
    used = np.flatnonzero(np.any(weights != 0, axis=1))
    return Plan(run, planned, tuple(pool[i] for i in used), weights[used])


def _time(run: Run, target: Target) -> float:
    first, last = run.snapshots[0].t, run.snapshots[-1].t
    t = last if target.time is None else target.time
    if not first <= t <= last:
        raise TargetError(
            f"{target.text}: training time {t:g} lies outside the snapshots of {run.root}, "
            f"which span {run.record.unit} {first:g} to {last:g}",
            hint=f"choose a time from {first:g} to {last:g}, or leave @t=... out for the last",
        )
    return t


def _check_tolerance(run: Run, planned: Sequence[PlannedTarget], tolerance: float) -> None:
    bad = [p for p in planned if not p.fit.forecast <= tolerance]
    if bad:
        worst = max(bad, key=lambda p: p.fit.forecast)
        raise ForecastError(
            f"{worst.target.text}: forecast error {worst.fit.forecast:.2g} of |raw - target| is above the tolerance "
            f"{tolerance:g} with the {len(run.snapshots)} snapshots of {run.root}",
            hint="ask for a width nearer the stored ones, raise --tolerance, or store more snapshots next time: "
            "sharded-phema plan shows how many",
        )


def recipe_text(plan: Plan, index: int, dtype: str, metric: str) -> str:
    """JSON of what one output folder holds and how it was made."""
    planned, record = plan.targets[index], plan.run.record
    sources = [
        {"t": s.snapshot.t, "average": record.averages[s.average], "coefficient": float(c)}
        for s, c in zip(plan.sources, plan.coefficients[:, index], strict=True)
        if c != 0
    ]
    return (
        json.dumps(
            {
                "format": "sharded_phema rebuilt average",
                "version": 1,
                "run": record.run,
                "target": planned.target.text,
                "t": planned.t,
                "unit": record.unit,
                "dtype": dtype,
                "metric": metric,
                "forecast": planned.fit.forecast,
                "noise_gain": planned.fit.noise_gain,
                "sources": sources,
            },
            indent=1,
        )
        + "\n"
    )
