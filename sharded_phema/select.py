"""Select: few of the stored averages that still rebuild the targets well enough, by backward elimination."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from sharded_phema.errors import TargetError
from sharded_phema.fit import Fit, Problem, mirrored, posed, solved
from sharded_phema.movement import STEADY, Movement
from sharded_phema.profile import Profile

__all__ = ["AUTO", "Tolerance", "select", "spread"]

Array = NDArray[np.float64]
Indices = NDArray[np.int64]
Tolerance = float | Literal["auto", "exact"]

AUTO = 1e-3
"""Error relative to ``|raw - target|`` that ``auto`` accepts where rounding of the sources is smaller."""

# Where even all sources miss what auto asks for, it trades this factor of error for fewer sources.
_SLACK = 1.01
# Costs so close are rounding apart: the first source of them goes, on every machine.
_TIE = 1.0 + 1e-9
# Rounding of the columns themselves, which keeps equal sources apart.
_ROUNDING = 1e-14
# A factor is made anew when the sources are this much fewer, or a row of it fell so far (squared) that rounding shows.
_FEWER, _FALLEN = 0.7, 1e-16
# A row's squared length is summed anew when updates have taken this much from it.
_SHRUNK = 1e-3


def select(
    sources: Sequence[Profile],
    targets: Sequence[Profile],
    *,
    tolerance: Tolerance | Sequence[float] = "auto",
    budget: int | None = None,
    keep: Collection[int] = (),
    movement: Movement = STEADY,
    noise: float | Sequence[float] = 0.0,
) -> tuple[Fit, ...]:
    """Fits of all targets to the same few sources; coefficients of the sources that are left out are 0.

    Sources go one by one, each time the one without which the worst target, relative to what its tolerance leaves, is
    least worse. Then the rest is solved for anew. A target that no selection can rebuild to the tolerance is
    fitted to all sources; its forecast tells.

    Args:
        sources: Profiles of the stored averages, no two equal.
        targets: Profiles of the wanted averages.
        tolerance: Largest forecast, of all targets or of each. ``auto``: 1e-3, or what rounding of one source makes
            if that is more, or 1.01 times what all sources reach if that is still more. ``exact``: no source goes.
        budget: Largest number of sources. Alone, with the tolerance ``exact``, it is what is kept; with another
            tolerance sources go until both are met, the tolerance yielding.
        keep: Sources that stay in any case.
        movement: How fast weights move, where that changes.
        noise: As ``fit`` takes it.

    Raises:
        TargetError: As ``fit``, or a tolerance or budget that is not positive.
        ForecastError: As ``fit``.

    Source: backward elimination; what a source's removal costs follows from the constrained least-squares problem.
    """
    _check(tolerance, budget, len(targets))
    problem = posed(sources, targets, metric="trajectory", movement=movement, noise=noise)
    everything = np.arange(len(sources))
    most = len(sources) if budget is None else budget
    if tolerance == "exact" and most >= len(sources):
        return solved(problem, everything)
    # Stored targets are read, not rebuilt; what others need is measured without them.
    rebuilt = np.flatnonzero(problem.stored < 0)
    fixed = np.zeros(len(sources), dtype=bool)
    fixed[[*keep, *problem.stored[problem.stored >= 0]]] = True
    if rebuilt.size == 0:
        return solved(problem, np.flatnonzero(fixed))
    return solved(problem, _eliminate(problem, rebuilt, tolerance, most, fixed))


def _eliminate(
    problem: Problem, rebuilt: Indices, tolerance: Tolerance | Sequence[float], most: int, fixed: NDArray[np.bool_]
) -> Indices:
    """Sources that are left when none can go any more, ascending."""
    factor = _Factor(problem, rebuilt)
    allowed = _allowed(problem, rebuilt, tolerance, factor.squares)
    free = np.flatnonzero(~fixed)
    while free.size and factor.active.size > 1:
        rises = factor.rises(free)
        left = allowed - factor.squares
        over = np.divide(rises, left, out=np.full(rises.shape, np.inf), where=left > 0.0).max(axis=1)
        if over.min() > 1.0:
            if factor.active.size <= most:
                break
            over = (rises / np.where(allowed > 0.0, allowed, problem.raw[rebuilt] ** 2)).max(axis=1)
        chosen = int(np.flatnonzero(over <= over.min() * _TIE)[0])
        factor.remove_(int(free[chosen]))
        free = np.delete(free, chosen)
    return factor.active


class _Factor:
    """Inverse of the factored problem on the active sources: what each removal costs, and the fits after it.

    With the coefficients that sum to 1 written as ``c = c_0 + W y``, in which the squared error is ``|y|^2`` plus a
    constant, a coefficient vanishes where y lies on a plane at distance ``|c_k| / |w_k|``. So removal of source k
    adds ``c_k^2 / |w_k|^2`` to the squared error, a sum of positive numbers in which nothing cancels, and takes the
    direction of ``w_k`` out of W, which costs O(n^2).
    """

    def __init__(self, problem: Problem, which: Indices) -> None:
        self._problem, self._which = problem, which
        self._remake(np.arange(problem.noise.size))

    def _remake(self, active: Indices) -> None:
        self.active = self._members = active
        self._coefficients, self._spread, self.squares = spread(self._problem, active, self._which)
        self._gains = np.square(self._spread).sum(axis=1)  # |w_k|^2, kept up to date
        self._exact, self._first = self._gains.copy(), self._gains.copy()

    def rises(self, sources: Indices) -> Array:
        """What removal of each active source adds to the squared error of each target, (sources, targets)."""
        rows = np.searchsorted(self._members, sources)
        squares, gains = np.square(self._coefficients[rows]), self._gains[rows, None]
        # Where the weights did not move yet, nothing tells the sources apart, and none can stand in for another.
        rises: Array = np.divide(squares, gains, out=np.full(squares.shape, np.inf), where=gains > 0.0)
        return rises

    def remove_(self, source: int) -> None:
        """Take an active source out."""
        row = int(np.searchsorted(self._members, source))
        length = np.sqrt(self._gains[row])
        direction = self._spread[row] / length
        along = self._spread @ direction
        distance = self._coefficients[row] / length
        self.squares = self.squares + distance**2
        self._coefficients -= np.outer(along, distance)
        self._gains -= along**2
        # In place: BLAS counts column after column, which is what the transpose has.
        self._spread = scipy.linalg.blas.dger(-1.0, direction, along, a=self._spread.T, overwrite_a=1).T
        self.active = self.active[self.active != source]
        self._refresh()

    def _refresh(self) -> None:
        """Undo what rounding did to W and to the lengths of its rows, where that could show."""
        rows = np.searchsorted(self._members, self.active)
        fallen = rows[self._gains[rows] < _SHRUNK * self._exact[rows]]
        self._gains[fallen] = self._exact[fallen] = np.square(self._spread[fallen]).sum(axis=1)
        few = self.active.size <= _FEWER * self._members.size
        if few or (self._gains[rows] < _FALLEN * self._first[rows]).any():
            self._remake(self.active)


def spread(problem: Problem, active: Indices, which: Indices) -> tuple[Array, Array, Array]:
    """Coefficients (active, targets), W (active, active - 1) and squared errors (targets,) with the active sources."""
    design, goals = problem.design(active, which)
    floor = _ROUNDING * np.linalg.norm(design, axis=0).max()
    turned, mirror = mirrored(np.vstack([design, floor * np.eye(active.size)]))
    goals = np.vstack([goals, np.zeros((active.size, goals.shape[1]))])
    first, free = -(active.size**-0.5), active.size - 1
    both = np.hstack([turned[:, 1:], goals - first * turned[:, :1]])
    triangle = scipy.linalg.qr(both, mode="r", overwrite_a=True, check_finite=False)[0]
    inverse = np.ascontiguousarray(np.vstack([np.zeros((1, free)), _inverse(triangle[:free, :free])]))
    coefficients = inverse @ triangle[:free, free:]
    coefficients[0] = first
    for matrix in (coefficients, inverse):
        matrix -= 2.0 * np.outer(mirror, mirror @ matrix)
    return coefficients, inverse, np.square(triangle[free:, free:]).sum(axis=0)


def _inverse(triangle: Array) -> Array:
    if triangle.size == 0:
        return triangle
    inverse: Array = scipy.linalg.lapack.dtrtri(np.triu(triangle))[0]
    return inverse


def _allowed(problem: Problem, which: Indices, tolerance: Tolerance | Sequence[float], least: Array) -> Array:
    """Squared error that each target may have, with time divided by the largest ``t``."""
    raw = problem.raw[which]
    if tolerance == "exact":
        return np.zeros(which.size)
    if tolerance == "auto":
        wanted = np.maximum(AUTO * raw, np.sqrt(problem.noise.mean()))
        return np.asarray(np.maximum(wanted**2, _SLACK**2 * least))
    each = np.broadcast_to(np.asarray(tolerance, dtype=np.float64), problem.raw.shape)[which]
    squares: Array = (each * raw) ** 2
    return squares


def _check(tolerance: Tolerance | Sequence[float], budget: int | None, targets: int) -> None:
    if tolerance not in ("auto", "exact"):
        numbers = np.atleast_1d(np.asarray(np.nan if isinstance(tolerance, str) else tolerance, dtype=np.float64))
        if numbers.size not in (1, targets) or not (np.isfinite(numbers) & (numbers > 0.0)).all():
            raise TargetError(
                f"tolerance: expected auto, exact or a number above 0, found {tolerance!r}",
                hint="1e-2 is one hundredth of |raw - target|",
            )
    if budget is not None and budget < 1:
        raise TargetError(f"budget: expected at least 1 source, found {budget}", hint="leave it out to set no limit")
