"""Grid: averaging length against a second parameter, scores as colours (the paper's Figure 6)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sharded_phema.figures.canvas import BEST, blank, literal, width_axis
from sharded_phema.figures.curves import circle, heading, widths_in
from sharded_phema.tally import Tally

__all__ = ["grid"]

Array = NDArray[np.float64]
_FAR = 8.0  # values that differ by this factor are shown by their logarithm


def grid(tally: Tally) -> Any:
    """Mean scores as colours: cells where at least half of the combinations were evaluated, points where fewer.

    The best width of each value of the second parameter is joined by a line, the best of all circled.

    Args:
        tally: Widths at one training time, each with a second parameter.

    Raises:
        OutputError: matplotlib is missing.
    """
    widths, values = np.array(widths_in(tally.entries)), np.array([second.value for second in tally.seconds])
    table = _table(tally, widths, values)
    figure, panels = blank(1, size=(8.0, 4.3))
    axes = panels[0, 0]
    axes.grid(visible=False)
    palette = "viridis" if tally.better == "higher" else "viridis_r"
    spread_out = values[0] > 0.0 and values[-1] >= _FAR * values[0]
    if np.isfinite(table).mean() >= 0.5:
        rows = _log_edges(values) if spread_out else _edges(values)
        drawn = axes.pcolormesh(_log_edges(widths), rows, np.ma.masked_invalid(table), cmap=palette)
    else:
        found = np.nonzero(np.isfinite(table))
        drawn = axes.scatter(widths[found[1]], values[found[0]], c=table[found], cmap=palette, s=60, zorder=2)
    figure.colorbar(drawn, ax=axes, label=f"score, {tally.better} is better", pad=0.02)
    ridge = np.array([_best_width(tally, widths, row) for row in table])
    axes.plot(ridge, values, color=BEST, marker=".", ms=7, lw=1.2, alpha=0.9)
    circle(axes, tally.best.first.sigma_rel or 0.0, tally.best.first.second.value if tally.best.first.second else 0.0)
    width_axis(axes, widths)
    if spread_out:
        axes.set_yscale("log")
    axes.set_ylabel(literal(tally.seconds[0].name))
    if len(values) <= 12:
        axes.set_yticks(values, [f"{value:g}" for value in values])
        axes.set_yticks([], minor=True)
    axes.set_title(heading(tally, at=tally.times[0]), loc="left", fontsize=10.5)
    return figure


def _table(tally: Tally, widths: Array, values: Array) -> Array:
    """Mean scores, (values of the second parameter, widths); NaN where nothing was evaluated."""
    table = np.full((values.size, widths.size), np.nan)
    for entry in tally.entries:
        first = entry.first
        if first.second is not None and first.sigma_rel is not None:
            place = np.searchsorted(values, first.second.value), np.searchsorted(widths, first.sigma_rel)
            table[place] = entry.mean
    return table


def _best_width(tally: Tally, widths: Array, row: Array) -> float:
    return float(widths[np.nanargmax(row) if tally.better == "higher" else np.nanargmin(row)])


def _edges(centres: Array) -> Array:
    """Edges of cells: half-way between centres, the outer cells as far out as in."""
    if centres.size == 1:
        return np.asarray(centres[0] + np.array([-0.5, 0.5]))
    middle = (centres[1:] + centres[:-1]) / 2
    return np.concatenate([[2 * centres[0] - middle[0]], middle, [2 * centres[-1] - middle[-1]]])


def _log_edges(centres: Array) -> Array:
    edges: Array = np.exp(_edges(np.log(centres)))
    return edges
