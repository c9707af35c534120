"""Tracked: the averages that a run keeps, how they are recorded, and what each update weighs in them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from sharded_phema.errors import TargetError
from sharded_phema.target import Target, parse_targets
from sharded_phema.width import gamma_of

__all__ = ["TrackedSet", "asked_for", "tracked_set"]


@dataclass(frozen=True, slots=True)
class TrackedSet:
    """What a run tracks; made by ``tracked_set``.

    Attributes:
        asked: Each average as the user spelled it, in order.
        targets: Each as it is recorded. With the time of a snapshot and the time of the run's first update this
            gives the profile of what was stored, ramps and late starts included.
        start: Training time before which the run averages nothing.
    """

    asked: tuple[str, ...]
    targets: tuple[Target, ...]
    start: float

    @property
    def labels(self) -> tuple[str, ...]:
        """How the run's record names each average."""
        return tuple(target.text for target in self.targets)

    def entering(self, first: float, last: float, t: float) -> list[float]:
        """Weight of the current weights in each average, for an update at ``t`` after one at ``last`` < ``t``.

        Args:
            first: Training time of the run's first update, at most ``last``.
            last: Training time of the update before.
            t: Training time now.
        """
        return [target.tracked(t, first).entering(last) for target in self.targets]

    def find(self, wanted: Target) -> int | None:
        """Place of an average, however it is spelled; None where it is not tracked."""
        try:
            recorded = _recorded(wanted, self.start)
        except TargetError:  # windows and decays never are
            return None
        return self.targets.index(recorded) if recorded in self.targets else None


def asked_for(sigma_rels: Sequence[float] | None, profiles: Sequence[str | float]) -> list[str | float]:
    """All averages that a run is to keep; 0.05 and 0.10 where nothing is said.

    Raises:
        TargetError: One of the two is no list.
    """
    widths = sigma_rels if sigma_rels is not None else () if profiles else (0.05, 0.10)
    for name, several in (("sigma_rels", widths), ("profiles", profiles)):
        if isinstance(several, str) or not isinstance(several, Iterable):
            raise TargetError(
                f"{name}={several!r}: a list is expected", hint=f"write {name}=[{several!r}] for a single average"
            )
    return [*widths, *profiles]


def tracked_set(texts: Iterable[str | float], start: float) -> TrackedSet:
    """The averages that the texts ask for, in a run that averages nothing before ``start``.

    Uniform and corrected averages that name no start count from the run's.

    Raises:
        TargetError: A text is no target or cannot be tracked, there is none, or two are the same average.
    """
    asked = parse_targets(texts)
    targets = [_recorded(target, start) for target in asked]
    for index, target in enumerate(targets):
        if target in targets[:index]:
            twin = asked[targets.index(target)].text
            raise TargetError(f"{asked[index].text} and {twin} are the same average", hint="track every average once")
    return TrackedSet(tuple(target.text for target in asked), tuple(targets), start)


def _recorded(target: Target, start: float) -> Target:
    """The target that says all of what is tracked, one for all texts that mean the same."""
    target.tracked(1.0, 0.0)  # refuses what cannot be
    if target.has_start and target.start == 0.0:
        target = replace(target, start=start)
    if target.kind == "uniform" and target.start == 0.0:
        return Target("power", 0.0, "", None)
    # By its exponent, which unlike a width is never rounded.
    return replace(target, kind="power", amount=gamma_of(target.amount)) if target.kind == "width" else target
