"""Tables: the measurements as text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bars import Bar
from grid import Grid
from measure import FIT, FREE, MEAN, MEASURED, OURS, PAPER, PLAIN, RATED, STEADY, Case
from sparse import SparseCase
from trainings import Trajectory

__all__ = ["report"]

Row = Sequence[str]


def report(
    grid: Grid, runs: Sequence[Trajectory], cases: Sequence[Case], sparse: Sequence[SparseCase], found: Sequence[Bar]
) -> str:
    """All tables in Markdown, the bars first."""
    parts = ["# Accuracy of rebuilt averages", "", _preamble(grid), "", "## Bars", "", _bars(found), "", "## Trainings"]
    parts += ["", _trainings(runs), "", "## Few sources", "", _sparse(sparse), ""]
    errors = {(c.training, c.method, c.snapshots, c.storage, c.target): c.error for c in cases}
    for run in runs:
        name = run.training.name
        parts += [f"## {run.training.title} (`{name}`)", ""]
        parts += [f"float32: {PAPER} / {FREE} / {OURS}", "", _by_snapshots(grid, errors, name), ""]
        parts += ["Other dtypes: " + " / ".join(_LOW), "", _by_storage(grid, errors, name), ""]
        parts += [f"Raw checkpoints, float32: {MEAN} / {FIT} / {OURS} (two averages)", ""]
        parts += [_raw(grid, errors, name), ""]
    return "\n".join(parts)


_LOW = (PAPER, PLAIN, OURS, STEADY, MEASURED, RATED)
Errors = dict[tuple[str, str, int, str, str], float]


def _preamble(grid: Grid) -> str:
    return (
        f"Error is |rebuilt - target| / |raw - target|, on {grid.sampled} parameters drawn at random. Targets are "
        "averages over every step, in float64. Each snapshot holds the averages 0.05 and 0.10. A dash: the method "
        "cannot take the target."
    )


def _bars(found: Sequence[Bar]) -> str:
    rows = [[bar.claim, "pass" if bar.passed else "FAIL", f"{bar.found:.3g}", bar.worst] for bar in found]
    return _table(["bar", "", "found", "worst case"], rows)


def _trainings(runs: Sequence[Trajectory]) -> str:
    facts = ("parameters", "first_loss", "last_loss", "seconds")
    rows = [[run.training.title, str(run.steps), *(f"{run.about[fact]:.4g}" for fact in facts)] for run in runs]
    return _table(["training", "steps", *(fact.replace("_", " ") for fact in facts)], rows)


def _sparse(cases: Sequence[SparseCase]) -> str:
    """Most sources used and largest error over the tolerance, of all trainings, by target."""
    keys = list(dict.fromkeys((case.method, case.snapshots, case.tolerance) for case in cases))
    rows = []
    for target in dict.fromkeys(case.target for case in cases):
        row = [target]
        for key in keys:
            some = [c for c in cases if (c.method, c.snapshots, c.tolerance) == key and c.target == target]
            row.append(f"{max(c.used for c in some)} / {max(c.error / c.tolerance for c in some):.2g}")
        rows.append(row)
    head = (f"{method}, {2 * count} sources at {tolerance:g}" for method, count, tolerance in keys)
    return _table(["target", *head], rows)


def _by_snapshots(grid: Grid, errors: Errors, name: str) -> str:
    methods = (PAPER, FREE, OURS)
    rows = [
        [target.text, *(_cell(errors, name, methods, count, "float32", target.text) for count in grid.snapshots)]
        for target in grid.targets
    ]
    return _table(["target", *map(str, grid.snapshots)], rows)


def _by_storage(grid: Grid, errors: Errors, name: str) -> str:
    counts = [count for count in grid.snapshots if count in (16, 64)]
    columns = [(storage, count) for storage in ("float16", "bfloat16") for count in counts]
    rows = [
        [target.text, *(_cell(errors, name, _LOW, count, storage, target.text) for storage, count in columns)]
        for target in grid.targets
    ]
    return _table(["target", *(f"{storage}, {count}" for storage, count in columns)], rows)


def _raw(grid: Grid, errors: Errors, name: str) -> str:
    rows = [
        [t.text, *(_cell(errors, name, (MEAN, FIT, OURS), count, "float32", t.text) for count in grid.snapshots)]
        for t in grid.targets
    ]
    return _table(["target", *map(str, grid.snapshots)], rows)


def _cell(errors: Errors, name: str, methods: Sequence[str], count: int, storage: str, target: str) -> str:
    found = (errors.get((name, method, count, storage, target)) for method in methods)
    return " / ".join("-" if error is None else f"{error:.1e}" for error in found)


def _table(head: Row, rows: Sequence[Row]) -> str:
    return "\n".join(_lines(head, rows))


def _lines(head: Row, rows: Sequence[Row]) -> Iterator[str]:
    for row in (head, ["---"] * len(head), *rows):
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"
