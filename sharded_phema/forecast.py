"""Forecast: before training, what a plan of snapshots will be able to rebuild, and what it costs on disk."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sharded_phema.errors import TargetError
from sharded_phema.fit import fit
from sharded_phema.schedule import snapshot_times
from sharded_phema.target import Target

__all__ = ["Outlook", "check_at_end", "outlook"]


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a number of evenly spaced snapshots will rebuild.

    Attributes:
        snapshots: How many.
        forecasts: Predicted |rebuilt - target| / |raw - target| of each target at the end of the run.
        size: Bytes that the snapshots take.
    """

    snapshots: int
    forecasts: tuple[float, ...]
    size: int


def outlook(
    tracked: Sequence[Target], targets: Sequence[Target], snapshots: int, *, length: float, parameters: float
) -> Outlook:
    """Forecast every target from ``snapshots`` evenly spaced snapshots of the tracked averages.

    Args:
        tracked: Averages that are kept during training.
        targets: What will be wanted at the end of the run.
        snapshots: Number of snapshots, > 0.
        length: Length of the run, in its unit of training time, > 0.
        parameters: Number of the model's parameters; averages are stored in float32.

    Raises:
        TargetError: A number is not positive, or a target has a time of its own.
    """
    for name, value in (("snapshots", snapshots), ("length", length), ("parameters", parameters)):
        if not (math.isfinite(value) and value > 0):
            raise TargetError(f"{name} must be positive, found {value}", hint=f"give --{name} a number above 0")
    check_at_end((*tracked, *targets))
    sources = [target.profile(t) for t in snapshot_times(length, snapshots) for target in tracked]
    fits = fit(sources, [target.profile(length) for target in targets])
    size = round(4 * parameters) * snapshots * len(tracked)
    return Outlook(snapshots, tuple(found.forecast for found in fits), size)


def check_at_end(targets: Sequence[Target]) -> None:
    """Prove that targets are read at the end of the run, which is what a plan looks at.

    Raises:
        TargetError: One has a time of its own.
    """
    for target in targets:
        if target.time is not None:
            raise TargetError(
                f"{target.text}: a plan looks at the end of the run, and the target has a time of its own",
                hint="leave @t=... out; use --length for a shorter run",
            )
