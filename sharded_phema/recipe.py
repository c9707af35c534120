"""Recipe: which stored averages, with which weights, make up each target. Reads records, no tensors."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sharded_phema.errors import ForecastError, TargetError
from sharded_phema.fit import Fit, Metric, fit
from sharded_phema.movement import Movement
from sharded_phema.per_tensor import Output
from sharded_phema.profile import Profile
from sharded_phema.select import Tolerance, select
from sharded_phema.source import MovementWish, Source, movement_in, noise_of, sources_of
from sharded_phema.store import Damaged, Run, snapshot_folder
from sharded_phema.target import Target

__all__ = ["Plan", "PlannedOutput", "PlannedTarget", "Summary", "plan_rebuild", "recipe_text"]

Array = NDArray[np.float64]
Solution = tuple[tuple["PlannedTarget", ...], tuple["PlannedOutput", ...], Array]


@dataclass(frozen=True, slots=True)
class PlannedTarget:
    """A target, the training time at which it is rebuilt, and its fit to the sources.

    ``forecast_before`` is the forecast as if no snapshot had to be left out, as far as the records of those still tell.
    """

    target: Target
    t: float
    profile: Profile
    fit: Fit
    forecast_before: float


@dataclass(frozen=True, slots=True)
class PlannedOutput:
    """One rebuilt model, and for each parameter the index of its target in the plan."""

    output: Output
    choice: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Summary:
    """What carrying a plan out moved.

    Attributes:
        read: Bytes of tensor files, over all workers; those of this call.
        written: Bytes of outputs.
        seconds: From the first look at the run to the last byte.
        workers: How many shared the work.
        finished: Whether the output is there. It is not while other workers, started apart, are still at it.
    """

    read: int
    written: int
    seconds: float
    workers: int
    finished: bool


@dataclass(frozen=True, slots=True)
class Plan:
    """What a reconstruction reads, and with which weights.

    Attributes:
        run: The run folder.
        targets: What is rebuilt, each target once.
        outputs: The models that are written.
        sources: Every stored average that some target uses, in order of time.
        coefficients: Weight of each source in each target, float64 of shape (sources, targets).
        summary: What carrying it out moved; None before.
    """

    run: Run
    targets: tuple[PlannedTarget, ...]
    outputs: tuple[PlannedOutput, ...]
    sources: tuple[Source, ...]
    coefficients: Array = field(repr=False)
    summary: Summary | None = None

    @property
    def left_out(self) -> tuple[Damaged, ...]:
        """Snapshots that are not used because they are damaged."""
        return _lost(self.run)

    @property
    def bytes_to_read(self) -> int:
        """Bytes of the averages of each source that some output uses, each read once.

        What is stored as it is does not count: it is read once from one snapshot for each target's time.
        """
        total, widths = 0, self.run.snapshots[0].widths
        for index, parameter in enumerate(self.run.record.parameters):
            some = sorted({output.choice[index] for output in self.outputs})
            times = int(np.any(self.coefficients[:, some] != 0, axis=1).sum())
            total += widths[index] * math.prod(parameter.shape) * times
        return total

    def snapshot_of(self, output: PlannedOutput) -> int:
        """The run's snapshot, by number, with the rest of the model as of an output's time.

        That is the last one at or before the latest time of its targets, or the first one.
        """
        t = max(self.targets[index].t for index in output.choice)
        return max([number for number, snapshot in enumerate(self.run.snapshots) if snapshot.t <= t], default=0)


def plan_rebuild(
    run: Run,
    outputs: Sequence[Output],
    *,
    tolerance: Tolerance = "auto",
    metric: Metric = "trajectory",
    movement: MovementWish = "auto",
    once: Callable[[Callable[[], Solution]], Solution] = lambda solve: solve(),
) -> Plan:
    """Decide which stored averages make up each target. Reads no tensors.

    Args:
        run: Where the averages are stored.
        outputs: What to rebuild. A target without a time is rebuilt at the last snapshot.
        tolerance: How many sources are read. A number: the fewest found whose forecast error, relative to
            |raw weights - target|, is no larger. ``auto``: the same with 1e-3, or with what rounding of the stored
            averages makes if that is more; never refused. ``exact``: all. The density metrics always use all.
        metric: Which error the coefficients minimise.
        movement: How fast the weights moved at what time: ``measured`` takes it from the norms in the snapshots,
            ``constant`` takes it as the same at all times, ``auto`` as the same unless they all but stopped at the
            end; or the learning rate of the run, as a function of training time or as (times, rates).
        once: Runs the solve; several processes solve once and share, so that their plans agree to the last bit.

    Raises:
        StoreError: The run has no snapshots.
        TargetError: A time lies before the first or after the last snapshot, or a parameter has no target.
        ForecastError: The forecast of a target is above the tolerance, a number.
    """
    planned, chosen, weights = once(lambda: _solution(run, outputs, tolerance, metric, movement))
    used = np.flatnonzero(np.any(weights != 0, axis=1))
    pool = sources_of(run)
    return Plan(run, planned, chosen, tuple(pool[i] for i in used), weights[used])


def _solution(
    run: Run, outputs: Sequence[Output], tolerance: Tolerance, metric: Metric, movement: MovementWish
) -> Solution:
    pool = sources_of(run)
    names = [parameter.name for parameter in run.record.parameters]
    choices = [output.choice(names) for output in outputs]
    targets = tuple(dict.fromkeys(target for choice in choices for target in choice))
    planned, weights = _fitted(run, pool, targets, tolerance, metric, movement_in(run, movement))
    if (before := _as_if_whole(run)) is not run:
        all_of_it = (before, sources_of(before), targets, tolerance, metric, movement_in(before, movement))
        fits = [one.fit.forecast for one in _fitted(*all_of_it)[0]]
        planned = tuple(replace(one, forecast_before=fit) for one, fit in zip(planned, fits, strict=True))
    if isinstance(tolerance, float | int):
        _check_tolerance(run, planned, tolerance)
    place = {target: k for k, target in enumerate(targets)}
    chosen = [PlannedOutput(o, tuple(place[t] for t in c)) for o, c in zip(outputs, choices, strict=True)]
    return planned, tuple(chosen), weights


def _lost(run: Run) -> tuple[Damaged, ...]:
    return tuple(damaged for damaged in run.damaged if not damaged.abandoned)


def _as_if_whole(run: Run) -> Run:
    """The run with the damaged snapshots whose records can be read, for forecasts; itself if there are none."""
    like, known = run.snapshots[0], {snapshot.t for snapshot in run.snapshots}
    facts = [damaged.facts for damaged in _lost(run) if damaged.facts and damaged.facts.t not in known]
    lost = {one.t: replace(like, name=snapshot_folder(one.session, one.snapshot), facts=one) for one in facts}
    order = sorted((*run.snapshots, *lost.values()), key=lambda snapshot: snapshot.t)
    return replace(run, snapshots=tuple(order)) if lost else run


def _fitted(
    run: Run,
    pool: Sequence[Source],
    targets: Sequence[Target],
    tolerance: Tolerance,
    metric: Metric,
    movement: Movement,
) -> tuple[tuple[PlannedTarget, ...], Array]:
    """Fits of the targets, those of one time together, and their coefficients, (pool, targets)."""
    times = [_time(run, target) for target in targets]
    profiles = [target.profile(t, run.snapshots[0].start) for target, t in zip(targets, times, strict=True)]
    fits: dict[int, Fit] = {}
    weights = np.zeros((len(pool), len(targets)))
    for t in dict.fromkeys(times):
        chosen = [k for k, time in enumerate(times) if time == t]
        # The first snapshot at or after t closes the stretch in which the target's weights lie.
        horizon = min(snapshot.t for snapshot in run.snapshots if snapshot.t >= t)
        usable = [i for i, source in enumerate(pool) if source.snapshot.t <= horizon]
        sources, wanted = [pool[i].profile for i in usable], [profiles[k] for k in chosen]
        known: dict[str, Any] = {"movement": movement, "noise": noise_of([pool[i] for i in usable], movement)}
        if metric == "trajectory":
            read = np.flatnonzero(np.any(weights[usable] != 0, axis=1)).tolist()
            found = select(sources, wanted, tolerance=tolerance, keep=read, **known)
        else:
            found = fit(sources, wanted, metric=metric, **known)
        fits |= dict(zip(chosen, found, strict=True))
        weights[np.ix_(usable, chosen)] = np.stack([one.coefficients for one in found], axis=1)
    planned = tuple(
        PlannedTarget(targets[k], times[k], profiles[k], fits[k], fits[k].forecast) for k in range(len(targets))
    )
    return planned, weights


def _time(run: Run, target: Target) -> float:
    first, last = run.snapshots[0].t, run.snapshots[-1].t
    t = last if target.time is None else target.time
    if not first <= t <= last:
        raise TargetError(
            f"{target.text}: training time {t:g} lies outside the snapshots of {run.root.url}, "
            f"which span {run.record.unit} {first:g} to {last:g}"
            + (", the damaged ones left out" if _lost(run) else ""),
            hint=f"choose a time from {first:g} to {last:g}, or leave @t=... out for the last",
        )
    return t


def _check_tolerance(run: Run, planned: Sequence[PlannedTarget], tolerance: float) -> None:
    bad = [p for p in planned if not p.fit.forecast <= tolerance]
    if bad:
        worst = max(bad, key=lambda p: p.fit.forecast)
        raise ForecastError(
            f"{worst.target.text}: forecast error {worst.fit.forecast:.2g} of |raw - target| is above the tolerance "
            f"{tolerance:g} with the {len(run.snapshots)} snapshots of {run.root.url}",
            hint="ask for a width nearer the stored ones, raise --tolerance, or store more snapshots next time: "
            "sharded-phema plan shows how many",
        )


def recipe_text(plan: Plan, index: int, dtype: str, metric: str) -> str:
    """JSON of what one output folder holds and how it was made."""
    output, record = plan.outputs[index], plan.run.record
    head = {"format": "sharded_phema rebuilt average", "version": 1, "run": record.run, "unit": record.unit}
    parts = {k: _recipe(plan, k) for k in dict.fromkeys(output.choice)}
    facts: dict[str, Any] = {"dtype": dtype, "metric": metric}
    if plan.left_out:
        facts["left_out"] = [{"snapshot": lost.name, "reason": lost.reason} for lost in plan.left_out]
    if output.output.uniform and parts:
        return json.dumps(head | facts | next(iter(parts.values())), indent=1) + "\n"
    patterns = {pattern: target.text for pattern, target in output.output.patterns}
    whole = head | facts | {"patterns": patterns, "targets": list(parts.values())}
    return json.dumps(whole, indent=1) + "\n"


def _recipe(plan: Plan, target: int) -> dict[str, Any]:
    planned, averages = plan.targets[target], plan.run.record.averages
    return {
        "target": planned.target.text,
        "t": planned.t,
        "forecast": planned.fit.forecast,
        **({"forecast_before": planned.forecast_before} if plan.left_out else {}),
        "fit_part": planned.fit.fit_part,
        "rounding_part": planned.fit.rounding_part,
        "noise_gain": planned.fit.noise_gain,
        "sources": [
            {"t": s.snapshot.t, "average": averages[s.average], "coefficient": float(c)}
            for s, c in zip(plan.sources, plan.coefficients[:, target], strict=True)
            if c != 0
        ],
    }
