"""Profiles: how much each moment of training counts, in what is stored and what is rebuilt (the paper's Figure 4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sharded_phema.figures.canvas import blank, colour, legend, literal
from sharded_phema.figures.names import average_name
from sharded_phema.per_tensor import whole_model
from sharded_phema.profile import Profile
from sharded_phema.recipe import Plan, plan_rebuild
from sharded_phema.store import Run
from sharded_phema.target import Target

__all__ = ["profiles"]

Array = NDArray[np.float64]
_STRETCHES = 400


def profiles(run: Run, targets: Sequence[Target]) -> Any:
    """Stored averages that targets use, as weight over training time, and what is rebuilt over what is wanted.

    A profile is drawn as its mean density over each of 400 stretches of the run, which shows jumps too.

    Raises:
        OutputError: matplotlib is missing.
        PhemaError: A target cannot be rebuilt.
    """
    plan = plan_rebuild(run, [whole_model(target) for target in targets])
    edges = np.linspace(0.0, run.snapshots[-1].t, _STRETCHES + 1)
    figure, axes = blank(2, sharex=True)
    stored, rebuilt = axes[:, 0]
    densities = _draw_stored(stored, plan, edges)
    for k, planned in enumerate(plan.targets):
        wanted = "wanted" if k == 0 else None
        rebuilt.stairs(_density(planned.profile, edges), edges, color="0.75", lw=3, label=wanted)
        name = f"{literal(planned.target.text)} (forecast error {planned.fit.forecast:.1g})"
        rebuilt.stairs(
            plan.coefficients[:, k] @ densities, edges, color=colour(len(run.record.averages) + k), label=name
        )
    rebuilt.set_title("rebuilt from them")
    rebuilt.set_xlabel(f"training time ({literal(run.record.unit)})")
    for one in (stored, rebuilt):
        one.set_ylabel("share per unit of time")
        legend(one)
    return figure


def _draw_stored(axes: Any, plan: Plan, edges: Array) -> Array:
    """Draw the sources; their densities, (sources, stretches)."""
    densities = np.stack([_density(source.profile, edges) for source in plan.sources])
    labels = plan.run.record.averages
    for average, label in enumerate(labels):
        used = [density for source, density in zip(plan.sources, densities, strict=True) if source.average == average]
        for number, density in enumerate(used):
            name = None if number else average_name(label)
            axes.stairs(density, edges, color=colour(average), alpha=0.5, lw=0.9, label=name)
    count = len(plan.run.snapshots) * len(labels)
    axes.set_title(f"{len(plan.sources)} of {count} stored averages are used")
    return densities


def _density(profile: Profile, edges: Array) -> Array:
    at = profile.cumulative(edges)
    at[0] = 0.0  # a jump at the very beginning belongs to the first stretch
    return np.diff(at) / np.diff(edges)
