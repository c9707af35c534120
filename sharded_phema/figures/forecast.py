"""Forecast: how well each width can be rebuilt, at the end of a run and at earlier times."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sharded_phema.errors import check_number
from sharded_phema.figures.canvas import GREY, blank, colour, legend, literal, width_axis
from sharded_phema.figures.names import stored_widths
from sharded_phema.per_tensor import whole_model
from sharded_phema.recipe import plan_rebuild
from sharded_phema.spelling import spelled
from sharded_phema.store import Run
from sharded_phema.target import parse_target
from sharded_phema.width import MAX_SIGMA_REL

__all__ = ["forecast"]

_WIDTHS = np.geomspace(0.01, 0.99 * MAX_SIGMA_REL, 80)


def forecast(run: Run, times: Sequence[float] = (), tolerance: float | None = None) -> Any:
    """Forecast error over the widths that could be rebuilt from all snapshots, stored widths marked.

    Args:
        run: The run.
        times: Training times at which averages are rebuilt, one curve each; the last snapshot's where there are none.
        tolerance: An error to draw as a line; the widths that stay below it at all times are shaded.

    Raises:
        OutputError: matplotlib is missing.
        TargetError: A time lies outside the snapshots, or the tolerance is not above 0.
    """
    if tolerance is not None:
        check_number(tolerance, "tolerance", "above 0", lambda x: x > 0, "1e-2 is one hundredth of |raw - target|")
    moments = tuple(dict.fromkeys(float(t) for t in times)) or (None,)
    texts = [spelled(w) + ("" if t is None else f"@t={spelled(t)}") for t in moments for w in _WIDTHS]
    plan = plan_rebuild(run, [whole_model(parse_target(text)) for text in texts], tolerance="exact")
    errors = np.array([planned.fit.forecast for planned in plan.targets]).reshape(len(moments), -1)
    figure, grid = blank(1, size=(8.0, 3.7))
    axes = grid[0, 0]
    for k, row in enumerate(errors):
        name = "" if moments[k] is None else f"at {moments[k]:.17g} {literal(run.record.unit)}"
        axes.plot(_WIDTHS, row, lw=2, color=colour(k), label=name)
    for number, width in enumerate(stored_widths(run.record.averages)):
        axes.axvline(width, color=GREY, ls="--", lw=1, label="" if number else "stored widths")
    axes.set_yscale("log")
    width_axis(axes, _WIDTHS)
    axes.set_ylabel("forecast |rebuilt − target| / |raw − target|")
    axes.set_title(_title(run, errors, tolerance))
    if tolerance is not None:
        _draw_tolerance(axes, errors, tolerance)
    legend(axes)
    return figure


def _draw_tolerance(axes: Any, errors: NDArray[np.float64], tolerance: float) -> None:
    axes.axhline(tolerance, color=colour(6), lw=1, ls=":", label=f"tolerance {tolerance:g}")
    inside = errors.max(axis=0) <= tolerance
    # Where the stretch of good widths is broken, each piece is shaded for itself.
    axes.fill_between(
        _WIDTHS, 0, 1, where=inside, transform=axes.get_xaxis_transform(), color=colour(2), alpha=0.12, lw=0
    )


def _title(run: Run, errors: NDArray[np.float64], tolerance: float | None) -> str:
    title = f"forecast error from {len(run.snapshots)} snapshots"
    if tolerance is None:
        return title
    inside = np.flatnonzero(errors.max(axis=0) <= tolerance)
    stretches = [_WIDTHS[piece] for piece in np.split(inside, np.flatnonzero(np.diff(inside) > 1) + 1) if piece.size]
    texts = [f"{widths[0]:.2g} to {widths[-1]:.2g}" for widths in stretches]
    return f"{title}; within {tolerance:g}: {', '.join(texts) or 'no width'}"
