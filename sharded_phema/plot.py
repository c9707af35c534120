"""Pictures of what a run can rebuild (needs matplotlib, the ``plot`` extra)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sharded_phema.errors import OutputError
from sharded_phema.fit import fit
from sharded_phema.per_tensor import whole_model
from sharded_phema.profile import Profile
from sharded_phema.recipe import plan_rebuild
from sharded_phema.source import sources_of
from sharded_phema.store import Run
from sharded_phema.target import Target, parse_target
from sharded_phema.width import MAX_SIGMA_REL, sigma_rel_of

__all__ = ["draw_forecast", "draw_profiles"]

Array = NDArray[np.float64]
_KINDS = (".png", ".pdf", ".svg")


def draw_profiles(run: Run, targets: Sequence[Target], out: Path) -> None:
    """Stored averages and targets as weight over training time, rebuilt ones over wanted ones (the paper's Figure 4).

    A profile is drawn as its mean density over each of 400 stretches of the run, which shows jumps too.

    Raises:
        OutputError: matplotlib is missing, or ``out`` is of an unknown kind or cannot be written.
    """
    plan = plan_rebuild(run, [whole_model(target) for target in targets])
    edges = np.linspace(0.0, run.snapshots[-1].t, 401)
    figure, (stored, rebuilt) = _figure(2)
    sources = [_density(source.profile, edges) for source in plan.sources]
    for density in sources:
        stored.stairs(density, edges, color="C0", alpha=0.35, lw=0.8)
    stored.set_title(f"{len(plan.sources)} stored averages")
    for k, planned in enumerate(plan.targets):
        rebuilt.stairs(_density(planned.profile, edges), edges, color="0.75", lw=3)
        rebuilt.stairs(plan.coefficients[:, k] @ np.stack(sources), edges, color=f"C{k}", label=planned.target.text)
    rebuilt.set_title("rebuilt (colour) over wanted (grey)")
    rebuilt.legend(frameon=False)
    for axes in (stored, rebuilt):
        axes.set_xlabel(f"training time ({run.record.unit})")
        axes.set_ylabel("share of the average per unit of time")
    _save(figure, out)


def draw_forecast(run: Run, out: Path) -> None:
    """Forecast error over the widths that could be rebuilt at the last snapshot, stored widths marked.

    Raises:
        OutputError: matplotlib is missing, or ``out`` is of an unknown kind or cannot be written.
    """
    sources, last = sources_of(run), run.snapshots[-1]
    widths = np.geomspace(0.01, 0.99 * MAX_SIGMA_REL, 80)
    targets = [parse_target(float(width)).profile(last.t, last.start) for width in widths]
    fits = fit([source.profile for source in sources], targets)
    figure, (axes,) = _figure(1)
    axes.plot(widths, [found.forecast for found in fits], lw=2)
    for label in run.record.averages:
        stored = parse_target(label)
        if stored.kind == "power":
            axes.axvline(sigma_rel_of(stored.amount), color="0.6", ls="--", lw=1)
    axes.set(xscale="log", yscale="log", xlabel="sigma_rel of the rebuilt average", ylabel="error / |raw - average|")
    axes.set_title(f"forecast from {len(run.snapshots)} snapshots (stored widths dashed)")
    _save(figure, out)


def _density(profile: Profile, edges: Array) -> Array:
    at = profile.cumulative(edges)
    at[0] = 0.0  # a jump at the very beginning belongs to the first stretch
    return np.diff(at) / np.diff(edges)


def _figure(rows: int) -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise OutputError("drawing needs matplotlib", hint="pip install 'sharded-phema[plot]'") from error
    figure = Figure(figsize=(8, 1.2 + 3 * rows), layout="constrained", dpi=110)
    return figure, figure.subplots(rows, 1, squeeze=False)[:, 0]


def _save(figure: Any, out: Path) -> None:
    if out.suffix not in _KINDS:
        raise OutputError(f"{out}: expected a name that ends in one of {', '.join(_KINDS)}", hint="try --out plot.png")
    try:
        figure.savefig(out)
    except OSError as error:
        raise OutputError(f"{out} cannot be written: {error}", hint="check the folder and its permissions") from error
