"""A profile given by numbers: a user's own table of the cumulative, or a function that is tabulated."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal, get_args

import numpy as np

from sharded_phema.errors import TargetError, check_number
from sharded_phema.profile.contract import Times, check_span

__all__ = ["Tabulated", "tabulate"]

Interpolation = Literal["linear", "step"]

# What adding up a million shares of a whole may leave short of 1.
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class Tabulated:
    """Any average at all, as a table of its cumulative.

    Before the first time F is 0, so that a first value above 0 is weight on the weights at the first time.

    Args:
        times: Training times in the run's unit, at least 0, strictly increasing; any array, kept as a tuple.
        values: F at these times, in [0, 1], nowhere decreasing; the last is 1 (within 1e-9, and then taken for 1).
        interpolation: ``linear`` spreads the weight between two times evenly; ``step`` puts it on the later one, as
            averaging the weights at these times does.

    Raises:
        TargetError: The table is no cumulative distribution; says at which row.
    """

    kind: ClassVar[str] = "tabulated"
    steepness: ClassVar[float] = 0.0
    times: Sequence[float]
    values: Sequence[float]
    interpolation: Interpolation = "linear"

    def __post_init__(self) -> None:
        # Tuples, so that tables with equal numbers are equal and no array can be changed later.
        times, values = _floats("times", self.times), _floats("values", self.values)
        _check_table(times, values)
        if self.interpolation not in get_args(Interpolation):
            raise TargetError(
                f"tabulated profile: unknown interpolation {self.interpolation!r}",
                hint=f"there are {', '.join(get_args(Interpolation))}",
            )
        object.__setattr__(self, "times", times)
        object.__setattr__(self, "values", (*(min(value, 1.0) for value in values[:-1]), 1.0))

    @property
    def t(self) -> float:
        """The last time of the table."""
        return self.times[-1]

    @property
    def knots(self) -> tuple[float, ...]:
        """All times of the table."""
        return tuple(self.times)

    def cumulative(self, tau: Times) -> Times:
        """Share of the average from weights at or before ``tau``."""
        times, values = np.array(self.times), np.array(self.values)
        if self.interpolation == "linear":
            return np.where(tau < times[0], 0.0, np.interp(tau, times, values))
        return np.concatenate([[0.0], values])[np.searchsorted(times, tau, side="right")]

    def density(self, tau: Times) -> Times:
        """Slope of the cumulative; on a time of the table, the one after it, at the last time the one before it."""
        if self.interpolation == "step" or len(self.times) == 1:
            return np.zeros(np.shape(tau))
        times = np.array(self.times)
        slopes = np.diff(self.values) / np.diff(times)
        place = np.clip(np.searchsorted(times, tau, side="right") - 1, 0, slopes.size - 1)
        return np.where((tau >= times[0]) & (tau <= times[-1]), slopes[place], 0.0)


def tabulate(cumulative: Callable[[float], float], t: float, *, start: float = 0.0, points: int = 513) -> Tabulated:
    """Profile of any function: its table at evenly spaced times, with straight lines between them.

    The lines miss a smooth function by at most an eighth of its second derivative times the squared spacing: 5e-5
    for a curve like (tau / t)**15 and 513 points.

    Args:
        cumulative: F(tau), called with one number at a time, from ``start`` to ``t``; F(t) is 1.
        t: Training time at which the average is read, > 0.
        start: Training time before which F is 0, in [0, t).
        points: Number of times, at least 2.

    Raises:
        TargetError: The function is no cumulative distribution, or a number is outside its range.
    """
    check_span(Tabulated.kind, start, t, proper=True)
    check_number(points, "tabulated profile: points", "at least 2", lambda x: x >= 2, "for example points=513")
    times = np.linspace(start, t, int(points)).tolist()
    return Tabulated(times, [float(cumulative(tau)) for tau in times])


def _floats(name: str, numbers: Sequence[float]) -> tuple[float, ...]:
    try:
        array = np.asarray(numbers, dtype=np.float64)
    except (TypeError, ValueError):
        array = np.array(math.nan)
    if array.ndim != 1 or not array.size or not np.isfinite(array).all():
        raise TargetError(
            f"tabulated profile: {name} must be a list of finite numbers, found {numbers!r:.80}",
            hint="give as many cumulative values as times, for example times=[0, 500, 1000], values=[0, 0.2, 1]",
        )
    return tuple(array.tolist())


def _check_table(times: tuple[float, ...], values: tuple[float, ...]) -> None:
    shares = "values are cumulative: the share of the average from weights up to each time, numpy.cumsum of the weights"
    clock = "times are training times in the unit of the run: steps, samples or tokens"
    if len(times) != len(values):
        raise TargetError(f"tabulated profile: {len(times)} times and {len(values)} values", hint="give one per time")
    check_number(times[0], f"{Tabulated.kind} profile: the first time", "at least 0", lambda x: x >= 0, clock)
    check_number(times[-1], f"{Tabulated.kind} profile: the last time", "above 0", lambda x: x > 0, clock)
    check_number(values[0], f"{Tabulated.kind} profile: the first value", "at least 0", lambda x: x >= 0, shares)
    for row, ((a, b), (early, late)) in enumerate(zip(pairwise(values), pairwise(times), strict=True), start=1):
        if late <= early:
            raise TargetError(f"tabulated profile: time {late!r} at row {row} is not after {early!r}", hint=clock)
        if b < a:
            raise TargetError(f"tabulated profile: the value falls from {a!r} to {b!r} at t={late!r}", hint=shares)
    if abs(values[-1] - 1.0) > _ROUNDING:
        raise TargetError(f"tabulated profile: the last value must be 1, found {values[-1]!r}", hint=shares)
