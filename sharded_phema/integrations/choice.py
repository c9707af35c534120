"""Choice: the averages that a script of diffusers tracks, and which of them it looks at."""

from __future__ import annotations

from dataclasses import dataclass

from sharded_phema.errors import TargetError
from sharded_phema.target import parse_target
from sharded_phema.tracked import TrackedSet, asked_for, tracked_set

__all__ = ["Choice"]

RAMP = 0.077
"""Half-life over training so far of an average whose decay is (1 + n) / (10 + n), as that of diffusers at first."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What an ``EMAModel`` was asked for.

    Attributes:
        decay: Of diffusers' own average, or None.
        widths: Relative widths.
        wanted: The average that is copied and saved; None for the first of the above that there is.
        after: Steps before averaging begins.
    """

    decay: float | None
    widths: tuple[float, ...]
    wanted: str | float | None
    after: int

    @property
    def profiles(self) -> list[str]:
        """Averages besides those of the widths."""
        return [] if self.decay is None else [f"exponential:decay={self.decay!r},ramp={RAMP}"]

    @property
    def start(self) -> int:
        """First training time that is averaged."""
        return self.after + 1 if self.after else 0

    @property
    def tracked(self) -> TrackedSet:
        """All averages."""
        return tracked_set(asked_for(self.widths, self.profiles), self.start)

    @property
    def index(self) -> int:
        """Place of the wanted one.

        Raises:
            TargetError: It is not tracked.
        """
        tracked = self.tracked
        if self.wanted is None:
            return len(self.widths) if self.profiles else 0
        if (found := tracked.find(parse_target(self.wanted))) is None:
            raise TargetError(
                f"target={self.wanted!r} is not tracked; tracked are {', '.join(tracked.asked)}",
                hint="name one of them, or track it with sigma_rels; any other can be rebuilt from run_dir afterwards",
            )
        return found

    @property
    def label(self) -> str:
        """How the run's record names the wanted one."""
        return self.tracked.labels[self.index]

    def decay_at(self, step: int) -> float:
        """Weight that the wanted average keeps of itself at a step, from 1."""
        if step <= self.after + 1:
            return 0.0
        return 1.0 - self.tracked.entering(self.after + 1, step - 1, step)[self.index]
