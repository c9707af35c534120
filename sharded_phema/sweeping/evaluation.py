"""Evaluation: scores of points, each measured once, in batches of rebuilt weights that fit."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sharded_phema.errors import PhemaError
from sharded_phema.scores import Score
from sharded_phema.sweeping.ledger import Ledger
from sharded_phema.sweeping.metric import Measure
from sharded_phema.sweeping.points import Point
from sharded_phema.sweeping.supply import Supplied, Supply
from sharded_phema.world import gather, rank_and_size

__all__ = ["Evaluation", "Told"]

Task = tuple[Point, int]
"""A point, and the number of the repeat."""

Told = Callable[[int, int], object]
"""Is told, by rank 0, how many evaluations are done and how many there are."""


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What came out of one call of the metric on one process; travels to the others."""

    task: int
    score: float | None
    seconds: float
    failure: str


class Evaluation:
    """Measures points that were not measured before, and looks up the others. Collective throughout.

    Args:
        measure: The metric.
        supply: Rebuilds weights.
        ledger: Takes the scores, one by one.
        repeats: How often each point is measured.
        told: Is told of the progress.
        expected: How many evaluations there will be, where that is known beforehand.
    """

    def __init__(
        self, measure: Measure, supply: Supply, ledger: Ledger, *, repeats: int, told: Told, expected: int = 0
    ) -> None:
        self._measure, self._supply, self._ledger = measure, supply, ledger
        self._repeats, self._told, self._expected = repeats, told, expected
        self._asked: dict[Task, None] = {}

    @property
    def scores(self) -> list[Score]:
        """All that were asked for and measured so far, in the order in which they were first asked for."""
        return [score for task in self._asked if (score := self._ledger.find(*task))]

    def of(self, points: Sequence[Point]) -> list[float]:
        """Score of each point: the mean of its repeats.

        Raises:
            PhemaError: Weights cannot be rebuilt, or the metric gave no score.
            Exception: What the user's metric raised. What had been measured is in the ledger.
        """
        tasks = [(point, repeat) for point in points for repeat in range(self._repeats)]
        self._asked |= dict.fromkeys(tasks)
        missing: dict[tuple[object, ...], list[Task]] = {}
        for task in dict.fromkeys(tasks):
            if self._ledger.find(*task) is None:
                missing.setdefault(task[0].weights, []).append(task)
        todo, groups = sum(map(len, missing.values())), list(missing.values())
        self._tell(todo)
        for first in range(0, len(groups), self._supply.room):
            todo -= self._batch(groups[first : first + self._supply.room], todo)
        return [self._mean(point) for point in points]

    def _mean(self, point: Point) -> float:
        found = [self._ledger.find(point, repeat) for repeat in range(self._repeats)]
        return sum(score.score for score in found if score) / self._repeats

    def _tell(self, todo: int) -> None:
        if rank_and_size()[0] == 0:
            total = len(self._asked)
            self._told(total - todo, max(total, self._expected))

    def _batch(self, groups: Sequence[Sequence[Task]], todo: int) -> int:
        """Rebuild weights, one of each group, and measure all that is wanted of them; how many that were."""
        tasks = [(number, task) for number, group in enumerate(groups) for task in group]
        with self._supply.rebuilt([group[0][0].wanted for group in groups]) as supplied:
            mine = [index for index, (number, _) in enumerate(tasks) if number in supplied.weights]
            for turn in range(max(gather(len(mine)))):
                outcomes, error = self._turn(tasks, mine[turn : turn + 1], supplied)
                done = self._scores(tasks, outcomes, supplied.forecasts)
                self._ledger.add(done)
                todo -= len(done)
                self._tell(todo)
                _raise_first(outcomes, error)
        return len(tasks)

    def _turn(
        self, tasks: Sequence[tuple[int, Task]], mine: Sequence[int], supplied: Supplied
    ) -> tuple[list[_Outcome], Exception | None]:
        """At most one call of the metric on each process, and what came out of all of them."""
        outcome, error = None, None
        for index in mine:
            number, (point, repeat) = tasks[index]
            outcome, error = _measured(self._measure, supplied, number, index, point, repeat)
        return [found for found in gather(outcome) if found is not None], error

    def _scores(
        self, tasks: Sequence[tuple[int, Task]], outcomes: Sequence[_Outcome], forecasts: Sequence[float]
    ) -> list[Score]:
        """Records of what succeeded; where several processes measured the same, the first one's counts."""
        failed = {outcome.task for outcome in outcomes if outcome.failure}
        found: dict[int, Score] = {}
        for outcome in outcomes:
            number, (point, repeat) = tasks[outcome.task]
            if outcome.score is not None and outcome.task not in failed | found.keys():
                found[outcome.task] = self._ledger.score(
                    point, repeat, outcome.score, forecasts[number], outcome.seconds
                )
        return list(found.values())


def _measured(
    measure: Measure, supplied: Supplied, number: int, index: int, point: Point, repeat: int
) -> tuple[_Outcome, Exception | None]:
    started = time.monotonic()
    try:
        found = measure(supplied.weights[number], point, repeat)
        score = measure.score(found) if supplied.counts else None
    except Exception as error:
        said = error.message if isinstance(error, PhemaError) else traceback.format_exc()
        return _Outcome(index, None, 0.0, f"rank {rank_and_size()[0]}: {said}"), error
    return _Outcome(index, score, time.monotonic() - started, ""), None


def _raise_first(outcomes: Sequence[_Outcome], error: Exception | None) -> None:
    """Raise this process's own failure, or else tell another's, whose exception may not be able to travel."""
    if error is not None:
        raise error
    for outcome in outcomes:
        if outcome.failure:
            raise PhemaError(
                f"the metric failed on {outcome.failure}",
                hint="mend it; the same sweep then goes on where it stopped",
            )
