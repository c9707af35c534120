"""What the command line prints of a sweep: a table for people, JSON for machines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sharded_phema.sweeping.curves import Curve, curves_of
from sharded_phema.tally import Entry, Tally

__all__ = ["show_sweep"]


def show_sweep(found: Tally, rebuild: Sequence[str], *, open_ends: bool, as_json: bool) -> None:
    """Scores of a sweep, the best of each curve marked, and how to rebuild the best of all.

    Args:
        found: What was measured.
        rebuild: Lines of a shell that rebuild the best of all.
        open_ends: Whether to say where a best width is at the edge of those that were tried.
        as_json: For machines.
    """
    curves = curves_of(found)
    hints = [_hint(curve) for curve in curves if curve.is_open] if open_ends else []
    if as_json:
        _print_json(found, curves, rebuild, hints)
        return
    console = Console() if Console().is_terminal else Console(width=160)
    console.print(escape(f"{found.metric}: {found.better} is better"), soft_wrap=True)
    console.print(_table(found, curves))
    for hint in hints:
        console.print(escape(f"note: {hint}"), soft_wrap=True)
    print("To rebuild the best:", *rebuild, sep="\n")


def _table(found: Tally, curves: Sequence[Curve]) -> Table:
    """One row a target; columns that say the same in every row are left out."""
    parts, seconds = bool(found.groups), [second.name for second in found.seconds[:1]]
    shown = [len(found.times) > 1, parts, parts, bool(seconds)]
    names = [found.unit, "group", "others", *(seconds or [""])]
    repeated = any(len(entry.values) > 1 for entry in found.entries)
    columns = [*_only(names, shown), "target", "score", *(["min – max"] if repeated else []), "forecast error", ""]
    table = Table(*columns)
    for curve in curves:
        place = _only(_place(curve), shown)
        for entry in curve.entries:
            row = [*place, entry.first.target, f"{entry.mean:.6g}"]
            row += [f"{entry.least:.6g} – {entry.most:.6g}"] if repeated else []
            mark = "best of all" if entry is found.best else "best" if entry is curve.best else ""
            table.add_row(*row, f"{entry.first.forecast:.1e}", mark)
        table.add_section()
    return table


def _place(curve: Curve) -> list[str]:
    first = curve.first
    second = f"{first.second.value:g}" if first.second else ""
    return [f"{first.t:.17g}", escape(first.group or "all"), escape(first.base or ""), second]


def _only(values: Sequence[str], shown: Sequence[bool]) -> list[str]:
    return [value for value, wanted in zip(values, shown, strict=True) if wanted]


def _hint(curve: Curve) -> str:
    first, best, low, high = curve.first, curve.best.first, curve.widths[0], curve.widths[-1]
    where = f" of {first.group}" if first.group else ""
    where += f" with {first.second.name}={first.second.value:g}" if first.second else ""
    return (
        f"the best width{where} at {first.unit} {first.t:g}, {best.target}, is at the edge of those tried, "
        f"{low:g} to {high:g}: a better one may lie {'below' if best.sigma_rel == low else 'above'}; widen --targets"
    )


def _print_json(found: Tally, curves: Sequence[Curve], rebuild: Sequence[str], hints: Sequence[str]) -> None:
    facts: dict[str, Any] = {"run": found.run, "unit": found.unit, "metric": found.metric, "better": found.better}
    facts |= {"curves": [_facts(curve) for curve in curves], "best": _entry(found.best) | _line(found.best)}
    print(json.dumps(facts | {"rebuild": list(rebuild), "notes": list(hints)}, indent=1))


def _facts(curve: Curve) -> dict[str, Any]:
    scores = [_entry(entry) for entry in curve.entries]
    return _line(curve.best) | {"scores": scores, "best": curve.best.first.target, "open": curve.is_open}


def _line(entry: Entry) -> dict[str, Any]:
    first = entry.first
    second = asdict(first.second) if first.second else None
    return {"t": first.t, "group": first.group, "base": first.base, "second": second}


def _entry(entry: Entry) -> dict[str, Any]:
    facts = {"target": entry.first.target, "sigma_rel": entry.first.sigma_rel, "forecast": entry.first.forecast}
    return facts | {"score": entry.mean, "min": entry.least, "max": entry.most, "values": list(entry.values)}
