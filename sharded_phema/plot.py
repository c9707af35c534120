"""Pictures in files: what a run holds and can rebuild, what a sweep found (needs matplotlib, the ``plot`` extra)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from sharded_phema.figures import check_picture, coefficients, forecast, profiles, sweep, timeline
from sharded_phema.figures import save as _save
from sharded_phema.figures.sweep import Kind
from sharded_phema.select import Tolerance
from sharded_phema.store import Run
from sharded_phema.tally import Tally
from sharded_phema.target import Target

__all__ = ["draw_coefficients", "draw_forecast", "draw_profiles", "draw_sweep", "draw_timeline"]


def draw_profiles(run: Run, targets: Sequence[Target], out: Path) -> None:
    """Stored averages and targets as weight over training time, rebuilt ones over wanted ones (the paper's Figure 4).

    Raises:
        OutputError: matplotlib is missing, or ``out`` is of an unknown kind or cannot be written.
        PhemaError: A target cannot be rebuilt.
    """
    check_picture(out)
    _save(profiles(run, targets), out)


def draw_forecast(run: Run, out: Path, times: Sequence[float] = (), tolerance: float | None = None) -> None:
    """Forecast error over the widths that could be rebuilt, stored widths marked.

    Args:
        run: The run.
        out: PNG, PDF or SVG file.
        times: Training times, one curve each; the last snapshot's where there are none.
        tolerance: An error to mark.

    Raises:
        OutputError: matplotlib is missing, or ``out`` is of an unknown kind or cannot be written.
        TargetError: A time lies outside the snapshots, or the tolerance is not above 0.
    """
    check_picture(out)
    _save(forecast(run, times, tolerance), out)


def draw_coefficients(run: Run, targets: Sequence[Target], out: Path, tolerance: Tolerance = "auto") -> None:
    """Which snapshots each target is rebuilt from, and with which weights.

    Raises:
        OutputError: matplotlib is missing, or ``out`` is of an unknown kind or cannot be written.
        PhemaError: A target cannot be rebuilt.
    """
    check_picture(out)
    _save(coefficients(run, targets, tolerance), out)


def draw_timeline(run: Run, out: Path) -> None:
    """Sessions and snapshots over training time, their sizes, and the norms of the averages.

    Raises:
        OutputError: matplotlib is missing, or ``out`` is of an unknown kind or cannot be written.
        StoreError: The run has no snapshots.
    """
    check_picture(out)
    _save(timeline(run), out)


def draw_sweep(tally: Tally, out: Path, kind: Kind | Literal["auto"] = "auto") -> None:
    """Quality over averaging length (the paper's Figures 5 and 6).

    Raises:
        OutputError: matplotlib is missing, or ``out`` is of an unknown kind or cannot be written.
        StoreError: The scores are not enough for the figure.
    """
    check_picture(out)
    _save(sweep(tally, kind), out)
