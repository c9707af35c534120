"""Picture: forecast against actual error, a point for every rebuild."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np

from evaluation import STORAGE
from measure import MEASURED, OURS, RATED, STEADY, Case
from trainings import TRAININGS

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

__all__ = ["write_scatter"]


def write_scatter(cases: Sequence[Case], path: Path) -> None:
    """Scatter of forecast against error, by what is known of the movement (rows) and dtype (columns), as PNG."""
    methods = (OURS, STEADY, MEASURED, RATED)
    figure, grid = plt.subplots(len(methods), len(STORAGE), figsize=(11, 13), sharex=True, sharey=True)
    for row, method in zip(grid, methods, strict=True):
        for axes, storage in zip(row, STORAGE, strict=True):
            _panel(axes, [case for case in cases if case.method == method and case.storage == storage])
            axes.set_title(f"{method}, {storage}", fontsize=9)
    for axes in grid[-1]:
        axes.set_xlabel("error, |rebuilt − target| / |raw − target|", fontsize=8)
    for axes in grid[:, 0]:
        axes.set_ylabel("forecast", fontsize=8)
    handles = {label: handle for axes in grid.flat for handle, label in zip(*axes.get_legend_handles_labels())}  # noqa: B905
    figure.legend(handles.values(), handles, loc="lower center", ncols=len(handles), fontsize=8, frameon=False)
    figure.tight_layout(rect=(0.0, 0.03, 1.0, 1.0))
    figure.savefig(path, dpi=90)
    plt.close(figure)


def _panel(axes: Axes, cases: Sequence[Case]) -> None:
    line = np.array([1e-6, 1e2])
    axes.fill_between(line, line / 3.0, line * 3.0, color="0.92", linewidth=0.0)
    axes.plot(line, line, color="0.6", linewidth=0.8)
    for color, training in enumerate(TRAININGS):
        some = [case for case in cases if case.training == training.name]
        if some:
            points = [case.error for case in some], [case.forecast for case in some]
            axes.plot(*points, ".", color=f"C{color}", markersize=4, label=training.name)
    axes.set(xscale="log", yscale="log", xlim=(1e-6, 1e2), ylim=(1e-6, 1e2))
    axes.tick_params(labelsize=7)
