"""Profiles of averages that are updated while a model trains."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from sharded_phema.errors import TargetError, check_number
from sharded_phema.profile.contract import Times, between, check_span
from sharded_phema.width import step_weight

__all__ = ["Exponential", "Power", "Ramped", "Uniform"]


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
        check_span(self.kind, self.start, self.t)
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
        return between(self.start, tau, self.t, (self.gamma + 1.0) / self.t * u**self.gamma)

    def entering(self, last: float) -> float:
        """Weight of the weights at ``t`` in an average last updated at ``last``."""
        return 1.0 if last < self.start else step_weight(self.gamma, self.t, self.t - last)


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
        check_span(self.kind, self.start, self.t, proper=self.corrected is True)
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
        return between(self.start, tau, self.t, np.exp((inside - self.t) / self.tau) / (self.tau * mass))

    def entering(self, last: float) -> float:
        """Weight of the weights at ``t`` in an average last updated at ``last``.

        Corrected, this is (1 - b**n) / (1 - b**N) for n of the N steps since ``start`` and the decay b of a step:
        Adam's running mean after its correction (Kingma and Ba, arXiv:1412.6980v9, section 3).
        """
        if last < self.start:
            return 1.0
        weight = -math.expm1((last - self.t) / self.tau)
        return weight / -math.expm1((self.start - self.t) / self.tau) if self.corrected else weight


@dataclass(frozen=True, slots=True)
class Ramped:
    """Exponential average whose half-life grows with training time up to a limit: half-life(t) = min(limit, ramp t).

    Until ``tau ln(2) / ramp`` it is the power profile of gamma = ln(2) / ramp - 1, from there on exponential. The
    weights at ``start`` begin the average, as in the two profiles that it is made of.

    Args:
        tau: Time constant of the limit, its half-life divided by ln(2), > 0.
        ramp: Half-life divided by training time while it grows, > 0 and at most ln(2).
        t: Training time at which the average is read, > 0.
        start: Training time at which the averaging began, in [0, t].

    Raises:
        TargetError: An argument is outside its range.

    Source: the rule of StyleGAN2-ADA and EDM (Karras et al., arXiv:2206.00364v2), in the limit of short steps.
    """

    kind: ClassVar[str] = "exponential"
    tau: float
    ramp: float
    t: float
    start: float = 0.0

    def __post_init__(self) -> None:
        check_span(self.kind, self.start, self.t)
        check_number(self.tau, f"{self.kind} profile: tau", "above 0", lambda x: x > 0, "tau is half-life / ln(2)")
        mend = "ramp=0.05 is a half-life of 5 % of the training so far"
        inside = "above 0 and at most 0.693 (ln 2)"
        check_number(self.ramp, f"{self.kind} profile: ramp", inside, lambda x: 0 < x <= math.log(2.0), mend)

    @property
    def knots(self) -> tuple[float, ...]:
        """Start, end of the ramp and end."""
        return (self.start, *((self._top,) if self.start < self._top < self.t else ()), self.t)

    @property
    def steepness(self) -> float:
        """Exponent of the power part, or time constants that fit into ``t``."""
        return max(math.log(2.0) / self.ramp, self.t / self.tau)

    def cumulative(self, tau: Times) -> Times:
        """Share of the average from weights at or before ``tau``."""
        inside = np.clip(tau, self.start, self.t)
        top = min(self._top, self.t)
        slow = np.exp((np.maximum(inside, top) - self.t) / self.tau)
        share = slow * (np.minimum(inside, top) / top) ** (math.log(2.0) / self.ramp)
        return np.where(tau < self.start, 0.0, share)

    def density(self, tau: Times) -> Times:
        """Derivative of the cumulative, without the jump at ``start``."""
        inside = np.clip(tau, math.ulp(0.0), self.t)
        top = min(self._top, self.t)
        # Written out below the top, where share / time would be 0 / 0 at 0.
        growing = math.log(2.0) / self.ramp / top * (np.minimum(inside, top) / top) ** (math.log(2.0) / self.ramp - 1.0)
        growing = growing * math.exp((top - self.t) / self.tau)
        constant = np.exp((inside - self.t) / self.tau) / self.tau
        return between(self.start, tau, self.t, np.where(inside <= top, growing, constant))

    def entering(self, last: float) -> float:
        """Weight of the weights at ``t`` in an average last updated at ``last``."""
        top = self._top
        begin, end = min(last, top), min(self.t, top)
        if last < self.start or end - begin == end:
            return 1.0
        growing = math.log(2.0) / self.ramp * math.log1p((begin - end) / end)
        return -math.expm1(growing - (max(self.t, top) - max(last, top)) / self.tau)

    @property
    def _top(self) -> float:
        """Training time at which the half-life reaches its limit."""
        return self.tau * math.log(2.0) / self.ramp


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
        check_span(self.kind, self.start, self.t, proper=True)

    @property
    def knots(self) -> tuple[float, ...]:
        """Start and end."""
        return (self.start, self.t)

    def cumulative(self, tau: Times) -> Times:
        """Share of the average from weights at or before ``tau``."""
        return np.clip((tau - self.start) / (self.t - self.start), 0.0, 1.0)

    def density(self, tau: Times) -> Times:
        """Derivative of the cumulative."""
        return between(self.start, tau, self.t, np.full(np.shape(tau), 1.0 / (self.t - self.start)))

    def entering(self, last: float) -> float:
        """Weight of the weights at ``t`` in an average last updated at ``last``."""
        return (self.t - max(last, self.start)) / (self.t - self.start)
