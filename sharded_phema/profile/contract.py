"""What every profile answers, and what one that can be tracked answers besides."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from sharded_phema.errors import check_number

__all__ = ["Profile", "Times", "Tracked", "between", "check_span"]

Times = NDArray[np.float64]


class Profile(Protocol):
    """What an average weighs; immutable and hashable.

    Five members, not four: ``knots`` and ``steepness`` tell a quadrature where the profile breaks and how fast it
    grows between the breaks, and neither can be had from the other.
    """

    @property
    def t(self) -> float:
        """Training time at which the average is read; the profile is 1 from here on."""

    @property
    def knots(self) -> tuple[float, ...]:
        """Times between which the profile is smooth: its jumps and kinks, start and end included."""

    @property
    def steepness(self) -> float:
        """Bound on ``d log F / d log tau`` between knots; 0 where a low-degree polynomial does."""

    def cumulative(self, tau: Times) -> Times:
        """Share of the average that comes from weights at or before ``tau``, in [0, 1], elementwise."""

    def density(self, tau: Times) -> Times:
        """Derivative of the cumulative without its jumps, per unit of time, elementwise."""


class Tracked(Profile, Protocol):
    """A profile that a running average can follow, because at any time it is the old one scaled plus new weight.

    For t' before t it has F_t(tau) = F_t(t') F_t'(tau) up to t'. So at an update the current weights enter with
    1 - F_t(last) and the old average keeps the rest, whatever the times of the updates are.
    """

    def entering(self, last: float) -> float:
        """Weight of the weights at ``t`` in an average that was updated at ``last`` < ``t`` before: 1 - F(last)."""


def check_span(kind: str, start: float, t: float, *, proper: bool = False) -> None:
    """Prove that ``0 <= start <= t`` (``<`` if proper) and ``t > 0``, naming the kind of profile if not."""
    mend = "times are training times in the unit of the run: steps, samples or tokens"
    check_number(t, f"{kind} profile: t", "above 0", lambda x: x > 0, mend)
    bound = "below" if proper else "at most"
    check_number(
        start,
        f"{kind} profile: start",
        f"at least 0 and {bound} t={t!r}",
        lambda x: 0 <= x < t or (x == t and not proper),
        mend,
    )


def between(start: float, tau: Times, t: float, density: Times) -> Times:
    """The density on ``[start, t]``, 0 elsewhere."""
    return np.where((tau >= start) & (tau <= t), density, 0.0)
