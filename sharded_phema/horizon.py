"""Horizon: at which times targets are wanted of the snapshots that are there, now, earlier and as training goes on."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from sharded_phema.movement import STEADY, Movement
from sharded_phema.profile import Profile
from sharded_phema.profile.contract import Times
from sharded_phema.quadrature import quadrature
from sharded_phema.target import Target

__all__ = ["Goal", "Past", "Wanted", "earlier_ends", "goals_for", "past_of", "wanted_later", "wanted_now"]

# How far ahead a target is looked at where its shape moves with the end, or the rate is known to change.
_AHEAD = (1.01, 1.02, 1.05, 1.1, 1.2, 1.35, 1.5, 2.0, 3.0, 4.0)
_MOVING = ("window", "decay")
# Share of a target that is too small to matter: it enters errors squared.
_NOTHING = 1e-9


@dataclass(frozen=True, slots=True)
class Past:
    """What the weights up to ``t`` weigh in a profile that is read later, scaled to a profile read at ``t``.

    Args:
        whole: The profile, larger than 0 at ``t``.
        t: Training time, at most that of the profile.
    """

    whole: Profile
    t: float

    @property
    def knots(self) -> tuple[float, ...]:
        """Those of the profile, and ``t``."""
        return (*(knot for knot in self.whole.knots if knot < self.t), self.t)

    @property
    def steepness(self) -> float:
        """That of the profile, which no scale changes."""
        return self.whole.steepness

    def cumulative(self, tau: Times) -> Times:
        """Share from weights at or before ``tau``, of that from weights at or before ``t``."""
        return self.whole.cumulative(np.minimum(tau, self.t)) / _share(self.whole, self.t)

    def density(self, tau: Times) -> Times:
        """Derivative of the cumulative, without its jumps."""
        return np.where(tau <= self.t, self.whole.density(tau) / _share(self.whole, self.t), 0.0)


@dataclass(frozen=True, slots=True)
class Goal:
    """A profile that is to be rebuilt, and the unit of its error.

    Args:
        profile: What is rebuilt.
        unit: Squared distance in the trajectory metric, in the run's unit of time, that an error of 1 stands for.
    """

    profile: Profile
    unit: float


@dataclass(frozen=True, slots=True)
class Wanted:
    """A target at the training time at which it is wanted."""

    target: Target
    t: float
    start: float

    @property
    def profile(self) -> Profile:
        """What is rebuilt."""
        return self.target.profile(self.t, self.start)


def goals_for(wanted: Sequence[Wanted], movement: Movement) -> tuple[Goal, ...]:
    """What is wanted, an error of 1 being |raw - target|."""
    profiles = [one.profile for one in wanted]
    if not profiles:
        return ()
    rule = quadrature(profiles, movement)
    return tuple(Goal(profile, rule.scale * rule.distance_to_raw(profile) ** 2) for profile in profiles)


def past_of(goals: Sequence[Goal], t: float) -> tuple[Goal, ...]:
    """Goals for the weights up to ``t``, of those that look at them.

    Later averages make up the rest of a goal: the two errors lie on different stretches of time, and add in squares.
    """
    shares = [1.0 if goal.profile.t <= t else _share(goal.profile, t) for goal in goals]
    return tuple(
        goal if goal.profile.t <= t else Goal(Past(goal.profile, t), goal.unit / share**2)
        for goal, share in zip(goals, shares, strict=True)
        if share > _NOTHING
    )


def wanted_now(targets: Sequence[Target], ends: Sequence[float], start: float) -> tuple[Wanted, ...]:
    """Targets at each of the ends, and those with a time of their own up to the last end at that time."""
    own = [Wanted(target, target.time, start) for target in targets if target.time is not None]
    atend = [Wanted(target, t, start) for t in ends for target in targets if target.time is None]
    return (*atend, *(wanted for wanted in own if wanted.t <= ends[-1]))


def wanted_later(
    targets: Sequence[Target], times: Sequence[float], start: float, movement: Movement
) -> tuple[Goal, ...]:
    """What targets at later ends, all that there may be, ask of the snapshots up to now.

    A target that could be tracked is, up to now, always the same but for a factor that falls: it is asked for once, at
    the end that leaves it the least error. Of a window or decay, the begin moves over the snapshots between now and
    then, and is tried in the middle between each two.

    Args:
        targets: Averages that will be wanted.
        times: Those of the snapshots, ascending.
        start: Training time of the first weights that the averages hold.
        movement: How fast weights move, now and later.
    """
    ahead = [Wanted(target, t, start) for target in targets for t in _ends(target, times, movement)]
    seen: dict[Target, list[Goal]] = {target: [] for target in targets}
    for wanted, goal in zip(ahead, goals_for(ahead, movement), strict=True):
        seen[wanted.target] += past_of([goal], times[-1])
    goals: list[Goal] = []
    for target, some in seen.items():
        if some and target.time is None and target.kind not in _MOVING:
            some = [Goal(target.profile(times[-1], start), min(goal.unit for goal in some))]
        goals += some
    return tuple(goals)


def earlier_ends(times: Sequence[float], ratio: float) -> tuple[float, ...]:
    """First snapshot time at or after each power of the ratio, the last snapshot left out; none for an infinite one."""
    if ratio == math.inf:
        return ()
    first, last = (math.log(t) / math.log(ratio) for t in (times[0], times[-1]))
    powers = (ratio**k for k in range(math.floor(first), math.ceil(last) + 1))
    ends = {next((t for t in times if t >= power * (1.0 - 1e-12)), times[-1]) for power in powers}
    return tuple(sorted(ends - {times[-1]}))


def _ends(target: Target, times: Sequence[float], movement: Movement) -> Iterator[float]:
    now = times[-1]
    if target.time is not None:
        yield from (target.time,) * (target.time > now)
        return
    moves = target.kind in _MOVING
    if moves or movement is not STEADY:
        yield from (now * ratio for ratio in _AHEAD)
    if moves and target.amount < 1.0:
        middles = ((a + b) / 2.0 / (1.0 - target.amount) for a, b in itertools.pairwise(times))
        yield from (t for t in middles if now < t <= now * _AHEAD[-1])


def _share(profile: Profile, t: float) -> float:
    return float(profile.cumulative(np.array([t]))[0])
