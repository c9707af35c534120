"""Sparse: how few of the stored averages rebuild each width, and how well they really do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from evaluation import Bench
from grid import Grid
from measure import movements
from records import noise_shares, run_of
from sharded_phema.select import select
from trainings import Training

__all__ = ["SparseCase", "sparse_cases"]

_STORAGE = "float32"


@dataclass(frozen=True, slots=True)
class SparseCase:
    """One target rebuilt from few float32 sources.

    Attributes:
        training: Name of the run.
        method: What is known of the movement of the weights.
        snapshots: Number of snapshots, of two averages each.
        tolerance: Largest forecast that was accepted.
        target: Text of the target; ``all`` for all targets from the same sources, with the largest numbers.
        used: Sources that were read.
        error: |rebuilt - target| / |raw - target|.
        forecast: What was forecast for it.
    """

    training: str
    method: str
    snapshots: int
    tolerance: float
    target: str
    used: int
    error: float
    forecast: float


def sparse_cases(training: Training, bench: Bench, grid: Grid, count: int) -> Iterator[SparseCase]:
    """Every target by itself, then all together, from so many snapshots."""
    sources, wanted = grid.averages(count), grid.wanted(grid.sparse_targets)
    stored = bench.stored(sources, _STORAGE)
    groups = [(target.text, [profile]) for target, profile in zip(grid.sparse_targets, wanted, strict=True)]
    groups.append(("all", wanted))
    run = run_of(bench, grid, count)
    for methods, movement in movements(training, run):
        noise = noise_shares(run, _STORAGE, movement).tolist()
        for tolerance in grid.tolerances:
            for text, profiles in groups:
                fits = select(sources, profiles, tolerance=tolerance, movement=movement, noise=noise)
                coefficients = np.stack([fit.coefficients for fit in fits], axis=1)
                used = int(np.count_nonzero(np.any(coefficients != 0.0, axis=1)))
                error = float(bench.errors(stored, coefficients, profiles).max())
                forecast = max(fit.forecast for fit in fits)
                for method in methods:
                    yield SparseCase(training.name, method, count, tolerance, text, used, error, forecast)
