"""Thinning: which groups of stored averages go, all of a group at once, so that goals stay near enough."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sharded_phema.fit import Fit, Problem, posed, solved
from sharded_phema.horizon import Goal
from sharded_phema.movement import Movement
from sharded_phema.profile import Profile
from sharded_phema.select import spread

__all__ = ["Limit", "Thinned", "thinned"]

Array = NDArray[np.float64]
Indices = NDArray[np.int64]

# Costs so close are rounding apart: the first group of them goes, on every machine.
_TIE = 1.0 + 1e-9
# The factor is made anew when the groups are this much fewer, or a row of it fell so far (squared) that rounding shows.
_FEWER, _FALLEN = 0.7, 1e-10
# Forecasts this much above what is allowed are rounding.
_CLOSE = 1.0 + 1e-6


@dataclass(frozen=True, slots=True)
class Limit:
    """When to stop.

    Args:
        error: Largest error of each goal but for rounding of one average; infinite if sizes alone count.
        rise: What may be added to the error of a goal that is too far off at first, in quadrature.
        size: Size that is small enough; 0 if errors alone count.
    """

    error: float
    rise: float
    size: float


@dataclass(frozen=True, slots=True, eq=False)
class Thinned:
    """What is left, and the fits of the goals before and after."""

    kept: tuple[int, ...]
    before: tuple[Fit, ...]
    after: tuple[Fit, ...]


def thinned(
    groups: Sequence[Sequence[Profile]],
    sizes: Sequence[float],
    goals: Sequence[Goal],
    limit: Limit,
    *,
    fixed: Collection[int],
    movement: Movement,
    noise: Sequence[float],
) -> Thinned:
    """Leave out one group after the other, each time the one without which the worst goal is least worse.

    Args:
        groups: Profiles of the averages in each group, as many in each, all different.
        sizes: Size of each group.
        goals: What is to be rebuilt, at least one.
        limit: When to stop.
        fixed: Groups that stay.
        movement: How fast weights move.
        noise: As ``fit`` takes it, for every average.

    Raises:
        TargetError: As ``fit``.
        ForecastError: As ``fit``.
    """
    sources, profiles = [profile for group in groups for profile in group], [goal.profile for goal in goals]
    problem = posed(sources, profiles, metric="trajectory", movement=movement, noise=noise)
    width, scale = len(groups[0]), max(profile.t for profile in (*sources, *profiles))
    units = np.array([goal.unit for goal in goals]) / scale
    # A stored average is read, not rebuilt.
    stays = {*fixed, *(problem.stored[problem.stored >= 0] // width).tolist()}
    rounding = float(problem.noise[-width:].mean())
    gone = _eliminate(problem, width, np.asarray(sizes, dtype=np.float64), units, limit, stays)
    before = solved(problem, np.arange(len(sources)))
    allowed = _allowed(limit, _squares(before, problem.raw), units, rounding) * _CLOSE
    while True:
        kept = np.setdiff1d(np.arange(len(groups)), gone)
        after = solved(problem, _members(kept, width))
        # Groups whose averages are all but the same are hard to tell apart: what went too far comes back.
        if not gone or limit.size or bool((_squares(after, problem.raw) <= allowed).all()):
            return Thinned(tuple(kept.tolist()), before, after)
        gone.pop()


def _eliminate(problem: Problem, width: int, sizes: Array, units: Array, limit: Limit, stays: set[int]) -> list[int]:
    """Groups in the order in which they go."""
    rebuilt = np.flatnonzero(problem.stored < 0)
    free = np.array([k for k in range(sizes.size) if k not in stays], dtype=np.int64)
    if rebuilt.size == 0:
        enough = np.cumsum(sizes[free]) - sizes[free] < sizes.sum() - limit.size
        return list(free[enough].tolist())
    if free.size == 0:
        return []
    blocks, units = _Blocks(problem, rebuilt, width), units[rebuilt]
    allowed = _allowed(limit, blocks.squares, units, float(problem.noise[-width:].mean()))
    left, gone = float(sizes.sum()), []
    while free.size and left > limit.size:
        rises = blocks.rises(free)
        if limit.size:
            over = (rises / units).max(axis=1) / sizes[free]
        else:
            over = (rises / np.maximum(allowed - blocks.squares, math.ulp(0.0))).max(axis=1)
        if not limit.size and over.min() > 1.0:
            break
        chosen = int(np.flatnonzero(over <= over.min() * _TIE)[0])
        gone.append(int(free[chosen]))
        left -= float(sizes[free[chosen]])
        blocks.remove_(gone[-1])
        free = np.delete(free, chosen)
    return gone


class _Blocks:
    """The inverse of the factored problem, as ``select`` has it, with a block of rows for each group.

    A group may go when its coefficients vanish, all of them: y then lies on the intersection of as many planes. With
    rows W_b and coefficients c_b of the group that adds ``c_b' (W_b W_b')^-1 c_b`` to the squared error. Rows of a
    group are made orthonormal first, which changes no intersection; averages of one moment are nearly alike.
    """

    def __init__(self, problem: Problem, which: Indices, width: int) -> None:
        self._problem, self._which, self._width = problem, which, width
        self.active: Indices
        self.squares: Array
        self._rows: Array  # (groups, width, directions)
        self._coefficients: Array  # (groups, width, goals)
        self._members: int
        self._remake(np.arange(problem.noise.size // width))

    def rises(self, groups: Indices) -> Array:
        """What removal of each active group adds to the squared error of each goal, (groups, goals)."""
        places = np.searchsorted(self.active, groups)
        some = self._coefficients[places]
        rises: Array = (some * np.linalg.solve(self._gram()[places], some)).sum(axis=1)
        return rises

    def remove_(self, group: int) -> None:
        """Take an active group out."""
        place = int(np.searchsorted(self.active, group))
        basis, triangle = np.linalg.qr(self._rows[place].T)
        distance = np.linalg.solve(triangle.T, self._coefficients[place])
        self.squares = self.squares + np.square(distance).sum(axis=0)
        others = np.arange(self.active.size) != place
        self.active, rows = self.active[others], self._rows[others]
        along = rows @ basis
        self._coefficients = self._coefficients[others] - along @ distance
        self._rows = rows - along @ basis.T
        few = self.active.size <= _FEWER * self._members
        if few or float(np.linalg.eigvalsh(self._gram()).min(initial=1.0)) < _FALLEN:
            self._remake(self.active)

    def _gram(self) -> Array:
        gram: Array = self._rows @ self._rows.transpose(0, 2, 1)
        return gram

    def _remake(self, active: Indices) -> None:
        self.active, self._members = active, active.size
        coefficients, inverse, self.squares = spread(self._problem, _members(active, self._width), self._which)
        shape = (active.size, self._width, -1)
        self._rows, self._coefficients = inverse.reshape(shape), coefficients.reshape(shape)
        if active.size > 1:  # a group alone has fewer directions than averages, and nothing to be compared with
            basis, triangle = np.linalg.qr(self._rows.transpose(0, 2, 1))
            self._coefficients = np.linalg.solve(triangle.transpose(0, 2, 1), self._coefficients)
            self._rows = basis.transpose(0, 2, 1).copy()


def _allowed(limit: Limit, squares: Array, units: Array, rounding: float) -> Array:
    """Squared error that each goal may have.

    Rounding of one stored average comes with every average that is tracked; none is asked to be better than that.
    """
    # Raw weights are no distance from themselves: no limit would be none times infinity.
    within = limit.error**2 * np.maximum(units, np.finfo(np.float64).tiny) + rounding
    # A goal that is within reach stays there, however near it is to the limit.
    allowed: Array = np.where(squares > within, squares + limit.rise**2 * units, within)
    return allowed


def _squares(fits: Sequence[Fit], raw: Array) -> Array:
    """Squared errors, with time divided by the largest ``t``."""
    return np.square([fit.forecast for fit in fits] * raw)


def _members(groups: Indices, width: int) -> Indices:
    """Averages of the groups."""
    members: Indices = (groups[:, None] * width + np.arange(width)).ravel()
    return members
