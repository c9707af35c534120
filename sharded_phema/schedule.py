"""When to update the averages and when to store them: pure functions of training time."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sharded_phema.errors import TargetError

__all__ = ["Schedule", "crosses", "snapshot_times"]

# Times such as 0.1 * 3 lie a rounding below the multiple that the user means.
_SLACK = 1e-9


@dataclass(frozen=True, slots=True)
class Schedule:
    """Rhythm of a run, in its unit of training time.

    Attributes:
        update_every: Averages are updated when training time passes a multiple of
            this; 0 means at every call. Any rhythm is exact, because each update
            uses the true time since the last one.
        snapshot_every: Averages are stored when training time passes a multiple of this, > 0.
        start: Training time before which nothing is averaged, >= 0.

    Raises:
        TargetError: A number is negative or not finite, or ``snapshot_every`` is 0.
    """

    update_every: float
    snapshot_every: float
    start: float

    def __post_init__(self) -> None:
        for name, least in (("update_every", 0.0), ("snapshot_every", math.ulp(0.0)), ("start", 0.0)):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= least):
                kind = "a positive" if least else "a non-negative"
                raise TargetError(
                    f"{name} must be {kind} number in the run's unit of training time, found {value}",
                    hint="for example snapshot_every=1000 and update_every=0 (every call)",
                )

    def updates(self, last: float, t: float) -> bool:
        """Whether the averages are updated at ``t``, the last update having been at ``last``."""
        return t >= self.start and (self.update_every == 0 or crosses(last, t, self.update_every))

    def snapshots(self, last: float, t: float) -> bool:
        """Whether the averages are stored at ``t``, the call before having been at ``last``."""
        return t >= self.start and crosses(last, t, self.snapshot_every)


def crosses(last: float, t: float, every: float) -> bool:
    """Whether a multiple of ``every`` lies in ``(last, t]``."""
    if not math.isfinite(t / every):
        return t > last  # multiples lie closer together than any two times
    return math.floor(t / every + _SLACK) > math.floor(last / every + _SLACK)


def snapshot_times(length: float, count: int) -> tuple[float, ...]:
    """``count`` evenly spaced snapshot times, the last at the end of a run of ``length``."""
    return tuple(length * (i / count) for i in range(1, count + 1))
