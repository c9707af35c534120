"""Retention: how many snapshots stay as a run grows, and what the targets of every end on the way can still reach.

A run of 10,000 snapshots of sigma_rel 0.05 and 0.10 is gone through, and after each snapshot the rule drops what it
may; some cases go less far. Writes results/retention.json, results/retention.md and docs/figures/retention.png. About
10 minutes on 2 cores.
"""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import json
import math
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from sharded_phema.fit import fit
from sharded_phema.kept import Moment, keep
from sharded_phema.movement import STEADY, Movement, movement_of
from sharded_phema.retention import Retention, parse_retention
from sharded_phema.rounding import rounding_noise
from sharded_phema.target import Target, parse_target, parse_targets

HERE = Path(__file__).parent
TRACKED = parse_targets(("0.05", "0.10"))
STILLNESS = 10.0
DENSE = 33  # widths at which a range is looked at that was asked for at nine
HEAD = """# What is kept

Snapshots of sigma_rel 0.05 and 0.10 that are kept after so many. `from`: number of snapshots from which on all of them
together reach the tolerance (30 if there is none, or 60 do not). `largest forecast`: at any end of the run from there
on. `33 widths`: the same for 33 widths of the range, which was asked for at nine, at the ends that are drawn. `all of
100`: what all of the first 100 snapshots reach together. `ms`: time of a decision, on a shared core.

"""
BEATS = 25  # points of a curve for each factor e of the run's length


@dataclass(frozen=True)
class Case:
    """One run: what is kept, and how."""

    name: str
    retention: str
    dtype: str = "float32"
    ongoing: bool = True
    rate: str = "constant"
    known: bool = True
    length: int = 10_000


@dataclass(frozen=True)
class Point:
    """After one snapshot: how many there were, how many stay, the largest forecast, and the same at 33 widths."""

    snapshots: int
    kept: int
    forecast: float
    dense: float


@dataclass(frozen=True)
class Grown:
    """A case, gone through.

    Attributes:
        first: Snapshots from which on all of them together reach the tolerance, or 30 if they do not with 60.
        worst: Largest forecast at any of the ends from there on.
        dense: The same at 33 widths, at the ends that are drawn.
        most: Most snapshots kept at any time.
        seconds: Mean time of a decision.
        everything: Largest forecast of all snapshots together, by their number.
    """

    case: Case
    first: int
    worst: float
    dense: float
    most: int
    seconds: float
    everything: dict[int, float]
    curve: tuple[Point, ...]


WINDOWS = "window:0.2 decay:linear:0.1 decay:cosine:0.2 tolerance=1e-2"
CASES = (
    Case("widths, 1e-2", "0.05:0.20 tolerance=1e-2"),
    Case("widths, 1e-3", "0.05:0.20 tolerance=1e-3"),
    Case("wide range, 1e-2", "0.03:0.25 tolerance=1e-2", length=3000),
    Case("wide range, 1e-3", "0.03:0.25 tolerance=1e-3", length=3000),
    Case("windows and decays", WINDOWS, length=3000),
    Case("the same, for the present end alone", WINDOWS, ongoing=False, length=1000),
    Case("widths, 1e-2, for the present end alone", "0.05:0.20 tolerance=1e-2", ongoing=False, length=1000),
    Case("the best 12", "0.05:0.20 count=12", length=3000),
    Case("each doubling", "0.05:0.20 tolerance=1e-2 earlier=2", length=3000),
    Case("bfloat16", "0.05:0.20 tolerance=1e-2", dtype="bfloat16", length=3000),
    Case("cosine to 0, known", "0.05:0.20 tolerance=1e-2", rate="cosine", length=1000),
    Case("cosine to 0, not known", "0.05:0.20 tolerance=1e-2", rate="cosine", known=False, length=1000),
)


def noise_of(times: Sequence[float], dtype: str) -> list[float]:
    """Rounding of two averages at each time: the squared norm of weights grows like the distance they walk."""
    return [rounding_noise(dtype, STILLNESS * t) for t in times for _ in TRACKED]


def grown(case: Case, length: int) -> Grown:
    """Go through a run."""
    wish, movement = parse_retention(case.retention), _movement(case, length)
    assumed = movement if case.known else STEADY
    held: list[Moment] = []
    curve, forecasts, kept, spent = [], [], [], 0.0
    first = _first(case, wish, movement)
    marks = set(np.unique(np.geomspace(1, length, round(BEATS * math.log(length))).round().astype(int)).tolist())
    for n in range(1, length + 1):
        held.append(Moment(float(n), 0.0, 1))
        begin = time.perf_counter()
        times = [moment.t for moment in held]
        done = keep(held, TRACKED, wish, movement=assumed, noise=noise_of(times, case.dtype), ongoing=case.ongoing)
        spent += time.perf_counter() - begin
        held = [held[i] for i in done.kept]
        real = max(cost.after for cost in done.costs if cost.t == n or first <= cost.t)
        if assumed is not movement:
            real = max(_forecasts(held, wish.wanted, n, case, movement))
        forecasts.append(real)
        kept.append(len(held))
        if n in marks:
            dense = max(_forecasts(held, _dense(case), n, case, movement))
            curve.append(Point(n, len(held), real, dense))
    dense = max(point.dense for point in curve if point.snapshots >= first)
    everything = {n: _all(n, case, wish.wanted, movement) for n in (30, 100)}
    return Grown(case, first, max(forecasts[first - 1 :]), dense, max(kept), spent / length, everything, tuple(curve))


def _movement(case: Case, length: int) -> Movement:
    if case.rate == "constant":
        return STEADY
    return movement_of(lambda t: 0.5 + 0.5 * math.cos(math.pi * min(t / length, 1.0)), float(length))


def _first(case: Case, wish: Retention, movement: Movement) -> int:
    """Snapshots from which on all of them reach the tolerance; 30 if there is none, or 60 do not reach it."""
    if wish.tolerance is None:
        return 30
    missed = [n for n in range(1, 61) if _all(n, case, wish.wanted, movement) > wish.tolerance]
    return missed[-1] + 1 if missed[-1] < 60 else 30


def _all(n: int, case: Case, wanted: Sequence[Target], movement: Movement) -> float:
    return max(_forecasts([Moment(float(i), 0.0, 1) for i in range(1, n + 1)], wanted, n, case, movement))


def _forecasts(
    held: Sequence[Moment], wanted: Sequence[Target], n: int, case: Case, movement: Movement
) -> Iterator[float]:
    sources = [label.tracked(moment.t, 0.0) for moment in held for label in TRACKED]
    noise = noise_of([moment.t for moment in held], case.dtype)
    fits = fit(sources, [target.profile(float(n)) for target in wanted], movement=movement, noise=noise)
    return (found.forecast for found in fits)


def _dense(case: Case) -> tuple[Target, ...]:
    low, _, high = case.retention.split()[0].partition(":")
    if not low[0].isdigit():
        return parse_retention(case.retention).wanted
    return tuple(parse_target(float(width)) for width in np.geomspace(float(low), float(high), DENSE))


def table(results: Sequence[Grown]) -> str:
    """Markdown."""
    ends = (30, 100, 300, 1000, 3000, 10000)
    columns = ("kept", "rounding", "from", "largest forecast", "33 widths", "all of 100")
    columns = (*columns, *(f"{n:,}" for n in ends), "most", "ms")
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for run in results:
        at = {point.snapshots: point.kept for point in run.curve}
        counts = [str(at[max(n for n in at if n <= end)]) if end <= max(at) else "" for end in ends]
        errors = [f"{error:.2e}" for error in (run.worst, run.dense, run.everything[100])]
        words = (f"{run.case.name}: `{run.case.retention}`", run.case.dtype, str(run.first), *errors, *counts)
        lines.append(f"| {' | '.join(words)} | {run.most} | {1e3 * run.seconds:.0f} |")
    return "\n".join(lines)


def draw(results: Sequence[Grown], path: Path) -> None:
    """Snapshots kept, and the largest forecast, against the number of snapshots taken."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 7.5), layout="constrained", dpi=110)
    counts, errors = figure.subplots(2, 1, sharex=True)
    for k, run in enumerate(results):
        taken = [point.snapshots for point in run.curve]
        label = f"{run.case.retention}{', bfloat16' if run.case.dtype == 'bfloat16' else ''}"
        counts.plot(taken, [point.kept for point in run.curve], color=f"C{k}", lw=1.5, label=label)
        errors.plot(taken, [point.forecast for point in run.curve], color=f"C{k}", lw=1.2)
    for tolerance in (1e-2, 1e-3):
        errors.axhline(tolerance, color="0.5", ls="--", lw=1)
    counts.plot(range(1, 56), range(1, 56), color="0.6", ls=":", lw=1, label="all")
    counts.set(xscale="log", ylabel="snapshots kept", ylim=(0, 55))
    counts.legend(frameon=False, fontsize=8, loc="upper left")
    errors.set(xscale="log", yscale="log", xlabel="snapshots taken", ylabel="largest forecast at this end")
    errors.set_ylim(1e-4, 1.0)
    figure.savefig(path)


def _drawn(results: Sequence[Grown]) -> list[Grown]:
    names = ("widths, 1e-2", "widths, 1e-3", "wide range, 1e-2", "wide range, 1e-3", "windows and decays")
    names = (*names, "each doubling", "bfloat16")
    return [run for run in results if run.case.name in names]


def _grown(job: tuple[Case, int]) -> Grown:
    return grown(*job)


def main() -> None:
    """Go through all runs, two at a time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=10_000)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--figure", type=Path, default=HERE.parent / "docs" / "figures" / "retention.png")
    options = parser.parse_args()
    most = options.length
    jobs = [(case, min(case.length, most)) for case in CASES]
    results = []
    with multiprocessing.Pool(2) as pool:
        for run in pool.imap(_grown, jobs):
            results.append(run)
            print(table([run]).splitlines()[-1], flush=True)
    (options.out / "retention.json").write_text(json.dumps([asdict(run) for run in results], indent=1) + "\n")
    (options.out / "retention.md").write_text(HEAD + table(results) + "\n")
    draw(_drawn(results), options.figure)


if __name__ == "__main__":
    main()
