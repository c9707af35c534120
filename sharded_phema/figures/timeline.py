"""Timeline: a run's sessions and snapshots over training time, their sizes, and how far their averages lie apart."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sharded_phema.errors import StoreError
from sharded_phema.figures.canvas import BEST, GREY, blank, colour, legend, literal, mark
from sharded_phema.figures.names import average_name
from sharded_phema.manifest import SessionRecord, SnapshotRecord
from sharded_phema.store import Run, sessions_of

__all__ = ["timeline"]

_SHOWN = 12  # sessions that have a tick of their own


@dataclass(frozen=True, slots=True)
class _Row:
    """One session as it is drawn.

    Attributes:
        session: Its record.
        begin: Training time at which it began.
        cutoff: Training time from which a later session took over; infinite for the newest.
    """

    session: SessionRecord
    begin: float
    cutoff: float


def timeline(run: Run) -> Any:
    """Four panels over training time: sessions with their snapshots, sizes, norms of averages, distances between them.

    Norms and distances are those that the records hold, of the snapshots that are used.

    Raises:
        OutputError: matplotlib is missing.
        StoreError: The run has no snapshots at all, or the record of a session is damaged.
    """
    if not (run.snapshots or run.abandoned or any(damaged.facts for damaged in run.damaged)):
        raise StoreError(f"{run.root.url} holds no finished snapshot", hint="train past the first snapshot_every")
    rows = _rows(run)
    figure, grid = blank(4, size=(8.0, 2.1), sharex=True)
    top, sizes, norms, gaps = grid[:, 0]
    _draw_sessions(top, run, rows)
    _draw_sizes(sizes, run)
    averages = [average_name(label) for label in run.record.averages]
    _draw_squares(norms, run, [s.norms for s in run.snapshots], averages)
    norms.set(title="norm of each average", ylabel="|average|")
    pairs = [f"{a} to {b}" for a, b in itertools.combinations(averages, 2)]
    _draw_squares(gaps, run, [s.gaps for s in run.snapshots], pairs)
    gaps.set(title="distance between averages", ylabel="|difference|")
    gaps.set_xlabel(f"training time ({literal(run.record.unit)})")
    return figure


def _rows(run: Run) -> list[_Row]:
    sessions = sessions_of(run)
    cutoffs, cutoff = [], np.inf
    for session in reversed(sessions):
        cutoffs.append(cutoff)
        cutoff = min(cutoff, session.resumed_at)
    first = min((s.start for s in (*run.snapshots, *run.abandoned)), default=0.0)
    begins = [session.resumed_at if session.parent else first for session in sessions]
    return [_Row(*row) for row in zip(sessions, begins, reversed(cutoffs), strict=True)]


def _draw_sessions(axes: Any, run: Run, rows: Sequence[_Row]) -> None:
    known = [damaged.facts for damaged in run.damaged if damaged.facts]
    place = {row.session.session: number for number, row in enumerate(rows)}
    axes.use_sticky_edges = False  # bars would cut the last snapshots off
    for number, row in enumerate(rows):
        facts = [*(s.facts for s in (*run.snapshots, *run.abandoned)), *known]
        end = max((f.t for f in facts if f.session == row.session.session), default=row.begin)
        kept = max(row.begin, min(end, row.cutoff))
        axes.barh(number, kept - row.begin, 0.5, left=row.begin, color=colour(0), alpha=0.25)
        axes.barh(number, end - kept, 0.5, left=kept, color=GREY, alpha=0.25)
    groups: list[tuple[str, list[SnapshotRecord], dict[str, Any]]] = [
        ("used", [s.facts for s in run.snapshots], {"marker": "o", "color": colour(0)}),
        ("abandoned", [s.facts for s in run.abandoned], {"marker": "o", "color": GREY, "mfc": "white"}),
        ("damaged", known, {"marker": "X", "color": BEST, "ms": 8}),
    ]
    for name, facts, style in groups:
        if facts:
            label = f"{len(facts)} {name}"
            axes.plot([f.t for f in facts], [place[f.session] for f in facts], ls="", label=label, **{"ms": 5} | style)
    _label_sessions(axes, run, rows)


def _label_sessions(axes: Any, run: Run, rows: Sequence[_Row]) -> None:
    shown = range(0, len(rows), -(-len(rows) // _SHOWN))
    ranks = [rows[k].session.world_size for k in shown]
    axes.set_yticks(shown, [f"{k + 1} ({n} rank{'s' * (n > 1)})" for k, n in zip(shown, ranks, strict=True)])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_ylabel("session")
    lost = sum(damaged.facts is None for damaged in run.damaged)
    notes = [f"{lost} damaged at an unknown time"] * bool(lost)
    notes += [f"{len(run.unfinished)} unfinished"] * bool(run.unfinished)
    axes.set_title("; ".join(["snapshots by session", *notes]))
    legend(axes, outside=True)


def _draw_sizes(axes: Any, run: Run) -> None:
    from matplotlib.ticker import EngFormatter

    # Abandoned ones lie under those that were taken at the same time later, and show as rings around them.
    rings: dict[str, Any] = {"color": GREY, "mfc": "white", "ms": 9}
    dots: dict[str, Any] = {"color": colour(0), "ms": 5}
    for name, found, style in (("abandoned", run.abandoned, rings), ("used", run.snapshots, dots)):
        if found:
            axes.plot([s.t for s in found], [s.size for s in found], ls="", marker="o", label=name, **style)
    axes.yaxis.set_major_formatter(EngFormatter(unit="B"))
    axes.set_ylim(0, 1.2 * max((s.size for s in (*run.snapshots, *run.abandoned)), default=1.0))
    total = sum(s.size for s in (*run.snapshots, *run.abandoned))
    axes.set(title=f"size of each snapshot, {EngFormatter(unit='B', places=1)(total)} in all", ylabel="size")


def _draw_squares(axes: Any, run: Run, squares: Sequence[tuple[float, ...]], names: Sequence[str]) -> None:
    """Roots of what each snapshot's record holds, one line a name; where a record holds nothing, the line is broken."""
    if not names or not any(squares):
        axes.text(0.5, 0.5, "nothing recorded", transform=axes.transAxes, ha="center", va="center", color=GREY)
        return
    table = np.array([row or (np.nan,) * len(names) for row in squares])
    for k, name in enumerate(names):
        style: dict[str, Any] = {"color": colour(k), "marker": mark(k), "ms": 3.5, "lw": 1.5}
        axes.plot([s.t for s in run.snapshots], np.sqrt(table[:, k]), label=name, **style)
    legend(axes, outside=True)
