"""Route: which points a sweep goes through, all of a grid or few towards the best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from sharded_phema.errors import OrderError, TargetError
from sharded_phema.scores import Second
from sharded_phema.store import Run
from sharded_phema.sweeping.evaluation import Evaluation
from sharded_phema.sweeping.points import Line, Point, check_groups
from sharded_phema.sweeping.ranges import Times, expand_targets, expand_times
from sharded_phema.sweeping.search import descend, search
from sharded_phema.sweeping.wish import Towards
from sharded_phema.tally import Better
from sharded_phema.target import Target, parse_target
from sharded_phema.world import from_first

__all__ = ["Route", "route_of"]


@dataclass(frozen=True, slots=True)
class Route:
    """Where a sweep goes; made by ``route_of``.

    Attributes:
        targets: What is measured, or the widths between which is searched.
        times: Training times.
        groups: Patterns of parameters; none for the whole model.
        base: Target of the other parameters; None without groups.
        seconds: Values of a second parameter, or None alone.
        towards: How it goes.
        evaluations: Averages that a search may try.
        better: Which scores are better.
    """

    targets: tuple[Target, ...]
    times: tuple[float, ...]
    groups: tuple[str, ...]
    base: Target | None
    seconds: tuple[Second | None, ...]
    towards: Towards
    evaluations: int
    better: Better

    @property
    def lines(self) -> list[Line]:
        """Curves, each of which is searched apart from the others."""
        together = self.towards == "per-tensor" or not self.groups
        each = [(None, ())] if together or self.base is None else [(g, (("*", self.base),)) for g in self.groups]
        return [Line(t, group, base, second) for t in self.times for group, base in each for second in self.seconds]

    @property
    def size(self) -> int:
        """How many points there are, at most."""
        return len(self.lines) * (len(self.targets) if self.towards == "grid" else self.evaluations)

    def go(self, evaluation: Evaluation) -> None:
        """Have all of it measured. Collective.

        Raises:
            PhemaError: As ``Evaluation``.
        """
        if self.towards == "grid":
            timed = [(target, replace(target, time=None)) for target in self.targets]
            evaluation.of([Point(_at(line, target), bare) for line in self.lines for target, bare in timed])
            return
        for line in self.lines:
            if self.towards == "best":
                self._search(evaluation, line)
            else:
                self._descend(evaluation, line)

    def _search(self, evaluation: Evaluation, line: Line) -> None:
        def scores(widths: Sequence[float]) -> list[float]:
            # Of rank 0, should the last bits of another machine differ.
            same = from_first(lambda: list(widths))
            return self._signed(evaluation.of([Point(line, parse_target(width)) for width in same]))

        search(scores, *self._limits, self.evaluations)

    def _descend(self, evaluation: Evaluation, line: Line) -> None:
        assert self.base is not None
        start = self.base

        def scores(several: Sequence[tuple[float, ...]]) -> list[float]:
            same = from_first(lambda: list(several))
            return self._signed(evaluation.of([_apart(line, self.groups, widths, start) for widths in same]))

        descend(scores, [start.amount] * len(self.groups), *self._limits, self.evaluations)

    @property
    def _limits(self) -> tuple[float, float]:
        widths = [target.amount for target in self.targets]
        return min(widths), max(widths)

    def _signed(self, scores: Sequence[float]) -> list[float]:
        return [score if self.better == "lower" else -score for score in scores]


def route_of(
    run: Run,
    targets: str | Sequence[str | float],
    times: Times,
    groups: Sequence[str],
    base: str | float | None,
    seconds: tuple[Second | None, ...],
    *,
    towards: Towards,
    evaluations: int,
    better: Better,
) -> Route:
    """Where a sweep goes, from what the user gives ``sweep``.

    Raises:
        TargetError: A target, time, pattern or second parameter will not do.
        OrderError: A search is asked for something else than one range of widths.
        StoreError: The run has no snapshots.
    """
    wanted, default = expand_targets(targets), None if base is None else parse_target(base)
    if named := [t.text for t in (*wanted, *filter(None, [default])) if t.time is not None and (times or t is default)]:
        raise TargetError(f"target {named[0]!r} names a time of its own", hint="leave it out, and give times")
    check_groups(groups, [parameter.name for parameter in run.record.parameters])
    if towards != "grid":
        _check_widths([*wanted, *([default] if default and towards == "per-tensor" else [])])
    return Route(wanted, expand_times(run, times), tuple(groups), default, seconds, towards, evaluations, better)


def _check_widths(targets: Sequence[Target]) -> None:
    odd = [target.text for target in targets if target.kind != "width" or target.time is not None]
    if odd or len(set(targets)) < 2:
        raise OrderError(
            f"search: expected two widths or more to search between, found {odd[0] if odd else targets[0].text!r}",
            hint="for example --targets 0.02:0.28",
        )


def _at(line: Line, target: Target) -> Line:
    return line if target.time is None else replace(line, t=target.time)


def _apart(line: Line, groups: Sequence[str], widths: Sequence[float], base: Target) -> Point:
    """The point at which groups have widths of their own; in one way only, that it may be found again."""
    own = {g: parse_target(width) for g, width in zip(groups, widths, strict=True) if width != base.amount}
    if not own:
        return Point(line, base)
    first, *others = own.items()
    return Point(replace(line, group=first[0], base=(*others, ("*", base))), first[1])
