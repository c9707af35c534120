"""Profiles that no running average follows: raw weights, and what a learning-rate decay would have given."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import numpy as np

from sharded_phema.errors import TargetError
from sharded_phema.profile.contract import Times, between, check_span

__all__ = ["Checkpoint", "Decay", "Shape"]

Shape = Literal["linear", "cosine", "sqrt"]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The weights at one moment, not averaged.

    Args:
        t: Training time of the weights, > 0.

    Raises:
        TargetError: ``t`` is outside its range.
    """

    kind: ClassVar[str] = "checkpoint"
    steepness: ClassVar[float] = 0.0
    t: float

    def __post_init__(self) -> None:
        check_span(self.kind, 0.0, self.t)

    @property
    def knots(self) -> tuple[float, ...]:
        """The jump."""
        return (self.t,)

    def cumulative(self, tau: Times) -> Times:
        """1 from ``t`` on, else 0."""
        return np.where(tau < self.t, 0.0, 1.0)

    def density(self, tau: Times) -> Times:
        """0: all of it is a jump."""
        return np.zeros(np.shape(tau))


@dataclass(frozen=True, slots=True)
class Decay:
    """The average that, to first order, is a learning-rate decay over ``[start, t]``: F = 1 - rate / first rate.

    Args:
        shape: How the rate falls with u = (tau - start) / (t - start): ``linear`` 1 - u (the same average as
            ``Uniform``), ``cosine`` (1 + cos(pi u)) / 2, ``sqrt`` 1 - sqrt(u).
        start: Training time at which the decay begins, in [0, t).
        t: Training time at which the rate reaches 0, > 0.

    Raises:
        TargetError: An argument is outside its range.
    """

    kind: ClassVar[str] = "decay"
    steepness: ClassVar[float] = 0.0
    shape: Shape
    start: float
    t: float

    def __post_init__(self) -> None:
        check_span(self.kind, self.start, self.t, proper=True)
        if self.shape not in get_args(Shape):
            raise TargetError(
                f"{self.kind} profile: unknown shape {self.shape!r}",
                hint=f"the shapes are {', '.join(get_args(Shape))}",
            )

    @property
    def knots(self) -> tuple[float, ...]:
        """Start and end; ``sqrt`` has more, crowded towards the start where no polynomial follows it."""
        if self.shape != "sqrt":
            return (self.start, self.t)
        graded = (self.start + (self.t - self.start) * 0.25**k for k in range(12, 0, -1))
        return (self.start, *graded, self.t)

    def cumulative(self, tau: Times) -> Times:
        """Share of the average from weights at or before ``tau``."""
        u = np.clip((tau - self.start) / (self.t - self.start), 0.0, 1.0)
        if self.shape == "cosine":
            return np.sin(0.5 * math.pi * u) ** 2
        return np.sqrt(u) if self.shape == "sqrt" else u

    def density(self, tau: Times) -> Times:
        """Derivative of the cumulative; that of ``sqrt`` is infinite at ``start``."""
        span = self.t - self.start
        u = np.clip((tau - self.start) / span, 0.0, 1.0)
        if self.shape == "cosine":
            slope = 0.5 * math.pi * np.sin(math.pi * u)
        elif self.shape == "sqrt":
            slope = np.divide(0.5, np.sqrt(u), out=np.full(np.shape(u), np.inf), where=u > 0)
        else:
            slope = np.ones(np.shape(u))
        return between(self.start, tau, self.t, slope / span)
