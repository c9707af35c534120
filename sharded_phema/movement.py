"""Movement: how far weights move per unit of training time, relative to the most, as a learning-rate schedule tells.

An optimizer step is the rate times a direction. Increments of the weights, and what is common to many of them, are
thus proportional to the rate, and their covariance to its square.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sharded_phema.errors import TargetError

__all__ = ["STEADY", "Movement", "Rate", "movement_of"]

Array = NDArray[np.float64]
Rate = Callable[[float], float] | tuple[Sequence[float], Sequence[float]]
"""A learning rate: a function of training time, or times and the rates there with straight lines between."""

_SAMPLES = 4097
_CLOSE = 1e-3  # of the largest rate
_MOST_KNOTS = 256


@dataclass(frozen=True, slots=True, eq=False)
class Movement:
    """Straight lines through rates, constant outside; made by ``movement_of``.

    Args:
        times: Ends of the lines, increasing.
        rates: Rates there, the largest being 1.
    """

    times: Array
    rates: Array

    def at(self, tau: Array) -> Array:
        """Relative rate at each time, in [0, 1]."""
        return np.interp(tau, self.times, self.rates)


STEADY = Movement(np.array([0.0]), np.array([1.0]))
"""Weights that move as fast at all times."""


def movement_of(rate: Rate, end: float) -> Movement:
    """Movement under a learning rate, as at most 256 straight lines, where they can 1e-3 of the largest rate close.

    Args:
        rate: Learning rate, in any unit. Tables of more than 4097 entries, and functions, are read at 4097 times.
        end: Training time up to which it is wanted.

    Raises:
        TargetError: The rate is negative, not finite or always 0, or times do not increase.
    """
    times, rates = _table(rate, end)
    good = times.ndim == 1 and times.shape == rates.shape and times.size > 0 and bool((np.diff(times) > 0).all())
    if not good:
        raise TargetError(
            f"movement: expected increasing times and a rate for each, found {times.shape} times, {rates.shape} rates",
            hint="give (times, rates) of one length, or a function of training time",
        )
    peak = rates.max()
    if not (np.isfinite(rates).all() and np.isfinite(times).all() and rates.min() >= 0.0 and peak > 0.0):
        raise TargetError(
            f"movement: rates must be finite, at least 0 and not all 0, found {rates.min():g} to {peak:g}",
            hint="give the learning rate of the run; leave movement out where it was constant",
        )
    kept = _corners(times, rates / peak)
    return Movement(times[kept], rates[kept] / peak)


def _table(rate: Rate, end: float) -> tuple[Array, Array]:
    grid = np.linspace(0.0, end, _SAMPLES)
    if callable(rate):
        return grid, np.array([float(rate(float(t))) for t in grid])
    times, rates = (np.asarray(column, dtype=np.float64) for column in rate)
    if times.size > _SAMPLES and times.shape == rates.shape:
        return grid, np.interp(grid, times, rates)
    return times, rates


def _corners(times: Array, rates: Array) -> Array:
    """Indices of the corners of straight lines that stay close to all of the table."""
    kept = np.unique([0, times.size - 1])
    while kept.size < _MOST_KNOTS:
        miss = np.abs(np.interp(times, times[kept], rates[kept]) - rates)
        worst = int(miss.argmax())
        if miss[worst] <= _CLOSE:
            break
        kept = np.sort(np.append(kept, worst))
    return kept
