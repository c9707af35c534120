"""Measure: rebuild every target of the grid from every set of sources, and compare with the average itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from evaluation import STORAGE, Bench
from grid import Grid
from methods import Choice, constrained, mean_of_window, published, unconstrained
from records import noise_shares, run_of
from sharded_phema.movement import Movement
from sharded_phema.profile import Profile
from sharded_phema.source import movement_in
from sharded_phema.store import Run
from trainings import Training, constant

__all__ = [
    "FIT",
    "FREE",
    "MEAN",
    "MEASURED",
    "OURS",
    "PAPER",
    "PLAIN",
    "RATED",
    "STEADY",
    "Case",
    "measured",
    "movements",
    "noiseless_choices",
]

OURS, PLAIN = "ours", "ours, constant, no noise"
STEADY, MEASURED, RATED = "ours, movement constant", "ours, movement measured", "ours, rate given"
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
        run, sources = run_of(bench, grid, count), grid.averages(count)
        for methods, movement in movements(training, run):
            for storage in STORAGE:
                noise = noise_shares(run, storage, movement).tolist()
                choice = constrained(sources, grid.wanted(grid.targets), noise=noise, movement=movement)
                found = list(_compared(training, bench, grid, (methods[0], count, storage), sources, choice))
                yield from (replace(case, method=method) for method in methods for case in found)


def movements(training: Training, run: Run) -> list[tuple[tuple[str, ...], Movement]]:
    """What our methods take for the movement of the weights, with those that take the same; the default first."""
    end = run.snapshots[-1].t
    taken = [(OURS, movement_in(run, "auto")), (STEADY, movement_in(run, "constant"))]
    taken.append((MEASURED, movement_in(run, "measured")))
    if training.rate is not constant:
        taken.append((RATED, movement_in(run, lambda t: training.rate(t / end))))
    found: dict[tuple[bytes, bytes], tuple[tuple[str, ...], Movement]] = {}
    for method, movement in taken:
        lines = movement.times.tobytes(), movement.rates.tobytes()
        others, _ = found.get(lines, ((), movement))
        found[lines] = ((*others, method), movement)
    return list(found.values())


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
