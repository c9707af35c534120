"""Tally: scores put together, repeated evaluations of one average as one entry."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from sharded_phema.errors import StoreError
from sharded_phema.scores import Score, Second

__all__ = ["Better", "Entry", "Tally", "tally"]

Better = Literal["lower", "higher"]
"""Which scores are better."""


@dataclass(frozen=True, slots=True)
class Entry:
    """All evaluations of one average.

    Args:
        first: The first of them, which says what was evaluated.
        values: What the metric said each time, in order.
    """

    first: Score
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean of what the metric said."""
        return statistics.fmean(self.values)

    @property
    def least(self) -> float:
        """Smallest of what the metric said."""
        return min(self.values)

    @property
    def most(self) -> float:
        """Largest of what the metric said."""
        return max(self.values)


@dataclass(frozen=True, slots=True)
class Tally:
    """Everything that one metric said of one run; made by ``tally``.

    Args:
        entries: One for each average, training time, group and value of the second parameter, in order of appearance.
        better: Whether lower or higher scores are better.
    """

    entries: tuple[Entry, ...]
    better: Better

    @property
    def run(self) -> str:
        """Identity of the run."""
        return self.entries[0].first.run

    @property
    def unit(self) -> str:
        """What training time counts."""
        return self.entries[0].first.unit

    @property
    def metric(self) -> str:
        """What was measured."""
        return self.entries[0].first.metric

    @property
    def times(self) -> tuple[float, ...]:
        """Training times at which averages were evaluated, increasing."""
        return tuple(sorted({entry.first.t for entry in self.entries}))

    @property
    def groups(self) -> tuple[str, ...]:
        """Groups of parameters that had averages of their own, in order of appearance."""
        return tuple(dict.fromkeys(e.first.group for e in self.entries if e.first.group is not None))

    @property
    def seconds(self) -> tuple[Second, ...]:
        """Values of the second parameter, increasing."""
        found = {entry.first.second for entry in self.entries if entry.first.second is not None}
        return tuple(sorted(found, key=lambda second: (second.name, second.value)))

    def where(self, keep: Callable[[Score], bool]) -> Tally:
        """The entries whose first score is to be kept; there may be none."""
        return Tally(tuple(entry for entry in self.entries if keep(entry.first)), self.better)

    @property
    def best(self) -> Entry:
        """The entry with the best mean, the first of equals."""
        return (max if self.better == "higher" else min)(self.entries, key=lambda entry: entry.mean)


def tally(scores: Sequence[Score], *, better: Better = "lower") -> Tally:
    """Put scores together.

    Args:
        scores: All of one run, one metric, and at most one second parameter.
        better: Whether lower or higher scores are better.

    Raises:
        StoreError: There are none, or they are of several runs, metrics or second parameters.
    """
    if not scores:
        raise StoreError("no scores: at least one is expected", hint="run sharded-phema sweep first")
    second = [score.second.name for score in scores if score.second is not None]
    kinds = {"run": [s.run for s in scores], "unit": [s.unit for s in scores], "metric": [s.metric for s in scores]}
    for what, found in (kinds | {"second parameter": second}).items():
        several = tuple(dict.fromkeys(found))
        if len(several) > 1:
            raise StoreError(
                f"scores: expected one {what}, found {len(several)}: {', '.join(map(repr, several[:3]))}",
                hint="keep a file of scores for each",
            )
    alike: dict[tuple[object, ...], list[Score]] = {}
    for score in scores:
        alike.setdefault((score.target, score.t, score.group, score.base, score.second), []).append(score)
    return Tally(tuple(Entry(same[0], tuple(s.score for s in same)) for same in alike.values()), better)
