"""Course: the running averages as training time goes on, in the rhythm that was asked for."""

from __future__ import annotations

import math
from collections.abc import Callable

from sharded_phema.averages import Averages
from sharded_phema.errors import OrderError, UnsupportedModel
from sharded_phema.schedule import Schedule
from sharded_phema.state import Clock
from sharded_phema.tracked import TrackedSet

__all__ = ["Course"]


class Course:
    """Moves averages as time advances. No collectives, no files.

    Attributes:
        clock: Where the run stands.

    Args:
        averages: One for each tracked target.
        schedule: Rhythm of the run.
        tracked: What the averages follow.
        steps: How many steps changed the weights so far; None where the model does not count them.
    """

    def __init__(
        self, averages: Averages, schedule: Schedule, tracked: TrackedSet, steps: Callable[[], int | None]
    ) -> None:
        self._averages, self._schedule, self._tracked, self._steps = averages, schedule, tracked, steps
        self.continue_at(Clock())

    def continue_at(self, clock: Clock) -> None:
        """Go on from there: steps that were made before do not count."""
        self.clock, self._counted = clock, self._steps()

    @property
    def begun(self) -> bool:
        """Whether anything was averaged."""
        return self.clock.start < math.inf

    def advance(self, t: float | None, unit: str) -> bool:
        """Go on to a later time, and take the weights as they are now where they are due.

        Where the model counts its steps and made none since the last call, nothing is done: time goes on with the next
        step, and all of it belongs to the weights that this step makes.

        Args:
            t: Training time; one more than now unless given.
            unit: What it counts, for messages.

        Returns:
            Whether a snapshot is due.

        Raises:
            OrderError: It is not later.
        """
        steps = self._steps()
        if steps is not None and steps == self._counted:
            return False
        last, t = self.clock.t, self.clock.t + 1 if t is None else float(t)
        if not (math.isfinite(t) and t > last):
            raise OrderError(
                f"update at training time {t:.17g}: it must be later than the last one, {last:.17g}",
                hint=f"count {unit} since training began, and update once per optimizer step",
            )
        self._counted = steps
        due = self._schedule.updates(self.clock.updated, t)
        self.clock = self.clock.at(t)
        if due:
            self._move()
        return self._schedule.snapshots(last, t)

    def catch_up(self) -> None:
        """Bring the averages up to now, where the rhythm of updates left weights out."""
        if self.clock.updated < self.clock.t and self.clock.t >= self._schedule.start:
            self._move()

    def check_uncounted(self) -> None:
        """Prove that the model leaves it to others to count its steps.

        Raises:
            UnsupportedModel: It counts them, and an optimizer's hook comes before it has.
        """
        if self._counted is not None:
            raise UnsupportedModel(
                "attach: the model is an engine that steps its optimizer itself, and counts a step only afterwards",
                hint="call ema.update() after engine.step(), at every micro-batch: it tells which are steps",
            )

    def check_begun(self, act: str) -> None:
        """Prove that something was averaged.

        Raises:
            OrderError: Nothing was.
        """
        if not self.begun:
            raise OrderError(f"{act}: nothing was averaged yet", hint="call update() after the first optimizer step")

    def _move(self) -> None:
        clock = self.clock
        # The first weights that are averaged are the average.
        weights = [1.0] * len(self._tracked.targets)
        if self.begun:
            weights = self._tracked.entering(clock.start, clock.updated, clock.t)
        self._averages.update_(weights)
        self.clock = clock.after_update()
