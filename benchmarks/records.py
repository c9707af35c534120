"""Records: a run of the package, without its tensors, as it would stand after a recorded training."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from evaluation import Bench
from grid import TRACKED, Grid
from sharded_phema.folder import open_folder
from sharded_phema.manifest import LayoutRecord, RunRecord, SnapshotRecord
from sharded_phema.movement import Movement
from sharded_phema.rounding import UNIT_ROUNDOFF
from sharded_phema.schedule import snapshot_times
from sharded_phema.source import noise_of, sources_of
from sharded_phema.store import Run, Snapshot
from sharded_phema.store.cuts import Layout

__all__ = ["noise_shares", "run_of"]

_NAME = "benchmark"


def run_of(bench: Bench, grid: Grid, count: int) -> Run:
    """Run of so many snapshots, with the norms that its records would hold: those of the float32 averages."""
    record = RunRecord(_NAME, "steps", tuple(target.text for target in TRACKED), ())
    averages = bench.stored(grid.averages(count), "float32").reshape(count, len(TRACKED), -1)
    times = snapshot_times(float(grid.steps), count)
    snapshots = [_snapshot(record, number, t, averages[number]) for number, t in enumerate(times)]
    return Run(open_folder(_NAME), record, tuple(snapshots), abandoned=(), unfinished=(), damaged=(), head="")


def noise_shares(run: Run, storage: str, movement: Movement) -> NDArray[np.float64]:
    """Rounding noise of every source in a store of that dtype, as ``fit`` takes it, (sources,)."""
    noise = np.array(noise_of(sources_of(run), movement))
    return noise * (UNIT_ROUNDOFF[storage] / UNIT_ROUNDOFF["float32"]) ** 2


def _snapshot(record: RunRecord, number: int, t: float, averages: NDArray[np.float64]) -> Snapshot:
    norms = tuple(float(average @ average) for average in averages)
    gap = averages[0] - averages[1]
    facts = SnapshotRecord(_NAME, _NAME, number, t=t, start=0.0, parts=(), norms=norms, gaps=(float(gap @ gap),))
    layout = Layout(LayoutRecord(_NAME, world_size=1, averaged=()), record)
    return Snapshot(open_folder(_NAME), f"{_NAME}-{number}", record, facts, layout, ())
