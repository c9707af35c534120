"""Grid: the stored averages and the targets that the benchmark goes through."""

from __future__ import annotations

from dataclasses import dataclass

from sharded_phema.profile import Checkpoint, Profile
from sharded_phema.schedule import snapshot_times
from sharded_phema.target import Target, parse_targets

__all__ = ["FULL", "QUICK", "TRACKED", "Grid"]

TRACKED = parse_targets([0.05, 0.10])
"""Averages that every snapshot holds, as in the paper."""


@dataclass(frozen=True, slots=True)
class Grid:
    """What is measured on every training.

    Attributes:
        steps: Optimizer steps, a multiple of every number of snapshots.
        sampled: Parameters recorded.
        snapshots: Numbers of evenly spaced snapshots.
        targets: What is rebuilt at the end of the run; none of them is stored.
        sparse_snapshots: Numbers of snapshots from which few sources are selected.
        sparse_targets: What is rebuilt from few sources.
        tolerances: Forecast errors that the few sources must reach.
    """

    steps: int
    sampled: int
    snapshots: tuple[int, ...]
    targets: tuple[Target, ...]
    sparse_snapshots: tuple[int, ...]
    sparse_targets: tuple[Target, ...]
    tolerances: tuple[float, ...]

    def wanted(self, targets: tuple[Target, ...]) -> list[Profile]:
        """Profiles of targets, read at the end of the run."""
        return [target.profile(float(self.steps)) for target in targets]

    def averages(self, count: int) -> list[Profile]:
        """Stored averages of so many snapshots, in order of time."""
        return [tracked.profile(t) for t in snapshot_times(float(self.steps), count) for tracked in TRACKED]

    def checkpoints(self, count: int) -> list[Profile]:
        """Raw weights at the times of so many snapshots."""
        return [Checkpoint(t) for t in snapshot_times(float(self.steps), count)]

    def everything(self) -> list[Profile]:
        """Every average that some measurement needs."""
        sources = [p for count in {*self.snapshots, *self.sparse_snapshots} for p in self.averages(count)]
        sources += [p for count in self.snapshots for p in self.checkpoints(count)]
        return [*sources, *self.wanted(self.targets), *self.wanted(self.sparse_targets)]


def _targets(widths: tuple[float, ...], fractions: tuple[float, ...], taus: tuple[float, ...]) -> tuple[Target, ...]:
    decays = [f"decay:{shape}:{part}" for part in fractions for shape in ("linear", "cosine", "sqrt")]
    return parse_targets([*widths, *decays, *(f"exponential:tau={tau:g}" for tau in taus)])


_STEPS, _QUICK_STEPS = 5120, 64
FULL = Grid(
    steps=_STEPS,
    sampled=10_000,
    snapshots=(4, 8, 16, 32, 64),
    # A time constant of 4 % of the run leaves so little on the first weights that the density metric takes it.
    targets=_targets(
        (0.02, 0.03, 0.04, 0.06, 0.08, 0.13, 0.15, 0.18, 0.2, 0.25, 0.28), (0.1, 0.2), (0.04 * _STEPS, 0.1 * _STEPS)
    ),
    sparse_snapshots=(64, 256),
    sparse_targets=parse_targets([0.03, 0.04, 0.06, 0.08, 0.1, 0.13, 0.15, 0.18, 0.2, 0.25]),
    tolerances=(1e-2, 1e-3),
)
QUICK = Grid(
    steps=_QUICK_STEPS,
    sampled=500,
    snapshots=(4, 16),
    targets=_targets((0.03, 0.15, 0.2, 0.25), (0.2,), (0.04 * _QUICK_STEPS,)),
    sparse_snapshots=(16,),
    sparse_targets=parse_targets([0.03, 0.2]),
    tolerances=(1e-2,),
)
