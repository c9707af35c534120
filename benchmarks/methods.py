"""Methods: ways to choose the coefficients of a rebuild, the package's and those that it is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from sharded_phema.errors import PhemaError
from sharded_phema.fit import Fit, fit
from sharded_phema.movement import STEADY, Movement
from sharded_phema.profile import Checkpoint, Profile

__all__ = ["Choice", "constrained", "mean_of_window", "published", "unconstrained"]

Array = NDArray[np.float64]
# Panels of the unconstrained solve on a run, and nodes of Gauss and Legendre on each.
_PANELS, _NODES = 4096, 4


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """Coefficients that a method chose.

    Attributes:
        coefficients: (sources, targets); NaN where the method cannot take the target.
        forecasts: Forecast |rebuilt - target| / |raw - target|, (targets,); NaN where the method has none.
    """

    coefficients: Array
    forecasts: Array

    @classmethod
    def of(cls, fits: Sequence[Fit]) -> Choice:
        """What the package's fits chose."""
        return cls(np.stack([one.coefficients for one in fits], axis=1), np.array([one.forecast for one in fits]))


def constrained(
    sources: Sequence[Profile],
    targets: Sequence[Profile],
    *,
    noise: float | Sequence[float] = 0.0,
    movement: Movement = STEADY,
) -> Choice:
    """Ours: least squares in the trajectory metric with coefficients that sum to 1; see ``sharded_phema.fit.fit``."""
    return Choice.of(fit(sources, targets, noise=noise, movement=movement))


def published(sources: Sequence[Profile], targets: Sequence[Profile]) -> Choice:
    """The paper's: least squares on densities, then division by the sum; not every target has a density."""
    coefficients = np.full((len(sources), len(targets)), np.nan)
    for j, target in enumerate(targets):
        try:
            coefficients[:, j] = fit(sources, [target], metric="paper")[0].coefficients
        except PhemaError:
            continue
    return Choice(coefficients, np.full(len(targets), np.nan))


def unconstrained(sources: Sequence[Profile], targets: Sequence[Profile]) -> Choice:
    """Least squares in the trajectory metric without a constraint: the whole weight vector may be scaled."""
    end = max(profile.t for profile in (*sources, *targets))
    x, w = np.polynomial.legendre.leggauss(_NODES)
    tau = (np.arange(_PANELS)[:, None] + (x + 1.0) / 2.0).ravel() * (end / _PANELS)
    columns = np.stack([profile.cumulative(tau) for profile in (*sources, *targets)], axis=1)
    columns *= np.tile(np.sqrt(w / 2.0), _PANELS)[:, None]
    solution = scipy.linalg.lstsq(columns[:, : len(sources)], columns[:, len(sources) :], cond=1e-14)[0]
    return Choice(solution, np.full(len(targets), np.nan))


def mean_of_window(sources: Sequence[Profile], targets: Sequence[Profile]) -> Choice:
    """Plain mean of the raw checkpoints inside the target's window; only for targets that have one."""
    times = np.array([source.t for source in sources if isinstance(source, Checkpoint)])
    coefficients = np.full((len(sources), len(targets)), np.nan)
    for j, target in enumerate(targets):
        start = target.knots[0]
        if start > 0.0:
            inside = times > start
            coefficients[:, j] = inside / inside.sum()
    return Choice(coefficients, np.full(len(targets), np.nan))
