"""Points: what a sweep measures: a target, the training time, the part of the model, and a second parameter."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import combinations

from sharded_phema.errors import TargetError
from sharded_phema.per_tensor import Wanted
from sharded_phema.scores import Second
from sharded_phema.spelling import spelled
from sharded_phema.target import Target
from sharded_phema.width import sigma_rel_of

__all__ = ["Line", "Point", "check_groups", "sigma_rel_in"]


@dataclass(frozen=True, slots=True)
class Line:
    """What stays the same along one curve.

    Attributes:
        t: Training time at which averages are read.
        group: Pattern of the parameters that have the point's target; None for all.
        base: Targets of the others, by pattern, ``*`` last; empty without a group.
        second: A second parameter of the metric; None without one.
    """

    t: float
    group: str | None = None
    base: tuple[tuple[str, Target], ...] = ()
    second: Second | None = None

    @property
    def base_text(self) -> str | None:
        """Target of all other parameters; a JSON object by pattern where they have several; None without a group."""
        if len(self.base) < 2:
            return self.base[0][1].text if self.base else None
        return json.dumps({pattern: target.text for pattern, target in self.base})


@dataclass(frozen=True, slots=True)
class Point:
    """One target on a line; the target names no time."""

    line: Line
    target: Target

    @property
    def wanted(self) -> Wanted:
        """What is rebuilt for it, as ``reconstruct`` takes it."""
        at = f"@t={spelled(self.line.t)}"
        if self.line.group is None:
            return self.target.text + at
        parts = {self.line.group: self.target} | dict(self.line.base)
        return {pattern: target.text + at for pattern, target in parts.items()}

    @property
    def weights(self) -> tuple[object, ...]:
        """What tells weights apart: points that have it in common share a rebuilt model."""
        return (self.target.text, self.line.t, self.line.group, self.line.base_text)


def sigma_rel_in(target: Target) -> float | None:
    """Relative width of a target that has one."""
    if target.kind == "width":
        return target.amount
    return sigma_rel_of(target.amount) if target.kind == "power" else None


def check_groups(groups: Sequence[str], names: Sequence[str]) -> None:
    """Prove that each pattern matches some averaged parameters but not all, and no parameter matches two.

    Raises:
        TargetError: They do not.
    """
    held = {group: {name for name in names if fnmatchcase(name, group)} for group in groups}
    for group, matched in held.items():
        if not matched:
            raise TargetError(
                f"group {group!r} matches none of {len(names)} averaged parameters, such as {names[0]}",
                hint="patterns are those of file names, such as *.attn.*",
            )
        if len(matched) == len(names):
            raise TargetError(
                f"group {group!r} matches all {len(names)} averaged parameters, and leaves none to the base",
                hint="leave group and base out to sweep the whole model",
            )
    for one, other in combinations(held, 2):
        if both := sorted(held[one] & held[other]):
            raise TargetError(
                f"groups {one!r} and {other!r} both match {both[0]}", hint="give groups that have nothing in common"
            )
