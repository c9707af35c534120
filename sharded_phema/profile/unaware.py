"""Profile of a power-function average whose decay takes no notice of how long ago it was updated last."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from scipy.special import gammaln

from sharded_phema.errors import check_number
from sharded_phema.profile.contract import Times, between, check_span

__all__ = ["Unaware"]

# Of so many updates each is a jump of its own; of more, a curve through the middle of the jumps is as good as those.
_JUMPS = 2048


@dataclass(frozen=True, slots=True)
class Unaware:
    """What other packages keep where they update a power-function average every few calls only.

    Of the calls c = 1, 2, 3 ... the first and every ``every``-th after it update, and the old average then keeps
    (c / (c + 1)) ** (gamma + 1), as if there had been an update at each call. So the share from the first k updates
    of K is a product over the later ones, ``(c_j = j every + 1)``, which telescopes into Gamma functions::

        prod_{j = k + 1}^{K} (c_j / (c_j + 1)) ** (gamma + 1) = (R(k) / R(K)) ** (gamma + 1)
        R(k) = Gamma(k + 1 + 2 / every) / Gamma(k + 1 + 1 / every)  ~  k ** (1 / every)

    and is nearly a power profile of exponent (gamma + 1) / every - 1. At every = 1 it is ((c + 1) / (C + 1)) **
    (gamma + 1).

    Args:
        gamma: Exponent that was asked for, >= 0.
        every: Calls from one update to the next, >= 1; a call is a unit of training time.
        t: Training time at which the average is read, > 0.
        start: Training time of the first call, which updates, in [0, t].

    Raises:
        TargetError: An argument is outside its range.
    """

    kind: ClassVar[str] = "power"
    gamma: float
    every: float
    t: float
    start: float = 0.0

    def __post_init__(self) -> None:
        check_span(self.kind, self.start, self.t)
        check_number(
            self.gamma, f"{self.kind} profile: gamma", "at least 0", lambda x: x >= 0, "gamma=6.94 is sigma_rel 0.10"
        )
        check_number(
            self.every, f"{self.kind} profile: every", "at least 1", lambda x: x >= 1, "update_every of the package"
        )

    @property
    def knots(self) -> tuple[float, ...]:
        """The updates, as far as each is a jump of its own, and the end."""
        if self._last > _JUMPS:
            return (self.start, self.t)
        updates = (self.start + self.every * np.arange(self._last + 1.0)).tolist()
        return tuple(dict.fromkeys((*updates, self.t)))

    @property
    def steepness(self) -> float:
        """Exponent of the power that it nearly is; 0 where it is made of jumps."""
        return (self.gamma + 1.0) / self.every if self._last > _JUMPS else 0.0

    @property
    def _last(self) -> float:
        """Number of the last update, from 0."""
        return float(np.floor((self.t - self.start) / self.every))

    def cumulative(self, tau: Times) -> Times:
        """Share of the average from weights at or before ``tau``."""
        inside = np.clip(tau, self.start, self.t)
        updates = (inside - self.start) / self.every
        coarse = self._last <= _JUMPS
        done = np.floor(updates) if coarse else np.clip(updates - 0.5, 0.0, self._last)
        share = np.exp((self.gamma + 1.0) * (self._log(done) - self._log(np.array(self._last))))
        return np.where(tau < self.start, 0.0, np.where(tau < self.t, np.minimum(share, 1.0), 1.0))

    def density(self, tau: Times) -> Times:
        """Derivative of the cumulative, without its jumps."""
        if self._last <= _JUMPS:
            return np.zeros(np.shape(tau))
        call = np.clip(tau, self.start, self.t) - self.start + 1.0
        slope = (self.gamma + 1.0) * np.log1p(1.0 / call) / self.every
        return between(self.start, tau, self.t, self.cumulative(tau) * slope)

    def _log(self, updates: Times) -> Times:
        """Logarithm of R."""
        step = 1.0 / self.every
        found: Times = gammaln(updates + 1.0 + 2.0 * step) - gammaln(updates + 1.0 + step)
        return found
