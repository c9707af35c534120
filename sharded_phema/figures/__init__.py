"""Figures of what a run holds, of what it can rebuild, and of what a sweep found (matplotlib, the ``plot`` extra)."""

from __future__ import annotations

from sharded_phema.figures.canvas import check_picture, save, svg_bytes
from sharded_phema.figures.coefficients import coefficients
from sharded_phema.figures.forecast import forecast
from sharded_phema.figures.profiles import profiles
from sharded_phema.figures.sweep import sweep
from sharded_phema.figures.timeline import timeline

__all__ = [
    "check_picture",
    "coefficients",
    "forecast",
    "profiles",
    "save",
    "svg_bytes",
    "sweep",
    "timeline",
]
