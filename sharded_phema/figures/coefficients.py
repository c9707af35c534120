"""Coefficients: which snapshots a target is rebuilt from, and with which weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sharded_phema.figures.canvas import GREY, blank, colour, literal, mark
from sharded_phema.figures.names import average_name
from sharded_phema.per_tensor import whole_model
from sharded_phema.recipe import Plan, plan_rebuild
from sharded_phema.select import Tolerance
from sharded_phema.store import Run
from sharded_phema.target import Target

__all__ = ["coefficients"]


def coefficients(run: Run, targets: Sequence[Target], tolerance: Tolerance = "auto") -> Any:
    """Weight of each stored average over the time of its snapshot, one panel a target, one colour a stored average.

    Snapshots that none of the targets reads are ticks on the line of 0.

    Args:
        run: The run.
        targets: What is rebuilt, together, as ``reconstruct`` does.
        tolerance: How many stored averages are read, as there.

    Raises:
        OutputError: matplotlib is missing.
        PhemaError: A target cannot be rebuilt.
    """
    plan = plan_rebuild(run, [whole_model(target) for target in targets], tolerance=tolerance)
    figure, grid = blank(len(plan.targets), size=(8.0, 2.5 if len(plan.targets) > 1 else 3.2), sharex=True)
    for k, axes in enumerate(grid[:, 0]):
        _draw(axes, plan, k)
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8.5)
    grid[-1, 0].set_xlabel(f"training time ({literal(run.record.unit)})")
    return figure


def _draw(axes: Any, plan: Plan, k: int) -> None:
    planned, weights = plan.targets[k], plan.coefficients[:, k]
    times = np.array([source.snapshot.t for source in plan.sources])
    which = np.array([source.average for source in plan.sources])
    axes.axhline(0.0, color="0.4", lw=0.8)
    for average, label in enumerate(plan.run.record.averages):
        used = (which == average) & (weights != 0.0)
        axes.vlines(times[used], 0.0, weights[used], color=colour(average), lw=1.6, alpha=0.7)
        style: dict[str, Any] = {"ls": "", "marker": mark(average), "ms": 5.5, "color": colour(average)}
        axes.plot(times[used], weights[used], label=average_name(label), **style)
    read = {source.snapshot.t for source, weight in zip(plan.sources, weights, strict=True) if weight != 0.0}
    idle = [snapshot.t for snapshot in plan.run.snapshots if snapshot.t not in read]
    axes.plot(idle, np.zeros(len(idle)), ls="", marker="|", ms=9, color=GREY, label="snapshots not read")
    axes.axvline(planned.t, color=GREY, lw=1, ls=":")
    axes.set_ylabel("weight")
    axes.set_title(
        f"{literal(planned.target.text, 30)}: {np.count_nonzero(weights)} averages, sum {weights.sum():.6g}, "
        f"noise gain {planned.fit.noise_gain:.3g}, forecast {planned.fit.forecast:.1e}",
        loc="left",
        fontsize=9.5,
    )
