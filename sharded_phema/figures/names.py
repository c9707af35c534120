"""Names of stored averages, short enough for a legend."""

from __future__ import annotations

import math

from sharded_phema.target import parse_target
from sharded_phema.width import sigma_rel_of

__all__ = ["average_name", "stored_widths"]


def average_name(label: str) -> str:
    """What a tracked average is, by the spelling that the run's record has of it."""
    target = parse_target(label)
    if target.kind == "exponential":
        return f"half-life {target.amount * math.log(2.0):.4g}"
    if target.kind == "power" and target.amount > 0.0:
        return rf"$\sigma_\mathrm{{rel}}$ {sigma_rel_of(target.amount):.4g}"
    return "running mean"


def stored_widths(labels: tuple[str, ...]) -> tuple[float, ...]:
    """Relative widths of those tracked averages that have one, as power profiles do."""
    targets = [parse_target(label) for label in labels]
    return tuple(sigma_rel_of(t.amount) for t in targets if t.kind == "power" and t.amount > 0.0)
