"""Recommend: before training, which widths to track and how many snapshots to store, to rebuild what is wanted."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import NoReturn

import numpy as np

from sharded_phema.errors import ForecastError, TargetError, check_number
from sharded_phema.fit import Problem, posed, solved
from sharded_phema.forecast import check_at_end
from sharded_phema.movement import STEADY
from sharded_phema.profile import Power
from sharded_phema.rounding import STORED_BYTES, rounding_noise
from sharded_phema.schedule import snapshot_times
from sharded_phema.target import Target, parse_target
from sharded_phema.width import gamma_of

__all__ = ["STILLNESS", "Recommendation", "Request", "recommend", "spread_widths"]

STILLNESS = 10.0
"""Squared norm of the weights over the squared distance they walk in the run, where nothing else is known."""

_WIDTHS = (0.02, 0.03, 0.04, 0.05, 0.07, 0.10, 0.14, 0.20, 0.25)
_COUNTS = (4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128)
_FIRST_LOOK, _FINALISTS = 8, 3
_RANGE = 9


@dataclass(frozen=True, slots=True)
class Request:
    """What will be wanted at the end of a run.

    Args:
        targets: Averages to rebuild, none with a time of its own.
        length: Length of the run, in its unit of training time, > 0.
        parameters: Number of the model's parameters, > 0.
        tolerance: Largest forecast error of each target, relative to |raw - target|, > 0.
        stillness: Squared norm of the weights over the squared distance they walk in the run, > 0; ``STILLNESS``
            unless it is known of a similar run. Rounding counts by it.

    Raises:
        TargetError: A number is out of its range, or a target has a time of its own.
    """

    targets: tuple[Target, ...]
    length: float
    parameters: float
    tolerance: float
    stillness: float = STILLNESS

    def __post_init__(self) -> None:
        for name in ("length", "parameters", "tolerance", "stillness"):
            check_number(getattr(self, name), name, "above 0", lambda x: x > 0, f"give --{name} a number above 0")
        check_at_end(self.targets)


@dataclass(frozen=True, slots=True)
class Recommendation:
    """What to track and store, evenly spaced, and what comes of it.

    Attributes:
        widths: Relative widths to track.
        snapshots: How many.
        snapshot_every: Training time between them.
        dtype: What the averages are stored in, as ``PostHocEMA`` takes it.
        size: Bytes on disk.
        forecasts: Predicted |rebuilt - target| / |raw - target| of each target, rounding included.
    """

    widths: tuple[float, ...]
    snapshots: int
    snapshot_every: float
    dtype: str
    size: int
    forecasts: tuple[float, ...]


def recommend(request: Request) -> tuple[Recommendation, ...]:
    """For each dtype that will do, the plan that takes least disk; the smallest first, float32 first among equals.

    Searches two and three of nine widths, with 4 to 128 snapshots: all sets of widths with 8 snapshots, then the
    three best sets of each size with as few snapshots as will do.

    Raises:
        ForecastError: No plan meets the tolerance; says what the best one reaches.
    """
    search = _Search(request)
    tried = {dtype: [search.fewest(widths, dtype) for widths in search.finalists(dtype)] for dtype in STORED_BYTES}
    good = {dtype: [plan for plan in plans if search.miss(plan) <= 1.0] for dtype, plans in tried.items()}
    found = [min(plans, key=lambda plan: plan.size) for plans in good.values() if plans]
    if not found:
        _refuse(request, min(itertools.chain(*tried.values()), key=search.miss))
    return tuple(sorted(found, key=lambda plan: plan.size))


def spread_widths(text: str) -> tuple[str, ...]:
    """Nine widths from LOW to HIGH, evenly spaced in their logarithm, of the text LOW:HIGH; any other text as it is.

    Raises:
        TargetError: The range is empty or no range of widths.
    """
    low, colon, high = text.partition(":")
    if not colon or not low[:1].isdigit():
        return (text,)
    first, last = parse_target(low).amount, parse_target(high).amount
    if not first < last:
        raise TargetError(f"range of widths {text}: expected LOW:HIGH with LOW below HIGH", hint="try 0.03:0.25")
    return tuple(f"{width:.4g}" for width in np.geomspace(first, last, _RANGE))


class _Search:
    """Plans for one request; what they have in common is computed once."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._targets = [target.profile(request.length) for target in request.targets]
        self._problems: dict[tuple[tuple[float, ...], int], Problem] = {}

    def finalists(self, dtype: str) -> list[tuple[float, ...]]:
        """The best sets of two and of three widths."""
        best = []
        for size in (2, 3):
            sets = itertools.combinations(_WIDTHS, size)
            ranked = sorted(sets, key=lambda widths: self.miss(self._plan(widths, _FIRST_LOOK, dtype)))
            best += ranked[:_FINALISTS]
        return best

    def fewest(self, widths: tuple[float, ...], dtype: str) -> Recommendation:
        """The plan with fewest snapshots that meets the tolerance; with most, if none does."""
        low, high = 0, len(_COUNTS) - 1
        while low < high:
            middle = (low + high) // 2
            enough = self.miss(self._plan(widths, _COUNTS[middle], dtype)) <= 1.0
            low, high = (low, middle) if enough else (middle + 1, high)
        return self._plan(widths, _COUNTS[low], dtype)

    def miss(self, plan: Recommendation) -> float:
        """Largest forecast over the tolerance."""
        return max(plan.forecasts) / self._request.tolerance

    def _plan(self, widths: tuple[float, ...], snapshots: int, dtype: str) -> Recommendation:
        problem, request = self._problem(widths, snapshots), self._request
        noise = np.full(problem.noise.size, rounding_noise(dtype, request.stillness))
        fits = solved(replace(problem, noise=noise), np.arange(noise.size))
        size = round(STORED_BYTES[dtype] * request.parameters) * snapshots * len(widths)
        forecasts = tuple(found.forecast for found in fits)
        return Recommendation(widths, snapshots, request.length / snapshots, dtype, size, forecasts)

    def _problem(self, widths: tuple[float, ...], snapshots: int) -> Problem:
        key = (widths, snapshots)
        if key not in self._problems:
            times = snapshot_times(self._request.length, snapshots)
            sources = [Power(gamma_of(width), t) for t in times for width in widths]
            self._problems[key] = posed(sources, self._targets, metric="trajectory", movement=STEADY, noise=0.0)
        return self._problems[key]


def _refuse(request: Request, best: Recommendation) -> NoReturn:
    """Say which target fails, and what could be had."""
    worst = max(range(len(request.targets)), key=lambda k: best.forecasts[k])
    met = [t.text for t, f in zip(request.targets, best.forecasts, strict=True) if f <= request.tolerance]
    error, widths = best.forecasts[worst], ", ".join(map(str, best.widths))
    raise ForecastError(
        f"no plan with up to {_COUNTS[-1]} snapshots of three widths rebuilds all targets to {request.tolerance:g}: "
        f"the best reaches {error:.2g} for {request.targets[worst].text}",
        hint=f"ask for --tolerance {1.05 * error:.1e}, which {best.snapshots} {best.dtype} snapshots of {widths} "
        f"reach; they reach {request.tolerance:g} for {', '.join(met) or 'none of the targets'}",
    )
