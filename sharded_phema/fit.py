"""Fit: the sum of stored averages that comes closest to a wanted average, and how close that is.

Weights move like a random walk: their increments are uncorrelated, they themselves are not. The error of a rebuilt
average is then the distance between cumulative profiles, which is what ``metric="trajectory"`` makes smallest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from sharded_phema.errors import ForecastError, TargetError
from sharded_phema.movement import STEADY, Movement
from sharded_phema.profile import Profile
from sharded_phema.quadrature import quadrature

__all__ = ["Fit", "Metric", "Problem", "fit", "mirrored", "posed", "solved"]

Array = NDArray[np.float64]
Metric = Literal["trajectory", "density", "paper"]

# Columns carry rounding of 1e-16 or so each: a smaller difference than this tells no two sources apart.
_DEPENDENT = 1e-14


@dataclass(frozen=True, slots=True, eq=False)
class Fit:
    """Best rebuild of one target from the sources.

    Args:
        coefficients: What each source is multiplied by, shape (sources,), sum 1.
        error: Distance from the target in the metric that was asked for, with time divided by the largest ``t``.
        fit_part: Predicted ``|rebuilt - target| / |raw weights at the target's time - target|`` if nothing were
            rounded, whatever the metric; infinite if the target is raw weights that no source holds.
        rounding_part: The same for the rounding of the sources alone.
        rank: Number of sources that are independent to rounding; below their number the smallest coefficients of
            all that fit equally well are given.
    """

    coefficients: Array
    error: float
    fit_part: float
    rounding_part: float
    rank: int

    @property
    def forecast(self) -> float:
        """Predicted ``|rebuilt - target| / |raw weights at the target's time - target|``, both parts together."""
        return math.hypot(self.fit_part, self.rounding_part)

    @property
    def noise_gain(self) -> float:
        """Largest factor by which rounding of the sources can grow, the sum of ``|coefficients|``, >= 1."""
        return float(np.abs(self.coefficients).sum())


@dataclass(frozen=True, slots=True, eq=False)
class Problem:
    """Sources and targets as columns of few rows, with the right inner products; made by ``posed``.

    Args:
        paths: Cumulatives of sources, then targets; their inner products are those of the trajectory metric.
        columns: The same in the metric that is asked for.
        noise: Rounding noise of each source as its share of the squared error, time divided by the largest ``t``.
        raw: Distance of each target from the raw weights at its time, in the trajectory metric.
        stored: For each target the source that has its profile, -1 if none has.
        metric: What the coefficients minimise.
    """

    paths: Array  # (rows, sources + targets)
    columns: Array  # (rows, sources + targets)
    noise: Array  # (sources,)
    raw: Array  # (targets,)
    stored: NDArray[np.int64]  # (targets,)
    metric: Metric

    def design(self, kept: NDArray[np.int64], which: NDArray[np.int64]) -> tuple[Array, Array]:
        """Columns of some sources above their noise, and those of some targets above zeros."""
        noise = np.diag(np.sqrt(self.noise[kept])) if self.metric == "trajectory" else np.empty((0, kept.size))
        goals = self.columns[:, self.noise.size + which]
        return np.vstack([self.columns[:, kept], noise]), np.vstack([goals, np.zeros((len(noise), which.size))])


def fit(
    sources: Sequence[Profile],
    targets: Sequence[Profile],
    *,
    metric: Metric = "trajectory",
    movement: Movement = STEADY,
    noise: float | Sequence[float] = 0.0,
) -> tuple[Fit, ...]:
    """Best coefficients for every target, from one factorisation of the sources.

    A target that is a source gets coefficient 1 there and 0 elsewhere. Sources read after a target's time are used;
    leave them out where that is not wanted.

    Args:
        sources: Profiles of the stored averages, no two equal.
        targets: Profiles of the wanted averages.
        metric: ``trajectory`` makes the expected error of weights that walk randomly smallest. ``density`` is least
            squares on densities. Both have coefficients that sum to 1. ``paper`` is the published procedure: least
            squares on densities without that constraint, then division by the sum (Karras et al., arXiv:2312.02696,
            appendix C, algorithm 3).
        movement: How fast weights move, where that changes; enters the trajectory metric and the forecast.
        noise: Expected squared rounding error of each source, or of all, divided by the expected squared movement of
            the weights in a unit of time. Enters the forecast, and the coefficients of the trajectory metric.

    Raises:
        TargetError: No source or target, equal sources, an unknown metric, noise that is no share, or a density
            metric with a profile that has no square-integrable density.
        ForecastError: The profiles do not determine coefficients that can be used.
    """
    problem = posed(sources, targets, metric=metric, movement=movement, noise=noise)
    return solved(problem, np.arange(len(sources)))


def posed(
    sources: Sequence[Profile],
    targets: Sequence[Profile],
    *,
    metric: Metric,
    movement: Movement,
    noise: float | Sequence[float],
) -> Problem:
    """The least-squares problem behind ``fit``, which has the same arguments, in (sources + targets) rows."""
    _check_arguments(sources, targets, metric)
    rule = quadrature([*sources, *targets], movement)
    shares = _shares(noise, len(sources)) / rule.scale
    paths = rule.paths([*sources, *targets])
    columns = paths if metric == "trajectory" else rule.densities([*sources, *targets])
    place = {source: i for i, source in enumerate(sources)}
    stored = np.array([place.get(target, -1) for target in targets])
    for target in np.flatnonzero(stored >= 0):
        for matrix in (paths, columns):  # equal to rounding before, exactly now
            matrix[:, len(sources) + target] = matrix[:, stored[target]]
    raw = np.array([rule.distance_to_raw(target) for target in targets])
    return Problem(paths, columns, shares, raw, stored, metric)


def solved(problem: Problem, kept: NDArray[np.int64]) -> tuple[Fit, ...]:
    """Best coefficients for every target from some of the sources, those of the others being 0.

    Args:
        problem: Sources and targets.
        kept: Sources that may be used, ascending.

    Raises:
        ForecastError: The profiles do not determine coefficients that can be used.
    """
    sources, targets = problem.noise.size, problem.raw.size
    solve = _solve_and_divide if problem.metric == "paper" else _solve_sum_one
    some, rank = solve(*problem.design(kept, np.arange(targets)))
    coefficients = np.zeros((sources, targets))
    coefficients[kept] = some
    # To rounding this is what the solve gives; exactly, a stored average is read alone and comes back bit for bit.
    for target in np.flatnonzero(np.isin(problem.stored, kept)):
        coefficients[:, target] = np.arange(sources) == problem.stored[target]
    whole = np.vstack([coefficients, -np.eye(targets)])
    errors, drifts = (np.linalg.norm(columns @ whole, axis=0) for columns in (problem.columns, problem.paths))
    rounding, raw = np.sqrt(problem.noise @ coefficients**2), problem.raw.tolist()
    return tuple(
        Fit(c, float(error), _ratio(float(drift), scale), _ratio(float(noise), scale), rank)
        for c, error, drift, noise, scale in zip(coefficients.T.copy(), errors, drifts, rounding, raw, strict=True)
    )


def mirrored(design: Array) -> tuple[Array, Array]:
    """Design in new coefficients, of which the first is ``-1 / sqrt(n)`` when the old ones sum to 1.

    The reflection that maps (1, ..., 1) / sqrt(n) to minus the first axis is orthogonal, so nothing is lost by it,
    unlike by a heavily weighted row. It is its own inverse.

    Returns:
        The design, (rows, sources), and the unit normal of the mirror, (sources,).
    """
    mirror = np.full(design.shape[1], design.shape[1] ** -0.5)
    mirror[0] += 1.0
    mirror /= np.linalg.norm(mirror)
    return design - 2.0 * np.outer(design @ mirror, mirror), mirror


def _solve_sum_one(design: Array, goals: Array) -> tuple[Array, int]:
    """Least squares over the coefficients that sum to 1: (sources, targets), and the rank of the sources."""
    turned, mirror = mirrored(design)
    first = -(design.shape[1] ** -0.5)
    free, rank = _least_squares(turned[:, 1:], goals - first * turned[:, :1])
    new = np.vstack([np.full((1, goals.shape[1]), first), free])
    return new - 2.0 * np.outer(mirror, mirror @ new), rank + 1


def _solve_and_divide(design: Array, goals: Array) -> tuple[Array, int]:
    """Unconstrained least squares, each solution divided by its sum: (sources, targets), and the rank."""
    coefficients, rank = _least_squares(design, goals)
    total = coefficients.sum(axis=0)
    if np.any(np.abs(total) < 1e-6 * np.maximum(1.0, np.abs(coefficients).sum(axis=0))):
        raise ForecastError(
            "the fit of densities has coefficients that sum to 0, so it cannot be scaled to an average",
            hint='use metric="trajectory", whose coefficients sum to 1 by construction',
        )
    return coefficients / total, rank


def _least_squares(design: Array, goals: Array) -> tuple[Array, int]:
    """Solution of least norm, (columns, targets), and the rank of the design."""
    solution, _, rank, _ = scipy.linalg.lstsq(design, goals, cond=_DEPENDENT, lapack_driver="gelsy")
    gradient = design.T @ (design @ solution - goals)
    size = np.linalg.norm(design) * (np.linalg.norm(goals) + np.linalg.norm(design) * np.linalg.norm(solution))
    if np.linalg.norm(gradient) > 1e-12 * size:
        raise ForecastError(
            f"the least-squares fit is not at its minimum: gradient {np.linalg.norm(gradient):.1e} against {size:.1e}",
            hint="sources that differ too little cannot be told apart; leave some of them out",
        )
    return solution, int(rank)


def _ratio(drift: float, scale: float) -> float:
    if drift == 0.0:
        return 0.0
    return drift / scale if scale > 0.0 else math.inf


def _check_arguments(sources: Sequence[Profile], targets: Sequence[Profile], metric: str) -> None:
    if metric not in get_args(Metric):
        raise TargetError(f"unknown metric {metric!r}", hint=f"the metrics are {', '.join(get_args(Metric))}")
    if not sources:
        raise TargetError("no stored average to rebuild from", hint="a run needs at least one snapshot")
    if not targets:
        raise TargetError("no target to rebuild", hint="name at least one, for instance 0.12")
    seen: set[Profile] = set()
    for source in sources:
        if source in seen:
            raise TargetError(f"two sources have the same profile {source}", hint="pass every stored average once")
        seen.add(source)


def _shares(noise: float | Sequence[float], sources: int) -> Array:
    shares = np.asarray(noise, dtype=np.float64)
    if shares.shape not in ((), (sources,)) or not (np.isfinite(shares) & (shares >= 0.0)).all():
        raise TargetError(
            f"noise: expected one number of at least 0, or one for each of {sources} sources, found {noise!r:.100}",
            hint="noise is the squared rounding error divided by the squared movement in a unit of time",
        )
    return np.broadcast_to(shares, (sources,))
