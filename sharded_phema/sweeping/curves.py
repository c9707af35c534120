"""Curves: what a sweep found, the scores that differ in the target alone put together."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sharded_phema.scores import Score
from sharded_phema.tally import Entry, Tally

__all__ = ["Curve", "curves_of"]


@dataclass(frozen=True, slots=True)
class Curve:
    """Scores of several targets, all else being the same.

    Attributes:
        first: One of them, which says what is the same.
        entries: One for each target, by width; then those without one.
        best: The best of them.
    """

    first: Score
    entries: tuple[Entry, ...]
    best: Entry

    @property
    def widths(self) -> tuple[float, ...]:
        """Relative widths that were measured, increasing."""
        return tuple(entry.first.sigma_rel for entry in self.entries if entry.first.sigma_rel is not None)

    @property
    def is_open(self) -> bool:
        """Whether the best width is the least or the largest of several, so that a better one may lie beyond."""
        return len(self.widths) > 1 and self.best.first.sigma_rel in (self.widths[0], self.widths[-1])


def curves_of(found: Tally) -> tuple[Curve, ...]:
    """Curves in the order in which they were first measured."""
    curves = []
    for line in dict.fromkeys(_line(entry.first) for entry in found.entries):
        own = found.where(lambda score, line=line: _line(score) == line)  # type: ignore[misc]
        ordered = sorted(own.entries, key=lambda entry: entry.first.sigma_rel or math.inf)
        curves.append(Curve(ordered[0].first, tuple(ordered), own.best))
    return tuple(curves)


def _line(score: Score) -> tuple[object, ...]:
    return (score.t, score.group, score.base, score.second)
