"""Quadrature: integrals of products of profiles over training time, as inner products of columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from sharded_phema.errors import ForecastError, TargetError
from sharded_phema.movement import STEADY, Movement
from sharded_phema.profile import Profile

__all__ = ["Quadrature", "quadrature"]

Array = NDArray[np.float64]

_NODES = 16
# A panel on which exp(slope * log tau) grows by e^10 is integrated to 1e-12 by 16 nodes, also when squared; so is a
# fractional power of tau on a panel whose end is 4 times its start (10 / 7.2 = log 4).
_GROWTH, _LEAST_SLOPE = 10.0, 7.2
_NEGLIGIBLE = 1e-16
# Mass of a jump that is taken for rounding when densities are asked for.
_JUMP = 1e-9
# Nodes that are factored at a time: bounds memory, 1,000 columns of them are 32 MB.
_ROWS = 4096


@dataclass(frozen=True, slots=True, eq=False)
class Quadrature:
    """Nodes and weights on which every product of two profiles is integrated to rounding; made by ``quadrature``.

    Args:
        nodes: Training times divided by ``scale``, (nodes,).
        roots: Roots of the weights, so that a column's norm is the root of an integral, (nodes,).
        speed: Relative movement of the weights at the nodes, (nodes,).
        scale: The largest ``t`` of the profiles.
    """

    nodes: Array
    roots: Array
    speed: Array
    scale: float

    def paths(self, profiles: Sequence[Profile]) -> Array:
        """Triangle whose columns have the inner products ``∫ F_i F_j s^2 dtau / scale``, s being the movement."""
        roots = self.roots * self.speed
        return self._triangle(profiles, lambda profile, tau: profile.cumulative(tau), roots)

    def densities(self, profiles: Sequence[Profile]) -> Array:
        """Triangle whose columns have the inner products ``scale * ∫ p_i p_j dtau``.

        Raises:
            TargetError: A profile has no density with a finite square.
        """
        for profile in profiles:
            _check_density(profile)
        return self._triangle(profiles, lambda profile, tau: profile.density(tau) * self.scale, self.roots)

    def distance_to_raw(self, profile: Profile) -> float:
        """Distance in the trajectory metric from the raw weights at the profile's time."""
        tau = self.nodes * self.scale
        path = np.where(tau < profile.t, profile.cumulative(tau), 0.0)
        return float(np.linalg.norm(path * self.roots * self.speed))

    def _triangle(self, profiles: Sequence[Profile], value, roots: Array) -> Array:  # type: ignore[no-untyped-def]
        """Triangle of the QR factorisation of the weighted columns: their inner products, without squaring them."""
        triangle = np.empty((0, len(profiles)))
        for rows in self._rows():
            tau = self.nodes[rows] * self.scale
            block = np.stack([value(profile, tau) for profile in profiles]) * roots[rows]
            if not np.isfinite(block).all():
                raise ForecastError(
                    "a profile is not finite", hint="check the cumulative of profiles that are your own"
                )
            stacked = np.hstack([triangle.T, block]).T  # column after column in memory, as LAPACK takes it
            triangle = scipy.linalg.qr(stacked, mode="r", overwrite_a=True, check_finite=False)[0][: len(profiles)]
        return triangle

    def _rows(self) -> Iterator[slice]:
        for start in range(0, self.nodes.size, _ROWS):
            yield slice(start, start + _ROWS)


def quadrature(profiles: Sequence[Profile], movement: Movement = STEADY) -> Quadrature:
    """Gauss-Legendre panels on which every product of two of the profiles is smooth."""
    scale = max(profile.t for profile in profiles)
    bends = movement.times[(movement.times > 0.0) & (movement.times < scale)]
    knots = np.unique([0.0, *bends, *(knot for profile in profiles for knot in profile.knots)])
    left, right = _split(knots[:-1], knots[1:], [p for p in profiles if p.steepness > 0.0])
    order = np.argsort(left)
    x, w = _gauss()
    left, half = left[order] / scale, (right[order] - left[order]) / (2.0 * scale)
    nodes = ((left + half)[:, None] + half[:, None] * x).ravel()
    roots = np.sqrt(half[:, None] * w).ravel()
    return Quadrature(nodes, roots, movement.at(nodes * scale), scale)


@cache
def _gauss() -> tuple[Array, Array]:
    """Nodes and weights on [-1, 1]: finding them takes longer than a whole small quadrature."""
    x, w = np.polynomial.legendre.leggauss(_NODES)
    x.flags.writeable = w.flags.writeable = False
    return x, w


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


def _check_density(profile: Profile) -> None:
    knots = np.array(profile.knots)
    jump = profile.cumulative(knots) - profile.cumulative(np.nextafter(knots, -np.inf))
    if np.any(jump > _JUMP) or not np.isfinite(profile.density(knots)).all():
        found = "jumps" if np.any(jump > _JUMP) else "has a density without a finite square"
        raise TargetError(
            f"the density metrics cannot take {profile}: it {found}",
            hint='use metric="trajectory", which takes every profile',
        )
