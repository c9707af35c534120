"""Supply: where a metric gets rebuilt weights from, so many at a time, each process its share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from sharded_phema.per_tensor import Wanted
from sharded_phema.recipe import Plan

__all__ = ["MOST", "Supplied", "Supply", "forecasts_of"]

MOST = 64
"""Averages that are rebuilt at once: with so many, what is read of snapshots hardly counts any more."""


@dataclass(frozen=True, slots=True)
class Supplied:
    """A batch of rebuilt weights.

    Attributes:
        weights: What this process's metric is given, by number in the batch; the others are other processes'.
        forecasts: Predicted error of each of the batch.
        counts: Whether what this process's metric says is a score. It is not where all measure the same together.
    """

    weights: Mapping[int, Any]
    forecasts: tuple[float, ...]
    counts: bool = True


@dataclass(frozen=True, slots=True)
class Supply:
    """Where rebuilt weights come from.

    Attributes:
        room: How many there may be at once, over all processes.
        rebuilt: Rebuilds a batch in one pass over the snapshots. Collective, as is leaving it.
    """

    room: int
    rebuilt: Callable[[Sequence[Wanted]], AbstractContextManager[Supplied]]


def forecasts_of(plan: Plan) -> tuple[float, ...]:
    """Predicted error of each output of a plan: the largest of its parts'."""
    return tuple(max((plan.targets[k].fit.forecast for k in o.choice), default=0.0) for o in plan.outputs)
