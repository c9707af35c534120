"""Sweep: quality over averaging length, of the whole model, of parts of it, over training, and beside something else.

These are the paper's Figures 5a (``length``), 5b (``group``), 5c (``time``) and 6 (``grid``) for the user's own run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from sharded_phema.errors import StoreError
from sharded_phema.figures.canvas import BEST, GREY, blank, colour, legend, literal, mark, width_axis
from sharded_phema.figures.curves import (
    circle,
    draw_curve,
    draw_others,
    has_width,
    heading,
    hues,
    scale,
    widths_in,
)
from sharded_phema.figures.grid import grid
from sharded_phema.spelling import spelled
from sharded_phema.tally import Entry, Tally

__all__ = ["Kind", "kinds_in", "sweep"]

Kind = Literal["length", "group", "time", "grid"]
_NEEDS = {
    "length": "scores of whole models",
    "group": "scores of groups of parameters",
    "time": "scores of widths at two or more training times",
    "grid": "scores of widths at two or more values of a second parameter",
}
_LEGEND = 10  # entries that a legend beside one panel has room for


def kinds_in(tally: Tally) -> tuple[Kind, ...]:
    """Which figures the scores are enough for, the most particular first."""
    whole = tally.where(lambda score: score.group is None)
    wide = whole.where(has_width)
    enough: dict[Kind, bool] = {
        "group": bool(tally.where(lambda score: score.group is not None).where(has_width).entries),
        "grid": len(wide.seconds) > 1,
        "time": bool(wide.entries) and len(wide.times) > 1,
        "length": bool(whole.entries),
    }
    return tuple(kind for kind, is_enough in enough.items() if is_enough)


def sweep(tally: Tally, kind: Kind | Literal["auto"] = "auto") -> Any:
    """Draw scores.

    Args:
        tally: What a sweep found.
        kind: Which figure; auto takes the most particular that the scores are enough for.

    Raises:
        OutputError: matplotlib is missing.
        StoreError: The scores are not enough for the figure.
    """
    found = kinds_in(tally)
    if not found or kind not in ("auto", *found):
        wanted = _NEEDS["length" if kind == "auto" else kind]
        raise StoreError(
            f"a figure of kind {kind} needs {wanted}, and there are none among {len(tally.entries)} averages",
            hint=f"these scores are enough for: {', '.join(found) or 'none'}",
        )
    draw: dict[str, Callable[[Tally], Any]] = {"length": _length, "group": _group, "time": _time, "grid": _grid}
    return draw[found[0] if kind == "auto" else kind](tally)


def _length(tally: Tally) -> Any:
    """At the last training time, one curve for each value of a second parameter."""
    last = _last(tally.where(lambda score: score.group is None))
    others = [entry for entry in last.entries if not has_width(entry.first)]
    share = min(0.5, 0.09 * len(others) + 0.08)
    ratios = {"width_ratios": [1 - share, share], "sharey": True} if others else {}
    figure, panels = blank(1, 1 + bool(others), size=(8.0, 3.9), **ratios)
    axes = panels[0, 0]
    seconds = last.seconds or (None,)
    for second, hue in zip(seconds, hues(len(seconds)), strict=True):
        label = "" if second is None else f"{second.value:g}"
        draw_curve(axes, [e for e in last.entries if e.first.second == second], hue=hue, label=label)
    if others:
        draw_others(panels[0, 1], others, hue=colour(0))
    best = last.best
    if has_width(best.first):
        circle(axes, best.first.sigma_rel or 0.0, best.mean)
    else:
        circle(panels[0, 1], others.index(best), best.mean)
    _finish(axes, last)
    axes.set_title(heading(last, at=last.times[0]), loc="left", fontsize=10.5)
    title = literal(last.seconds[0].name, 20) if last.seconds else ""
    legend(axes, outside=not others, title=title)
    return figure


def _group(tally: Tally) -> Any:
    """At the last training time, one curve for each group, all other parameters as the base says."""
    parts = _last(tally.where(lambda score: score.group is not None).where(has_width))
    parts = parts.where(lambda score: score.second == parts.best.first.second)
    figure, panels = blank(1, size=(9.0, 3.9))
    axes = panels[0, 0]
    for number, group in enumerate(parts.groups):
        inside = parts.where(lambda score, group=group: score.group == group)  # type: ignore[misc]
        bases = list(dict.fromkeys(entry.first.base for entry in inside.entries))
        for base in bases:
            same = [entry for entry in inside.entries if entry.first.base == base]
            label = literal(group, 34) if base == bases[-1] else ""
            draw_curve(axes, same, hue=colour(number), marker=mark(number), label=label)
    for base, entry in _bases(tally, parts).items():
        axes.axhline(entry.mean, color=GREY, ls="--", lw=1.2, label=f"all parameters: {literal(base)}")
    circle(axes, parts.best.first.sigma_rel or 0.0, parts.best.mean)
    _finish(axes, parts)
    axes.set_title(heading(parts, at=parts.times[0]), loc="left", fontsize=10.5)
    legend(axes, outside=True, title="own average of")
    return figure


def _time(tally: Tally) -> Any:
    """One curve for each training time, and beside them the best width over training time."""
    wide = tally.where(lambda score: score.group is None).where(has_width)
    wide = wide.where(lambda score: score.second == wide.best.first.second)
    figure, panels = blank(1, 2, size=(10.0, 3.9), width_ratios=[1.5, 1])
    curves, course = panels[0]
    bests = []
    for number, (t, hue) in enumerate(zip(wide.times, hues(len(wide.times)), strict=True)):
        at = wide.where(lambda score, t=t: score.t == t)  # type: ignore[misc]
        every = -(-len(wide.times) // _LEGEND)
        label = spelled(t) if (len(wide.times) - 1 - number) % every == 0 else ""
        draw_curve(curves, at.entries, hue=hue, label=label)
        circle(curves, at.best.first.sigma_rel or 0.0, at.best.mean)
        bests.append(at.best.first.sigma_rel)
    _finish(curves, wide)
    figure.suptitle(heading(wide, at=None), x=0.01, ha="left", fontsize=10.5)
    curves.set_title("best of each time circled")
    legend(curves, outside=True, title=literal(wide.unit, 20))
    course.plot(wide.times, bests, color=BEST, marker="o", ms=5, lw=1.4)
    tried = widths_in(wide.entries)
    width_axis(course, tried, along="y")
    course.set_ylim(0.95 * tried[0], 1.05 * tried[-1])
    course.set(title="best averaging length", xlabel=f"training time ({literal(wide.unit, 20)})")
    return figure


def _grid(tally: Tally) -> Any:
    """Averaging length against a second parameter, at the last training time."""
    return grid(_last(tally.where(lambda s: s.group is None and s.second is not None).where(has_width)))


def _bases(tally: Tally, parts: Tally) -> dict[str, Entry]:
    """Whole models that have the average throughout which others have but for a group, by its target."""
    t, second = parts.times[0], parts.best.first.second
    alike = tally.where(lambda score: (score.group, score.t, score.second) == (None, t, second))
    bases = {entry.first.base for entry in parts.entries}
    return {entry.first.target: entry for entry in alike.entries if entry.first.target in bases}


def _last(tally: Tally) -> Tally:
    return tally.where(lambda score: score.t == tally.times[-1])


def _finish(axes: Any, tally: Tally) -> None:
    width_axis(axes, widths_in(tally.entries) or [0.02, 0.28])
    scale(axes, tally)
