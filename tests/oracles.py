"""Oracles: the same quantities by another road than the package takes, slow and in 50 digits where that matters."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import mpmath
import numpy as np
from scipy.integrate import quad

from sharded_phema.profile import Power, Profile


def overlap(a: Power, b: Power) -> mpmath.mpf:
    """Integral of (1 - F_a)(1 - F_b) over all time, in closed form."""
    with mpmath.workdps(50):
        big_a, big_b = mpmath.mpf(a.gamma) + 1, mpmath.mpf(b.gamma) + 1
        end = mpmath.mpf(min(a.t, b.t))
        edges = sorted({mpmath.mpf(0), min(end, mpmath.mpf(a.start)), min(end, mpmath.mpf(b.start)), end})
        total = mpmath.mpf(0)
        for lo, hi in itertools.pairwise(edges):
            alpha = mpmath.mpf(a.t) ** -big_a if lo >= a.start else 0
            beta = mpmath.mpf(b.t) ** -big_b if lo >= b.start else 0

            def primitive(x: mpmath.mpf, alpha=alpha, beta=beta) -> mpmath.mpf:
                cross = alpha * beta * x ** (big_a + big_b + 1) / (big_a + big_b + 1)
                return x - alpha * x ** (big_a + 1) / (big_a + 1) - beta * x ** (big_b + 1) / (big_b + 1) + cross

            total += primitive(hi) - primitive(lo)
        return total


def distance(coefficients: Sequence[float], sources: Sequence[Power], target: Power) -> float:
    """Root of the integral of (sum c_i F_i - F)^2 for coefficients of sum 1; time is not rescaled."""
    with mpmath.workdps(50):
        c = [mpmath.mpf(float(x)) for x in coefficients] + [mpmath.mpf(-1)]
        everything = [*sources, target]
        total = mpmath.fsum(
            x * y * overlap(a, b)
            for x, a in zip(c, everything, strict=True)
            for y, b in zip(c, everything, strict=True)
        )
        return float(mpmath.sqrt(abs(total)))


def density_product(a: Power, b: Power) -> float:
    """Integral of the product of the densities of two power profiles that start at 0, in closed form."""
    r = a.t / b.t
    exponent = b.gamma if a.t < b.t else -a.gamma
    return (a.gamma + 1) * (b.gamma + 1) * r**exponent / ((a.gamma + b.gamma + 1) * max(a.t, b.t))


def path_distance(a: Profile, b: Profile) -> float:
    """Root of the integral of (F_a - F_b)^2, by adaptive quadrature between the knots."""

    def squared(x: float) -> float:
        tau = np.array([x])
        return float((a.cumulative(tau)[0] - b.cumulative(tau)[0]) ** 2)

    return float(np.sqrt(_integral(squared, {*a.knots, *b.knots}, max(a.t, b.t))))


def mass(profile: Profile) -> float:
    """Integral of the density plus the jumps, which are read off the cumulative."""
    knots = np.array(profile.knots)
    jumps = profile.cumulative(knots) - profile.cumulative(np.nextafter(knots, -np.inf))
    return float(jumps.sum()) + _integral(lambda x: _finite_density(profile, x), set(profile.knots), profile.t)


def moment(profile: Profile, power: int) -> float:
    """Integral of (tau / t)**power against the density."""
    t = profile.t
    return _integral(lambda x: _finite_density(profile, x) * (x / t) ** power, set(profile.knots), t)


def _finite_density(profile: Profile, x: float) -> float:
    # Rounding can put a node on the pole of the sqrt decay, a point that weighs nothing.
    density = float(profile.density(np.array([x]))[0])
    return density if np.isfinite(density) else 0.0


def _integral(f, knots: set[float], end: float) -> float:
    # The cuts below every knot help the adaptive rule to find steep ends.
    cuts = {k * (1 - 0.5**j) for k in knots for j in range(1, 12)}
    edges = sorted({0.0, end, *(x for x in knots | cuts if 0.0 < x < end)})
    return sum(quad(f, lo, hi, epsabs=0, epsrel=1e-9, limit=100)[0] for lo, hi in itertools.pairwise(edges))
