"""Curves of quality over averaging length, with the spread of repeated evaluations as a band, and the best circled."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import wrap
from typing import Any

import numpy as np

from sharded_phema.figures.canvas import BEST, colour, literal, mark
from sharded_phema.scores import Score
from sharded_phema.spelling import spelled
from sharded_phema.tally import Entry, Tally
from sharded_phema.target import parse_target

__all__ = ["best_of", "circle", "draw_curve", "draw_others", "has_width", "heading", "hues", "scale", "widths_in"]

LINE = 88
"""Characters that a line of a title has room for."""

_MANY = 20.0  # a range of scores as wide as this, as a factor, wants a logarithmic axis


def has_width(score: Score) -> bool:
    """Whether a target has a place on a curve over widths, as those of the power family do."""
    return score.sigma_rel is not None and parse_target(score.target).kind in ("width", "power")


def widths_in(entries: Sequence[Entry]) -> list[float]:
    """All widths, increasing, each once."""
    return sorted({e.first.sigma_rel for e in entries if e.first.sigma_rel is not None and has_width(e.first)})


def best_of(tally: Tally) -> str:
    """What the best average is and how good, in words for a title."""
    best = tally.best
    text = f"best (circled): {best.mean:.4g} for {literal(best.first.target)}"
    if best.first.group is not None:
        text += f" in {literal(best.first.group, 30)}"
    if best.first.second is not None:
        text += f", {literal(best.first.second.name, 20)} {best.first.second.value:g}"
    if len(tally.times) > 1:
        text += f" at {spelled(best.first.t)} {literal(tally.unit, 20)}"
    if len(best.values) > 1:
        text += f" ({best.least:.4g} to {best.most:.4g} in {len(best.values)} evaluations)"
    return text + ("; at the edge of what was tried" if _is_at_edge(tally) else "")


def heading(tally: Tally, *, at: float | None) -> str:
    """Title of a figure: the metric, the training time where there is but one, and the best on lines of its own."""
    when = "" if at is None else f" at {spelled(at)} {literal(tally.unit, 20)}"
    # Longer lines would be cut at the edge of the figure.
    return "\n".join([f"{literal(tally.metric, 60)}{when}", *wrap(best_of(tally), LINE)])


def draw_curve(axes: Any, entries: Sequence[Entry], *, hue: Any, label: str = "", marker: str = "o") -> None:
    """Mean scores over widths, with a band from the least to the most wherever something was evaluated repeatedly."""
    points = sorted((e for e in entries if has_width(e.first)), key=lambda e: e.first.sigma_rel or 0.0)
    widths = [e.first.sigma_rel for e in points]
    axes.plot(widths, [e.mean for e in points], color=hue, marker=marker, ms=4.5, lw=1.6, label=label)
    if any(len(e.values) > 1 for e in points):
        axes.fill_between(widths, [e.least for e in points], [e.most for e in points], color=hue, alpha=0.15, lw=0)


def draw_others(axes: Any, entries: Sequence[Entry], *, hue: Any) -> None:
    """Scores of averages without a width, one tick each, with a bar from the least to the most."""
    means = np.array([e.mean for e in entries])
    below, above = means - [e.least for e in entries], np.array([e.most for e in entries]) - means
    places = np.arange(len(entries))
    axes.errorbar(places, means, [below, above], ls="", marker=mark(1), ms=5, color=hue, capsize=3)
    names = [literal(e.first.target, 34) for e in entries]
    axes.set_xticks(places, names, rotation=35, ha="right", rotation_mode="anchor", fontsize=8.5)
    axes.set_xlim(-0.6, len(entries) - 0.4)


def circle(axes: Any, x: float, y: float) -> None:
    """Mark the best."""
    axes.scatter([x], [y], s=110, facecolors="none", edgecolors=BEST, linewidths=2, zorder=5)


def scale(axes: Any, tally: Tally) -> None:
    """Make the vertical axis logarithmic where scores differ by large factors, and say which way is better."""
    values = [value for entry in tally.entries for value in entry.values]
    if min(values) > 0.0 and max(values) > _MANY * min(values):
        axes.set_yscale("log")
    axes.set_ylabel(f"score, {tally.better} is better")


def hues(count: int) -> list[Any]:
    """Colours of things that have an order, from light to dark."""
    from matplotlib import colormaps

    return [colormaps["viridis"](x) for x in np.linspace(0.9, 0.0, count)] if count > 1 else [colour(0)]


def _is_at_edge(tally: Tally) -> bool:
    """Whether the best width is the first or last that was tried beside it."""
    best = tally.best.first
    beside = tally.where(lambda s: (s.t, s.group, s.second) == (best.t, best.group, best.second))
    widths = widths_in(beside.entries)
    return len(widths) > 2 and has_width(best) and best.sigma_rel in (widths[0], widths[-1])
