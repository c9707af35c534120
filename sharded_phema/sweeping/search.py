"""Search: the best width with few evaluations, of the whole model or of groups of its parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from scipy.optimize import minimize_scalar

from sharded_phema.errors import OrderError

__all__ = ["COARSE", "descend", "descent_cost", "search"]

COARSE = 5
"""Widths, evenly spaced in their logarithm, that are tried first: a noisy metric may have more than one dip."""

LEAST = 3

CLOSE = 0.01
"""Widths that differ by less than this share are the same to any metric."""

STRIDE = 1.5
"""By which factor the width of a group is changed at first, up and down; its root once neither was better."""

_END = 1.05


def search(scores: Callable[[Sequence[float]], Sequence[float]], low: float, high: float, evaluations: int) -> float:
    """Width with the lowest score that was found between two others.

    First a coarse grid, then a bounded scalar search of the logarithm between the neighbours of the grid's best one.

    Args:
        scores: Scores of several widths at once, lower is better; asked again for the same width it says the same.
        low: Least width.
        high: Largest width.
        evaluations: Largest number of widths that are tried, at least 3.

    Raises:
        OrderError: The limits are none.

    Source: Brent, Algorithms for Minimization without Derivatives (1973), chapter 5, as scipy has it.
    """
    if evaluations < LEAST or not low < high:
        raise OrderError(
            f"search from {low:g} to {high:g} with {evaluations} evaluations: expected two widths and {LEAST} or more",
            hint="for example --targets 0.02:0.28 --evaluations 12",
        )
    grid = [_round(width) for width in np.geomspace(low, high, min(COARSE, evaluations))]
    known = dict(zip(grid, scores(grid), strict=True))
    best = min(range(len(grid)), key=lambda index: known[grid[index]])
    left, right = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]

    def score(log_width: float) -> float:
        width = _round(math.exp(log_width))
        if width not in known:
            (known[width],) = scores([width])
        return known[width]

    # Its limit says after how many it stops, which is two at least.
    if (rest := evaluations - len(grid)) >= 2:
        options = {"maxiter": rest, "xatol": CLOSE}
        minimize_scalar(score, bounds=(math.log(left), math.log(right)), method="bounded", options=options)
    return min(known, key=known.__getitem__)


def descent_cost(groups: int) -> int:
    """How many evaluations one round of ``descend`` takes at most."""
    return 3 * groups


def descend(
    scores: Callable[[Sequence[tuple[float, ...]]], Sequence[float]],
    start: Sequence[float],
    low: float,
    high: float,
    evaluations: int,
) -> tuple[float, ...]:
    """Widths of several groups with the lowest score that was found, one group moved at a time.

    Each is tried wider and narrower, and where neither is better, at the lowest point of the parabola through the three
    scores; its steps become smaller then. Coordinate descent finds what no single move improves, which need not be
    the best.

    Args:
        scores: Scores of several lists of widths at once, one width for each group; lower is better.
        start: Width of each group to begin with.
        low: Least width.
        high: Largest width.
        evaluations: Largest number of lists that are tried, the start included.
    """
    widths = tuple(map(_round, start))
    known = {widths: scores([widths])[0]}

    def tried(wanted: Sequence[tuple[float, ...]]) -> None:
        new = [one for one in dict.fromkeys(wanted) if one not in known][: evaluations - len(known)]
        known.update(zip(new, scores(new) if new else [], strict=True))

    strides = [STRIDE] * len(widths)
    while max(strides) > _END and len(known) < evaluations:
        for group, stride in enumerate(strides):
            middle, sides = widths, [_moved(widths, group, factor, low, high) for factor in (1.0 / stride, stride)]
            tried(sides)
            tried(_lowest([one for one in (sides[0], middle, sides[1]) if one in known], group, known))
            widths = min(known, key=known.__getitem__)
            if widths not in sides:
                strides[group] = math.sqrt(stride)
    return widths


def _moved(widths: tuple[float, ...], group: int, factor: float, low: float, high: float) -> tuple[float, ...]:
    width = _round(min(max(widths[group] * factor, low), high))
    return (*widths[:group], width, *widths[group + 1 :])


def _lowest(
    three: Sequence[tuple[float, ...]], group: int, known: dict[tuple[float, ...], float]
) -> list[tuple[float, ...]]:
    """Where the parabola through three scores is lowest, if that lies between them."""
    if len(set(three)) < 3:
        return []
    x, y = [math.log(one[group]) for one in three], [known[one] for one in three]
    if not y[1] < min(y[0], y[2]):
        return []
    curve = np.polynomial.Polynomial.fit(x, y, 2).convert().coef
    return [(*three[0][:group], _round(math.exp(-curve[1] / (2.0 * curve[2]))), *three[0][group + 1 :])]


def _round(width: float) -> float:
    """A width that is short to write; what is left out of it is far below what any metric sees."""
    return float(f"{width:.4g}")
