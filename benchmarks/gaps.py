"""Gaps: how fast weights moved, learnt from the distances between the averages of each snapshot."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sharded_phema.movement import Movement
from sharded_phema.profile import Profile

__all__ = ["movement_of_gaps", "squared_gaps", "squared_movement"]

Array = NDArray[np.float64]
_MIDPOINTS = 20_000
# The rate at the end of the run lies on the line through the last snapshot and one at least this share of the run
# earlier, and is at least this share of the last one's.
_APART, _LEAST = 0.02, 0.02


def squared_gaps(averages: Array) -> Array:
    """Squared distance between the two averages of each snapshot, (snapshots,); averages (2 x snapshots, sampled)."""
    return np.square(averages[::2] - averages[1::2]).sum(axis=1)


def squared_movement(gaps: Array, sources: Sequence[Profile], movement: Movement) -> float:
    """Expected squared movement in a unit of time at the largest rate, as the last snapshot tells it."""
    tau, width = _midpoints(sources)
    speed = np.square(movement.at(tau))
    return float(gaps[-1] / ((speed * _kernels(sources, tau)[-1]).sum() * width))


def movement_of_gaps(gaps: Array, sources: Sequence[Profile]) -> Movement:
    """Movement at the mean time that each snapshot's gap looks at, with straight lines between and on to the end.

    Two averages of one snapshot differ by D times the integral of (F_1 - F_2)^2, whose mean time is a little before
    the snapshot.
    """
    tau, width = _midpoints(sources)
    kernels = _kernels(sources, tau)
    times = np.array([(kernel * tau).sum() / kernel.sum() for kernel in kernels])
    rates = np.sqrt(gaps / np.array([kernel.sum() * width for kernel in kernels]))
    if len(rates) > 1:
        end = max(source.t for source in sources)
        earlier = max(0, int(np.searchsorted(times, times[-1] - _APART * end)) - 1)
        slope = (rates[-1] - rates[earlier]) / (times[-1] - times[earlier])
        last = max(rates[-1] + slope * (end - times[-1]), _LEAST * rates[-1])
        times, rates = np.append(times, end), np.append(rates, last)
    return Movement(times, rates / rates.max())


def _midpoints(sources: Sequence[Profile]) -> tuple[Array, float]:
    width = max(source.t for source in sources) / _MIDPOINTS
    return (np.arange(_MIDPOINTS) + 0.5) * width, width


def _kernels(sources: Sequence[Profile], tau: Array) -> list[Array]:
    pairs = zip(sources[::2], sources[1::2], strict=True)
    return [np.square(first.cumulative(tau) - second.cumulative(tau)) for first, second in pairs]
