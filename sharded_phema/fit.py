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
from sharded_phema.profile import Profile

__all__ = ["Fit", "Metric", "fit"]

Array = NDArray[np.float64]
Metric = Literal["trajectory", "density"]

_NODES = 16
# A panel on which exp(slope * log tau) grows by e^10 is integrated to 1e-12 by 16 nodes, also when squared; so is a
# fractional power of tau on a panel whose end is 4 times its start (10 / 7.2 = log 4).
_GROWTH, _LEAST_SLOPE = 10.0, 7.2
_NEGLIGIBLE = 1e-16
# Columns carry rounding of 1e-16 or so each: a smaller difference than this tells no two sources apart.
_DEPENDENT = 1e-14
# Mass of a jump that is taken for rounding when densities are asked for.
_JUMP = 1e-9


@dataclass(frozen=True, slots=True, eq=False)
class Fit:
    """Best rebuild of one target from the sources.

    Args:
        coefficients: What each source is multiplied by, shape (sources,), sum 1.
        error: Distance from the target in the metric that was asked for, with time divided by the largest ``t``.
        forecast: Predicted ``|rebuilt - target| / |raw weights at the target's time - target|``, whatever the metric;
            infinite if the target is raw weights that no source holds.
        rank: Number of sources that are independent to rounding; below their number the smallest coefficients of
            all that fit equally well are given.
    """

    coefficients: Array
    error: float
    forecast: float
    rank: int

    @property
    def noise_gain(self) -> float:
        """Largest factor by which rounding of the sources can grow, the sum of ``|coefficients|``, >= 1."""
        return float(np.abs(self.coefficients).sum())


def fit(sources: Sequence[Profile], targets: Sequence[Profile], *, metric: Metric = "trajectory") -> tuple[Fit, ...]:
    """Best coefficients for every target, from one factorisation of the sources.

    A target that is a source gets coefficient 1 there and 0 elsewhere. Sources read after a target's time are used;
    leave them out where that is not wanted.

    Args:
        sources: Profiles of the stored averages, no two equal.
        targets: Profiles of the wanted averages.
        metric: ``trajectory`` makes the expected error of weights that walk randomly smallest, with the coefficients
            summing to 1. ``density`` is the published procedure: least squares on densities, then division by the sum
            (Karras et al., arXiv:2312.02696, appendix C, algorithm 3).

    Raises:
        TargetError: No source or target, equal sources, an unknown metric, or ``density`` with a profile that has no
            square-integrable density.
        ForecastError: The profiles do not determine coefficients that can be used.
    """
    _check_arguments(sources, targets, metric)
    rule = _quadrature([*sources, *targets])
    paths, wanted = rule.paths(sources), rule.paths(targets)
    if metric == "trajectory":
        solve, design, goals = _solve_sum_one, paths, wanted
    else:
        solve, design, goals = _solve_and_divide, rule.densities(sources), rule.densities(targets)
    coefficients, rank = solve(*_compress(design, goals))
    _answer_stored(coefficients, sources, targets)
    errors = np.linalg.norm(design @ coefficients - goals, axis=0)
    drifts = np.linalg.norm(paths @ coefficients - wanted, axis=0)
    raw = [rule.distance_to_raw(target) for target in targets]
    return tuple(
        Fit(c, float(error), _ratio(float(drift), scale), rank)
        for c, error, drift, scale in zip(coefficients.T.copy(), errors, drifts, raw, strict=True)
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Quadrature:
    """Nodes (in units of ``scale``) and roots of weights, so that a column's norm is the root of an integral."""

    nodes: Array
    roots: Array
    scale: float

    def paths(self, profiles: Sequence[Profile]) -> Array:
        """Weighted cumulatives, (nodes, profiles)."""
        return self._columns([profile.cumulative(self.nodes * self.scale) for profile in profiles])

    def densities(self, profiles: Sequence[Profile]) -> Array:
        """Weighted densities, (nodes, profiles)."""
        for profile in profiles:
            _check_density(profile)
        return self._columns([profile.density(self.nodes * self.scale) * self.scale for profile in profiles])

    def distance_to_raw(self, profile: Profile) -> float:
        """Distance in the trajectory metric from the raw weights at the profile's time."""
        tau = self.nodes * self.scale
        return float(np.linalg.norm(np.where(tau < profile.t, profile.cumulative(tau), 0.0) * self.roots))

    def _columns(self, rows: list[Array]) -> Array:
        return np.ascontiguousarray((np.stack(rows) * self.roots).T)


def _quadrature(profiles: Sequence[Profile]) -> _Quadrature:
    """Gauss-Legendre panels on which every product of two of the profiles is smooth."""
    scale = max(profile.t for profile in profiles)
    knots = np.unique([0.0, *(knot for profile in profiles for knot in profile.knots)])
    left, right = _split(knots[:-1], knots[1:], [p for p in profiles if p.steepness > 0.0])
    x, w = np.polynomial.legendre.leggauss(_NODES)
    left, half = left / scale, (right - left) / (2.0 * scale)
    nodes = (left + half)[:, None] + half[:, None] * x
    return _Quadrature(nodes.ravel(), np.sqrt(half[:, None] * w).ravel(), scale)


def _split(left: Array, right: Array, profiles: Sequence[Profile]) -> tuple[Array, Array]:
    """Panels cut until no profile that is neither 0 nor 1 there grows by more than exp(_GROWTH)."""
    done: list[tuple[Array, Array]] = []
    smallest = _NEGLIGIBLE * right[-1]
    while left.size:
        slope = np.zeros(left.size)
        live_profiles = []
        for profile in profiles:
            live = (profile.cumulative(right) > _NEGLIGIBLE) & (left < profile.t)
            slope[live] = np.maximum(slope[live], max(profile.steepness, _LEAST_SLOPE))
            if live.any():
                live_profiles.append(profile)
        profiles = live_profiles
        # Not log(right / left): a panel that starts at 0 is wide whenever a profile lives on it.
        wide = (slope > 0.0) & (left < right * np.exp(-_GROWTH / np.maximum(slope, _LEAST_SLOPE)))
        wide &= right > smallest
        done.append((left[~wide], right[~wide]))
        left, right = left[wide], right[wide]
        # The geometric mean halves the growth; from 0 the panels shrink by 4 until all profiles are negligible.
        middle = np.where(left > 0.0, np.sqrt(left * right), right / 4.0)
        left, right = np.concatenate([left, middle]), np.concatenate([middle, right])
    return np.concatenate([a for a, _ in done]), np.concatenate([b for _, b in done])


def _compress(design: Array, goals: Array) -> tuple[Array, Array]:
    """Design and goals with the same inner products in (sources + targets) rows, without squaring them."""
    if not (np.isfinite(design).all() and np.isfinite(goals).all()):
        raise ForecastError("a profile is not finite", hint="check the cumulative of profiles that are your own")
    triangle = scipy.linalg.qr(np.hstack([design, goals]), mode="r", overwrite_a=True, check_finite=False)[0]
    triangle = triangle[: triangle.shape[1]]
    return triangle[:, : design.shape[1]], triangle[:, design.shape[1] :]


def _solve_sum_one(design: Array, goals: Array) -> tuple[Array, int]:
    """Least squares over the coefficients that sum to 1: (sources, targets), and the rank of the sources."""
    sources = design.shape[1]
    # The reflection that maps (1, ..., 1) / sqrt(n) to the first axis turns the constraint into "the first new
    # coefficient is 1 / sqrt(n)". It is orthogonal, so nothing is lost by it, unlike by a heavily weighted row.
    mirror = np.full(sources, sources**-0.5)
    mirror[0] += 1.0
    mirror /= np.linalg.norm(mirror)
    turned = design - 2.0 * np.outer(design @ mirror, mirror)
    first = -(sources**-0.5)
    free, rank = _least_squares(turned[:, 1:], goals - first * turned[:, :1])
    new = np.vstack([np.full((1, goals.shape[1]), first), free])
    return new - 2.0 * np.outer(mirror, mirror @ new), rank + 1


def _solve_and_divide(design: Array, goals: Array) -> tuple[Array, int]:
    """Unconstrained least squares, each solution divided by its sum: (sources, targets), and the rank."""
    coefficients, rank = _least_squares(design, goals)
    total = coefficients.sum(axis=0)
    if np.any(np.abs(total) < 1e-6 * np.maximum(1.0, np.abs(coefficients).sum(axis=0))):
        raise ForecastError(
            "the density fit has coefficients that sum to 0, so it cannot be scaled to an average",
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


def _answer_stored(coefficients: Array, sources: Sequence[Profile], targets: Sequence[Profile]) -> None:
    # To rounding this is what the solve gives; exactly, a stored average is read alone and comes back bit for bit.
    place = {source: i for i, source in enumerate(sources)}
    for j, target in enumerate(targets):
        if target in place:
            coefficients[:, j] = 0.0
            coefficients[place[target], j] = 1.0


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


def _check_density(profile: Profile) -> None:
    knots = np.array(profile.knots)
    jump = profile.cumulative(knots) - profile.cumulative(np.nextafter(knots, -np.inf))
    if np.any(jump > _JUMP) or not np.isfinite(profile.density(knots)).all():
        found = "jumps" if np.any(jump > _JUMP) else "has a density without a finite square"
        raise TargetError(
            f'metric="density" cannot take {profile}: it {found}',
            hint='use metric="trajectory", which takes every profile',
        )
