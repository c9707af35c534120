"""Measure: rebuild every target of the grid from every set of sources, and compare with the average itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evaluation import STORAGE, Bench
from gaps import movement_of_gaps, squared_gaps, squared_movement
from grid import Grid
from methods import Choice, constrained, mean_of_window, published, unconstrained
from sharded_phema.movement import STEADY, Movement, movement_of
from sharded_phema.profile import Profile
from sharded_phema.rounding import rounding_noise
from trainings import Training, constant

__all__ = [
    "FIT",
    "FREE",
    "GAPS",
    "MEAN",
    "OURS",
    "PAPER",
    "PLAIN",
    "RATED",
    "Case",
    "measured",
    "movements",
    "noise_shares",
    "noiseless_choices",
]

OURS, GAPS, RATED, PLAIN = "ours", "ours, movement measured", "ours, rate given", "ours, no noise term"
PAPER, FREE = "paper", "unconstrained"
FIT, MEAN = "checkpoints, best fit", "checkpoints, mean"


@dataclass(frozen=True, slots=True)
class Case:
    """One rebuild of one target.

    Attributes:
        training: Name of the run.
        method: How the coefficients were chosen, and from what.
        snapshots: Number of snapshots.
        storage: Dtype of the stored sources.
        target: Text of the target.
        error: |rebuilt - target| / |raw - target|.
        forecast: What was forecast for it; NaN where the method has no forecast.
        gain: Sum of |coefficients|.
    """

    training: str
    method: str
    snapshots: int
    storage: str
    target: str
    error: float
    forecast: float
    gain: float


Choices = Mapping[tuple[str, int], Choice]
"""Coefficients by method and number of snapshots."""


def noiseless_choices(grid: Grid, count: int) -> dict[tuple[str, int], Choice]:
    """Coefficients of the methods that do not look at the run: they are the same for all trainings and dtypes."""
    wanted = grid.wanted(grid.targets)
    averages, raw = grid.averages(count), grid.checkpoints(count)
    return {
        (PAPER, count): published(averages, wanted),
        (FREE, count): unconstrained(averages, wanted),
        (PLAIN, count): constrained(averages, wanted),
        (FIT, count): constrained(raw, wanted),
        (MEAN, count): mean_of_window(raw, wanted),
    }


def measured(training: Training, bench: Bench, grid: Grid, choices: Choices) -> Iterator[Case]:
    """Every case of one training."""
    for (method, count), choice in choices.items():
        raw = method in (FIT, MEAN)
        sources = grid.checkpoints(count) if raw else grid.averages(count)
        for storage in ("float32",) if raw else STORAGE:
            yield from _compared(training, bench, grid, (method, count, storage), sources, choice)
    for count in grid.snapshots:
        sources = grid.averages(count)
        for method, movement in movements(training, bench, sources).items():
            for storage in STORAGE:
                noise = noise_shares(bench, sources, storage, movement)
                choice = constrained(sources, grid.wanted(grid.targets), noise=noise, movement=movement)
                yield from _compared(training, bench, grid, (method, count, storage), sources, choice)


def movements(training: Training, bench: Bench, sources: Sequence[Profile]) -> dict[str, Movement]:
    """What each of our methods takes for the movement of the weights."""
    end = sources[-1].t
    found = {OURS: STEADY, GAPS: movement_of_gaps(squared_gaps(bench.stored(sources, "float32")), sources)}
    if training.rate is not constant:
        found[RATED] = movement_of(lambda t: training.rate(t / end), end)
    return found


def noise_shares(bench: Bench, sources: Sequence[Profile], storage: str, movement: Movement) -> NDArray[np.float64]:
    """Rounding noise of every source over the squared movement in a unit of time, as a run's records tell them."""
    averages = bench.stored(sources, "float32")
    noise = [rounding_noise(storage, float(average @ average)) for average in averages]
    return np.array(noise) / squared_movement(squared_gaps(averages), sources, movement)


def _compared(
    training: Training,
    bench: Bench,
    grid: Grid,
    key: tuple[str, int, str],
    sources: Sequence[Profile],
    choice: Choice,
) -> Iterator[Case]:
    method, count, storage = key
    errors = bench.errors(bench.stored(sources, storage), choice.coefficients, grid.wanted(grid.targets))
    gains = np.abs(choice.coefficients).sum(axis=0)
    for target, error, forecast, gain in zip(grid.targets, errors, choice.forecasts, gains, strict=True):
        if np.isfinite(error):
            yield Case(training.name, method, count, storage, target.text, float(error), float(forecast), float(gain))
