"""What the command line prints: tables for people, JSON for machines."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from sharded_phema.forecast import Outlook
from sharded_phema.recipe import Plan, PlannedTarget
from sharded_phema.recommend import Recommendation
from sharded_phema.store import Run
from sharded_phema.target import Target, parse_target
from sharded_phema.width import sigma_rel_of

__all__ = ["show_info", "show_outlooks", "show_rebuilt", "size_text"]


def size_text(size: float) -> str:
    """Bytes in decimal units, three digits."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 999.5 or unit == "TB":
            break
        size /= 1000
    return f"{size:.3g} {unit}"


def show_info(run: Run, *, as_json: bool) -> None:
    """What a run folder holds."""
    record = run.record
    facts: dict[str, Any] = {
        "run": record.run,
        "unit": record.unit,
        "dtype": record.dtype,
        "averages": [_average(label) for label in record.averages],
        "parameters": len(record.parameters),
        "elements": run.numel,
        "copied": len(record.copied),
        "frozen": len(record.frozen),
        "snapshots": len(run.snapshots),
        "bytes": sum(snapshot.size for snapshot in run.snapshots) + run.frozen_size,
        "unfinished": len(run.unfinished),
        "abandoned": len(run.abandoned),
        "damaged": len(run.damaged),
    }
    rows = [(s.t, len(s.facts.parts), s.size, s.where) for s in run.snapshots]
    if as_json:
        keys = ("t", "ranks", "bytes", "folder")
        _print_json(facts | {"snapshots": [dict(zip(keys, row, strict=True)) for row in rows]})
        return
    table = Table("", "", title=run.root.url, show_header=False)
    for key, value in facts.items():
        text = size_text(value) if key == "bytes" else ", ".join(value) if isinstance(value, list) else f"{value}"
        table.add_row(key, text)
    listing = Table(record.unit, "ranks", "size", "folder", title="snapshots")
    for t, ranks, size, folder in rows:
        listing.add_row(f"{t:.17g}", str(ranks), size_text(size), folder)
    _print(table, listing)


def _average(label: str) -> str:
    target = parse_target(label)
    if target.kind == "exponential":
        return f"half-life {target.amount * math.log(2.0):.4g} ({label})"
    if target.kind == "power" and target.amount > 0.0:
        return f"sigma_rel {sigma_rel_of(target.amount):.4g} ({label})"
    return f"running mean ({label})"


def show_outlooks(
    outlooks: Sequence[Outlook], targets: Sequence[Target], recommended: Sequence[Recommendation], *, as_json: bool
) -> None:
    """Forecasts by target and number of snapshots, the disk that each number takes, and what is recommended."""
    if as_json:
        plans = [
            {
                "snapshots": plan.snapshots,
                "bytes": plan.size,
                "forecasts": {target.text: f for target, f in zip(targets, plan.forecasts, strict=True)},
            }
            for plan in outlooks
        ]
        _print_json({"plans": plans, "recommended": [asdict(plan) for plan in recommended]})
        return
    table = Table(
        "target",
        *(f"{plan.snapshots} snapshots" for plan in outlooks),
        title="forecast: error of the rebuilt average, relative to |raw - target|",
    )
    for k, target in enumerate(targets):
        table.add_row(target.text, *(_error(plan.forecasts[k]) for plan in outlooks))
    table.add_section()
    table.add_row("disk", *(size_text(plan.size) for plan in outlooks))
    _print(table, *([_recommended(recommended)] if recommended else []))


def _recommended(plans: Sequence[Recommendation]) -> Table:
    columns = ("dtype", "sigma_rels", "snapshots", "snapshot_every", "disk", "largest error")
    table = Table(*columns, title="recommended, evenly spaced, least disk first")
    for plan in plans:
        widths = ", ".join(map(str, plan.widths))
        row = (plan.dtype, widths, str(plan.snapshots), f"{plan.snapshot_every:g}", size_text(plan.size))
        table.add_row(*row, _error(max(plan.forecasts)))
    return table


def show_rebuilt(plan: Plan, out: str, *, as_json: bool) -> None:
    """What was rebuilt, with which forecast."""
    keys = ("target", "t", "forecast", "fit_part", "rounding_part", "noise_gain", "folder")
    rows = [
        (p.target.text, p.t, p.fit.forecast, p.fit.fit_part, p.fit.rounding_part, p.fit.noise_gain, f"{out}/{slug}")
        for slug, p in _rebuilt(plan)
    ]
    if as_json:
        read = {"sources": len(plan.sources), "bytes_read": plan.bytes_to_read}
        _print_json(read | {"targets": [dict(zip(keys, row, strict=True)) for row in rows]})
        return
    title = f"rebuilt from {len(plan.sources)} stored averages, {size_text(plan.bytes_to_read)} read"
    columns = ("target", plan.run.record.unit, "forecast error", "of the fit", "of rounding", "sum of |c|", "folder")
    table = Table(*columns, title=title)
    for text, t, error, fit, rounding, gain, folder in rows:
        table.add_row(text, f"{t:.17g}", _error(error), f"{fit:.1e}", f"{rounding:.1e}", f"{gain:.3g}", folder)
    _print(table)


def _rebuilt(plan: Plan) -> Iterator[tuple[str, PlannedTarget]]:
    """Each folder with each target that some of its parameters have."""
    for planned in plan.outputs:
        for index in dict.fromkeys(planned.choice):
            yield planned.output.slug, plan.targets[index]


def _error(forecast: float) -> str:
    return "stored" if forecast == 0 else f"{forecast:.1e}"


def _print(*tables: Table) -> None:
    # Piped output keeps whole lines: a width of 80 would cut folders apart.
    console = Console() if Console().is_terminal else Console(width=160)
    for table in tables:
        console.print(table)


def _print_json(value: object) -> None:
    print(json.dumps(value, indent=1))
