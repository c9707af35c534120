"""A profile put together from others: the weighted mean of their averages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from sharded_phema.errors import TargetError, check_number
from sharded_phema.profile.contract import Profile, Times

__all__ = ["Mixture"]

# What adding up a thousand shares of a whole may leave short of 1.
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class Mixture:
    """Weighted mean of several averages, which may be read at different times.

    Args:
        weights: Share of each, at least 0, with sum 1 (within 1e-9, and then scaled to it).
        profiles: What is mixed, as many.

    Raises:
        TargetError: There is none, their numbers differ, or the weights are not shares of a whole.
    """

    kind: ClassVar[str] = "mixture"
    weights: Sequence[float]
    profiles: Sequence[Profile]

    def __post_init__(self) -> None:
        if not len(self.weights) == len(self.profiles) > 0:
            raise TargetError(
                f"mixture profile: {len(self.weights)} weights and {len(self.profiles)} profiles",
                hint="give one weight for each profile, and at least one",
            )
        mend = "weights are shares of a whole, for example [0.3, 0.7]"
        for weight in self.weights:
            check_number(weight, "mixture profile: a weight", "at least 0", lambda x: x >= 0, mend)
        total = math.fsum(self.weights)
        if abs(total - 1.0) > _ROUNDING:
            raise TargetError(f"mixture profile: the weights sum to {total!r}, expected 1", hint=mend)
        object.__setattr__(self, "weights", tuple(float(weight) / total for weight in self.weights))
        object.__setattr__(self, "profiles", tuple(self.profiles))

    @property
    def t(self) -> float:
        """Training time of the latest."""
        return max(profile.t for profile in self.profiles)

    @property
    def knots(self) -> tuple[float, ...]:
        """Those of all."""
        return tuple(sorted({knot for profile in self.profiles for knot in profile.knots}))

    @property
    def steepness(self) -> float:
        """That of the steepest."""
        return max(profile.steepness for profile in self.profiles)

    def cumulative(self, tau: Times) -> Times:
        """Share of the average from weights at or before ``tau``."""
        shares = np.stack([profile.cumulative(tau) for profile in self.profiles])
        # The sum of the weights is 1 to rounding only, and a profile is 1 at its end.
        return np.where(np.asarray(tau) < self.t, np.minimum(np.tensordot(self.weights, shares, 1), 1.0), 1.0)

    def density(self, tau: Times) -> Times:
        """Derivative of the cumulative, without the jumps."""
        return np.tensordot(self.weights, np.stack([profile.density(tau) for profile in self.profiles]), 1)
