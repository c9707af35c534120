"""Bars: what the accuracy must reach, each with the number that was found and the worst case."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from measure import FREE, MEASURED, OURS, PAPER, PLAIN, RATED, STEADY, Case
from sparse import SparseCase
from trainings import TRAININGS

__all__ = ["Bar", "bars"]

_OURS = (OURS, STEADY, MEASURED, RATED)
_FAMILY = {training.name: training.family for training in TRAININGS}
_GAIN = {"adam": 10.0, "sgd": 2.0}
_MOST_USED = {1e-2: 12, 1e-3: 40}


@dataclass(frozen=True, slots=True)
class Bar:
    """One thing to reach.

    Attributes:
        claim: What is asked for.
        passed: Whether it holds in every case that was measured.
        found: The number that decides.
        worst: The case that it comes from.
    """

    claim: str
    passed: bool
    found: float
    worst: str


def bars(cases: Sequence[Case], sparse: Sequence[SparseCase]) -> list[Bar]:
    """Every bar, in the order of the benchmark's promises."""
    found = []
    for method in _OURS:
        found += [_never_worse(cases, method), *_gains(cases, method)]
    for method in _OURS:
        found += _forecasts(cases, method)
    found.append(_beside("float32", OURS, FREE, cases))
    for storage in ("float16", "bfloat16"):
        found += [_beside(storage, OURS, other, cases) for other in (PAPER, PLAIN, STEADY, MEASURED)]
    single = [case for case in sparse if case.target != "all"]
    groups: dict[tuple[str, int, float], list[SparseCase]] = {}
    for case in single:
        groups.setdefault((case.method, case.snapshots, case.tolerance), []).append(case)
    for group in groups.values():
        found += _sparse(group)
    return found


def _ratios(cases: Sequence[Case], method: str, other: str, storage: str = "float32") -> list[tuple[float, Case]]:
    """Error of one method over that of another, with the case, ascending."""
    errors = {_key(case): case.error for case in cases if case.method == other and case.storage == storage}
    ours = [case for case in cases if case.method == method and case.storage == storage and _key(case) in errors]
    return sorted(((case.error / errors[_key(case)], case) for case in ours), key=lambda pair: pair[0])


def _never_worse(cases: Sequence[Case], method: str) -> Bar:
    ratios = _ratios(cases, method, PAPER)
    worst, case = ratios[-1]
    bad = sum(ratio > 1.1 for ratio, _ in ratios)
    claim = f"{method}: float32 error at most 1.1 x the paper's ({bad} of {len(ratios)} above)"
    return Bar(claim, worst <= 1.1, worst, _where(case))


def _beside(storage: str, method: str, other: str, cases: Sequence[Case]) -> Bar:
    """Not a bar, but something to know."""
    ratios = _ratios(cases, method, other, storage)
    best, middle, (worst, case) = ratios[0][0], ratios[len(ratios) // 2][0], ratios[-1]
    claim = f"{method}: {storage} error over that of {other!r} (no bar; best {best:.2g}, median {middle:.2g})"
    return Bar(claim, True, worst, _where(case))


def _gains(cases: Sequence[Case], method: str) -> list[Bar]:
    found = []
    for family, least in _GAIN.items():
        some = [c for c in cases if _FAMILY[c.training] == family and c.target in ("0.2", "0.25") and c.snapshots >= 16]
        ratios = _ratios(some, method, PAPER)
        if ratios:
            ratio, case = ratios[-1]
            claim = f"{method}: {least:g} x better at 0.20 and 0.25 from 16 snapshots, {family} runs"
            found.append(Bar(claim, 1.0 / ratio >= least, 1.0 / ratio, _where(case)))
    return found


def _forecasts(cases: Sequence[Case], method: str) -> list[Bar]:
    """One bar for all runs together, and one for each run that has its own story."""
    ours = [case for case in cases if case.method == method]
    groups = {"all runs": ours}
    for case in ours:
        groups.setdefault(case.training, []).append(case)
    return [_forecast(f"{method}: forecast within a factor of 3, {name}", some) for name, some in groups.items()]


def _forecast(claim: str, cases: Sequence[Case]) -> Bar:
    off = [abs(math.log(case.forecast / case.error)) for case in cases]
    share = sum(distance <= math.log(3.0) for distance in off) / len(off)
    case = cases[max(range(len(off)), key=off.__getitem__)]
    worst = f"{_where(case)} {case.storage}: forecast {case.forecast:.2g}, error {case.error:.2g}"
    return Bar(f"{claim} ({len(cases)} cases)", share >= 0.9, share, worst)


def _sparse(cases: Sequence[SparseCase]) -> list[Bar]:
    most = max(cases, key=lambda case: case.used)
    worst = max(cases, key=lambda case: case.error / case.tolerance)
    limit, off = _MOST_USED[most.tolerance], worst.error / worst.tolerance
    label = f"{most.method}: {2 * most.snapshots} sources at {most.tolerance:g}"
    where = f"{worst.training} {worst.target}: error {worst.error:.2g}"
    return [
        Bar(f"{label}, at most {limit} needed", most.used <= limit, most.used, f"{most.training} {most.target}"),
        Bar(f"{label}, error at most 3 x the tolerance", off <= 3.0, off, where),
    ]


def _key(case: Case) -> tuple[str, int, str]:
    return case.training, case.snapshots, case.target


def _where(case: Case) -> str:
    return f"{case.training} {case.target} from {case.snapshots}"
