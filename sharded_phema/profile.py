"""Profile: a cumulative distribution over training time, which says what a weight average is.

The average that a profile ``F`` denotes is the integral of the weights against ``dF``: ``F(tau)`` is the share of
the average that comes from weights no later than ``tau``. A jump of ``F`` is weight on one moment. Time is a real
number in the unit of the run (steps, samples or tokens), never an update counter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from sharded_phema.errors import TargetError, check_number

__all__ = ["Checkpoint", "Decay", "Exponential", "Power", "Profile", "Shape", "Uniform"]

Times = NDArray[np.float64]
Shape = Literal["linear", "cosine", "sqrt"]


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


@dataclass(frozen=True, slots=True)
class Power:
    """Weight proportional to ``tau**gamma`` up to ``t``: F = (tau / t) ** (gamma + 1).

    An average begun at ``start`` > 0 has no earlier weights: what they would weigh lies on ``start``.

    Args:
        gamma: Exponent, >= 0; larger forgets faster, 0 is the running mean.
        t: Training time at which the average is read, > 0.
        start: Training time at which the averaging began, in [0, t].

    Raises:
        TargetError: An argument is outside its range.

    Source: Karras et al., arXiv:2312.02696, equation (1).
    """

    kind: ClassVar[str] = "power"
    gamma: float
    t: float
    start: float = 0.0

    def __post_init__(self) -> None:
        _check_span(self.kind, self.start, self.t)
        check_number(
            self.gamma, f"{self.kind} profile: gamma", "at least 0", lambda x: x >= 0, "gamma=6.94 is sigma_rel 0.10"
        )

    @property
    def knots(self) -> tuple[float, ...]:
        """Start and end."""
        return (self.start, self.t)

    @property
    def steepness(self) -> float:
        """Exponent of the cumulative."""
        return self.gamma + 1.0

    def cumulative(self, tau: Times) -> Times:
        """Share of the average from weights at or before ``tau``."""
        u = np.clip(tau / self.t, 0.0, 1.0)
        return np.where(tau < self.start, 0.0, u ** (self.gamma + 1.0))

    def density(self, tau: Times) -> Times:
        """Derivative of the cumulative, without the jump at ``start``."""
        u = np.clip(tau / self.t, 0.0, 1.0)
        return _between(self.start, tau, self.t, (self.gamma + 1.0) / self.t * u**self.gamma)


@dataclass(frozen=True, slots=True)
class Exponential:
    """Average with a constant decay: F = exp(-(t - tau) / tau0) from ``start`` on.

    The weights at ``start`` begin the average and keep the mass exp(-(t - start) / tau), unless it is corrected.

    Args:
        tau: Time constant, > 0: ``-dt / log(decay)`` for a decay per step of length ``dt``.
        t: Training time at which the average is read, > 0.
        start: Training time at which the averaging began, in [0, t].
        corrected: The mass of the weights at ``start`` is removed and the rest scaled to 1 (bias correction).

    Raises:
        TargetError: An argument is outside its range.
    """

    kind: ClassVar[str] = "exponential"
    tau: float
    t: float
    start: float = 0.0
    corrected: bool = False

    def __post_init__(self) -> None:
        _check_span(self.kind, self.start, self.t, proper=self.corrected is True)
        check_number(self.tau, f"{self.kind} profile: tau", "above 0", lambda x: x > 0, "tau is -dt / log(decay)")
        if not isinstance(self.corrected, bool):
            raise TargetError(
                f"{self.kind} profile: corrected must be true or false, found {self.corrected!r}",
                hint="corrected=True removes the weight of the first weights",
            )

    @property
    def knots(self) -> tuple[float, ...]:
        """Start and end."""
        return (self.start, self.t)

    @property
    def steepness(self) -> float:
        """Time constants that fit into ``t``."""
        return self.t / self.tau

    def cumulative(self, tau: Times) -> Times:
        """Share of the average from weights at or before ``tau``."""
        inside = np.clip(tau, self.start, self.t)
        share = np.exp((inside - self.t) / self.tau)
        if self.corrected:
            # expm1, since both differences vanish when the average is young compared with tau.
            share = share * np.expm1((self.start - inside) / self.tau) / np.expm1((self.start - self.t) / self.tau)
        return np.where(tau < self.start, 0.0, share)

    def density(self, tau: Times) -> Times:
        """Derivative of the cumulative, without the jump at ``start``."""
        inside = np.clip(tau, self.start, self.t)
        mass = -math.expm1((self.start - self.t) / self.tau) if self.corrected else 1.0
        return _between(self.start, tau, self.t, np.exp((inside - self.t) / self.tau) / (self.tau * mass))


@dataclass(frozen=True, slots=True)
class Uniform:
    """Equal weight on all of ``[start, t]``, as in stochastic weight averaging.

    Args:
        start: Training time at which the window opens, in [0, t).
        t: Training time at which it closes, > 0.

    Raises:
        TargetError: An argument is outside its range.
    """

    kind: ClassVar[str] = "uniform"
    steepness: ClassVar[float] = 0.0
    start: float
    t: float

    def __post_init__(self) -> None:
        _check_span(self.kind, self.start, self.t, proper=True)

    @property
    def knots(self) -> tuple[float, ...]:
        """Start and end."""
        return (self.start, self.t)

    def cumulative(self, tau: Times) -> Times:
        """Share of the average from weights at or before ``tau``."""
        return np.clip((tau - self.start) / (self.t - self.start), 0.0, 1.0)

    def density(self, tau: Times) -> Times:
        """Derivative of the cumulative."""
        return _between(self.start, tau, self.t, np.full(np.shape(tau), 1.0 / (self.t - self.start)))


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
        _check_span(self.kind, 0.0, self.t)

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
        _check_span(self.kind, self.start, self.t, proper=True)
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
        return _between(self.start, tau, self.t, slope / span)


def _check_span(kind: str, start: float, t: float, *, proper: bool = False) -> None:
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


def _between(start: float, tau: Times, t: float, density: Times) -> Times:
    return np.where((tau >= start) & (tau <= t), density, 0.0)
