"""Kept: which snapshots of a run stay, by what will be wanted of them, and what it costs each target."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sharded_phema.errors import TargetError
from sharded_phema.horizon import Goal, earlier_ends, goals_for, past_of, wanted_later, wanted_now
from sharded_phema.movement import STEADY, Movement
from sharded_phema.retention import Retention
from sharded_phema.target import Target
from sharded_phema.thinning import Limit, Thinned, thinned

__all__ = ["Cost", "Kept", "Moment", "keep"]

# Where a target is out of reach, dropping may add this share of the tolerance to its error, in quadrature.
_RISE = 0.5
# Share of the squared tolerance that snapshots which are still to come may use up themselves.
_FUTURE = 0.5
# Snapshots that are looked at together; of more, stretches are thinned first, by this share of the squared tolerance.
_TOGETHER, _STRETCH, _FIRST = 96, 48, 0.01
# Where a size is the limit, stretches are thinned to so many times that.
_SPARE = 2.0


@dataclass(frozen=True, slots=True)
class Moment:
    """A snapshot, as far as it matters here.

    Args:
        t: Training time.
        start: Training time of the first weights that its averages hold.
        size: Bytes on disk.
    """

    t: float
    start: float
    size: int


@dataclass(frozen=True, slots=True)
class Cost:
    """What a choice of snapshots costs one target: forecasts of |rebuilt - target| / |raw - target| at time ``t``."""

    target: Target
    t: float
    before: float
    after: float


@dataclass(frozen=True, slots=True)
class Kept:
    """Which snapshots stay.

    Attributes:
        kept: Indices of those that stay, ascending; the last is among them.
        dropped: Indices of the others.
        costs: What it costs each target. ``before`` is what all snapshots reach, or of more than 96 those that are
            left when stretches have been thinned by a hundredth of the squared tolerance.
        freed: Bytes that the dropped snapshots take.
    """

    kept: tuple[int, ...]
    dropped: tuple[int, ...]
    costs: tuple[Cost, ...]
    freed: int

    @property
    def reached(self) -> float:
        """The tolerance that what is kept meets: the largest forecast."""
        return max((cost.after for cost in self.costs), default=0.0)


def keep(
    moments: Sequence[Moment],
    tracked: Sequence[Target],
    wish: Retention,
    *,
    movement: Movement = STEADY,
    noise: float | Sequence[float] = 0.0,
    ongoing: bool = False,
) -> Kept:
    """Decide which snapshots stay: the last one, and as few others as the wish allows. Reads and deletes nothing.

    The same arguments give the same answer; several processes, whose arithmetic may differ in the last digit, decide
    once and share it.

    Args:
        moments: The snapshots, in order of time; each holds every tracked average.
        tracked: The averages.
        wish: What to keep them for.
        movement: How fast weights move; of a run that goes on, also in the future.
        noise: As ``fit`` takes it, for every average of the first snapshot, of the second and so on.
        ongoing: Whether more snapshots will follow. Then targets without a time are wanted at every later end too, as
            well as they are now, and half of the squared tolerance is left to what is to come.

    Raises:
        TargetError: No snapshot, times that do not increase, a target that is wanted after the end of a run that is
            over, or a limit of bytes that the last snapshot alone exceeds.
        ForecastError: As ``fit``.
    """
    _check(moments, wish, ongoing)
    shares = np.broadcast_to(np.asarray(noise, dtype=np.float64), len(moments) * len(tracked))
    task = _Task(moments, tracked, wish, movement, shares, ongoing)
    some = task.by_stretches()
    done = task.thinned(some, task.goals, task.limit)
    kept = tuple(some[i] for i in done.kept)
    dropped = tuple(sorted(set(range(len(moments))) - set(kept)))
    fits = zip(task.now, done.before, done.after, strict=False)  # what later ends ask for comes behind
    costs = tuple(Cost(w.target, w.t, before.forecast, after.forecast) for w, before, after in fits)
    return Kept(kept, dropped, costs, sum(moments[i].size for i in dropped))


class _Task:
    """One decision: what its steps have in common."""

    def __init__(
        self,
        moments: Sequence[Moment],
        tracked: Sequence[Target],
        wish: Retention,
        movement: Movement,
        noise: NDArray[np.float64],
        ongoing: bool,
    ) -> None:
        self._moments, self._movement = moments, movement
        self._groups = [[label.profile(m.t, m.start) for label in tracked] for m in moments]
        self._noise = noise.reshape(len(moments), len(tracked))
        times, last, targets = [m.t for m in moments], moments[-1], wish.wanted
        earlier = earlier_ends(times, wish.earlier)
        # A target with a time of its own is refused where no snapshot is as early.
        own = [max(t for t in times if t <= target.time) for target in targets if target.time is not None]
        self._fixed = {i for i, t in enumerate(times) if t in (*earlier, *own, last.t)}
        self.now = wanted_now(targets, (last.t, *earlier), last.start)
        goals = goals_for(self.now, movement)
        if ongoing:
            atend = [wanted.t == last.t for wanted in self.now]
            goals = tuple(_eased(goal) if end else goal for goal, end in zip(goals, atend, strict=True))
            goals += tuple(_eased(goal) for goal in wanted_later(targets, times, last.start, movement))
        self.goals = goals
        # What rises add up to over a run of any length is then a share of the tolerance, too.
        since = 1.0 - times[-2] / last.t if ongoing and len(times) > 1 else 1.0
        error = math.inf if wish.tolerance is None else wish.tolerance
        rise = 0.0 if error == math.inf else _RISE * error * math.sqrt(since)
        # A count is a size, too: that of each snapshot is 1.
        self._sizes = [float(m.size) if wish.count is None else 1.0 for m in moments]
        size = float(wish.count or wish.bytes or 0)
        self.limit = Limit(error, rise, size)
        self._spare = max(_SPARE * size, _STRETCH * max(self._sizes)) if size else 0.0

    def by_stretches(self) -> tuple[int, ...]:
        """Not many more snapshots than are looked at together: a run is thinned from its begin, a stretch at a time."""
        count, some, limit = len(self._moments), tuple[int, ...](), self.limit
        ends = range(_STRETCH, count - _STRETCH, _STRETCH) if count > _TOGETHER else range(0)
        for end in ends:
            some = (*some, *range(some[-1] + 1 if some else 0, end))
            # Each stretch adds its share, and what came before may not use it up.
            root = math.sqrt(_FIRST * end / count)
            loose = Limit(limit.error * root, limit.rise * root, self._spare)
            kept = self.thinned(some, past_of(self.goals, self._moments[end - 1].t), loose).kept
            some = tuple(some[i] for i in kept)
        return (*some, *range(some[-1] + 1 if some else 0, count))

    def thinned(self, some: Sequence[int], goals: Sequence[Goal], limit: Limit) -> Thinned:
        """Some of the snapshots, thinned to the limit; the last of them and those that are ends stay."""
        fixed = [place for place, i in enumerate(some) if i in self._fixed or i == some[-1]]
        if not goals:
            return Thinned(tuple(fixed), (), ())
        return thinned(
            [self._groups[i] for i in some],
            [self._sizes[i] for i in some],
            goals,
            limit,
            fixed=fixed,
            movement=self._movement,
            noise=self._noise[list(some)].ravel().tolist(),
        )


def _eased(goal: Goal) -> Goal:
    return Goal(goal.profile, _FUTURE * goal.unit)


def _check(moments: Sequence[Moment], wish: Retention, ongoing: bool) -> None:
    times = [moment.t for moment in moments]
    if not times or any(b <= a for a, b in itertools.pairwise(times)):
        raise TargetError(
            f"retention: expected snapshots in order of time, found {times!r:.100}", hint="a run needs one at least"
        )
    for target in wish.wanted:
        if target.time is not None and (target.time < times[0] or (target.time > times[-1] and not ongoing)):
            raise TargetError(
                f"{target.text}: the snapshots are from {times[0]:.17g} to {times[-1]:.17g}",
                hint="ask for a time between the first and the last snapshot",
            )
    if wish.bytes is not None and wish.bytes < moments[-1].size:
        raise TargetError(
            f"retention: {wish.bytes} bytes are less than the last snapshot takes, {moments[-1].size}",
            hint="the last snapshot is always kept; give bytes for two at least",
        )
