"""What the command line prints: tables for people, JSON for machines."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sharded_phema.forecast import Outlook
from sharded_phema.prepare import Prepared
from sharded_phema.pruning import Pruning
from sharded_phema.recipe import Plan, PlannedTarget
from sharded_phema.recommend import Recommendation
from sharded_phema.store import Run, Snapshot
from sharded_phema.target import Target, parse_target
from sharded_phema.verify import Report
from sharded_phema.width import sigma_rel_of

__all__ = ["show_info", "show_outlooks", "show_prepared", "show_pruning", "show_rebuilt", "show_report", "size_text"]


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
    if target.kind == "checkpoint" or target.every:
        return "the weights themselves (checkpoint)" if not target.every else f"as updated rarely ({label})"
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


def show_prepared(prepared: Prepared, *, as_json: bool) -> None:
    """What a reconstruction would read and write, and which worker which of it; on stderr, what is left out."""
    plan, division = prepared.plan, prepared.division
    if plan.left_out:
        _show_left_out(plan)
    columns = ("worker", "first_block", "blocks", "bytes_to_read", "bytes_to_write")
    rows = [
        (number, share.start, len(share), _total(division.read, share), _total(division.written, share))
        for number, share in enumerate(division.shares)
    ]
    facts = {
        "bytes_to_read": sum(row[3] for row in rows),
        "bytes_to_write": sum(row[4] for row in rows),
        "memory": prepared.memory,
    }
    if as_json:
        workers = [dict(zip(columns, row, strict=True)) for row in rows]
        _print_json(facts | {"sources": _sources(plan), **_targets(plan, str(prepared.wish.out)), "workers": workers})
        return
    sources = Table(plan.run.record.unit, "average", *(t.target.text for t in plan.targets), title="coefficients")
    for source in _sources(plan):
        weights = (f"{c:.4g}" if c else "" for c in source["coefficients"])
        sources.add_row(f"{source['t']:.17g}", source["average"], *weights)
    sharing = Table(
        *(column.replace("_", " ") for column in columns),
        title=f"{size_text(facts['bytes_to_read'])} to read, {size_text(facts['bytes_to_write'])} to write, "
        f"{size_text(prepared.memory)} of buffers a worker",
    )
    for number, first, count, read, written in rows:
        sharing.add_row(str(number), str(first), str(count), size_text(read), size_text(written))
    title = f"to rebuild from {len(plan.sources)} stored averages"
    _print(_target_table(plan, str(prepared.wish.out), title), sources, sharing)


def _total(sizes: NDArray[np.float64], share: range) -> int:
    return int(sizes[share.start : share.stop].sum())


def _sources(plan: Plan) -> list[dict[str, Any]]:
    """Each source: its time, its average, and its weight in each target."""
    averages = plan.run.record.averages
    return [
        {"t": source.snapshot.t, "average": averages[source.average], "coefficients": row}
        for source, row in zip(plan.sources, plan.coefficients.tolist(), strict=True)
    ]


def show_rebuilt(plan: Plan, out: str, *, as_json: bool) -> None:
    """What was rebuilt, with which forecast; on stderr, which damaged snapshots were left out, and what that costs."""
    if plan.left_out:
        _show_left_out(plan)
    done = plan.summary
    if as_json:
        moved = {} if done is None else asdict(done)
        _print_json({"sources": len(plan.sources), "bytes_read": plan.bytes_to_read, **moved, **_targets(plan, out)})
        return
    title = f"rebuilt from {len(plan.sources)} stored averages, {size_text(plan.bytes_to_read)} read"
    _print(_target_table(plan, out, title))
    if done:
        rate = size_text((done.read + done.written) / max(done.seconds, 1e-9))
        with_ = f"{done.workers} workers" if done.workers > 1 else "1 worker"
        moved_text = f"{size_text(done.read)} read, {size_text(done.written)} written"
        print(f"{moved_text} in {done.seconds:.3g} s by {with_}: {rate}/s")
        if not done.finished:
            print(f"This worker is done; {out} appears when all are.")


def _targets(plan: Plan, out: str) -> dict[str, Any]:
    """What is rebuilt, and what is left out, for machines."""
    keys = ("target", "t", "forecast", "fit_part", "rounding_part", "noise_gain", "folder")
    found: dict[str, Any] = {"targets": [dict(zip(keys, row, strict=True)) for row in _target_rows(plan, out)]}
    if plan.left_out:
        found["left_out"] = [{"snapshot": lost.name, "reason": lost.reason} for lost in plan.left_out]
    return found


def _target_table(plan: Plan, out: str, title: str) -> Table:
    columns = ("target", plan.run.record.unit, "forecast error", "of the fit", "of rounding", "sum of |c|", "folder")
    table = Table(*columns, title=title)
    for text, t, error, fit, rounding, gain, folder in _target_rows(plan, out):
        table.add_row(text, f"{t:.17g}", _error(error), f"{fit:.1e}", f"{rounding:.1e}", f"{gain:.3g}", folder)
    return table


def _target_rows(plan: Plan, out: str) -> list[tuple[str, float, float, float, float, float, str]]:
    return [
        (p.target.text, p.t, p.fit.forecast, p.fit.fit_part, p.fit.rounding_part, p.fit.noise_gain, f"{out}/{slug}")
        for slug, p in _rebuilt(plan)
    ]


def show_pruning(plan: Pruning, *, removed: bool, as_json: bool) -> None:
    """What is removed of a run, or would be, and what it costs each target."""
    waste, unit = plan.waste, plan.run.record.unit
    snapshots = [(kind, s.t, s.size, s.where) for kind, group in _going(plan).items() for s in group]
    others = {"unfinished": waste.unfinished, "frozen": waste.frozen, "temporary": waste.temporary}
    costs = [(cost.target.text, cost.t, cost.before, cost.after) for cost in plan.kept.costs]
    if as_json:
        facts = {"removed": removed, "kept": len(plan.kept.kept), "bytes": plan.freed, "damaged": len(plan.run.damaged)}
        going = [dict(zip(("kind", "t", "bytes", "folder"), row, strict=True)) for row in snapshots]
        keys = ("target", "t", "before", "after")
        _print_json(
            facts | {"snapshots": going} | others | {"targets": [dict(zip(keys, row, strict=True)) for row in costs]}
        )
        return
    what = f"{len(plan.dropped)} of {len(plan.run.snapshots)} snapshots and what was left behind"
    listing = Table(
        "", unit, "size", "folder", title=f"{what}: {size_text(plan.freed)} {'freed' if removed else 'to free'}"
    )
    for kind, t, size, where in snapshots:
        listing.add_row(kind, f"{t:.17g}", size_text(size), where)
    for kind, found in others.items():
        for name in found:
            listing.add_row(kind, "", "", name)
    forecasts = Table("target", unit, "forecast before", "after", title="error of the rebuilt average")
    for text, t, before, after in costs:
        forecasts.add_row(text, f"{t:.17g}", _error(before), _error(after))
    _print(listing, *([forecasts] if costs else []))
    if not removed and plan.freed:
        print("Nothing was removed: give --yes to do so.")


def _going(plan: Pruning) -> dict[str, Sequence[Snapshot]]:
    return {"not needed": plan.dropped, "abandoned": plan.waste.abandoned}


def _show_left_out(plan: Plan) -> None:
    lost = Table("snapshot", "why", title="warning: snapshots were left out")
    for one in plan.left_out:
        lost.add_row(escape(one.name), escape(one.reason))
    cost = Table("target", "forecast error", "with them", title="what that costs")
    for planned in plan.targets:
        cost.add_row(planned.target.text, _error(planned.fit.forecast), _error(planned.forecast_before))
    console = Console(stderr=True) if Console(stderr=True).is_terminal else Console(stderr=True, width=160)
    for table in (lost, cost):
        console.print(table)


def show_report(report: Report, *, as_json: bool) -> None:
    """What of a run folder is not as it was written."""
    damaged = {one.name: one.reason for one in report.damaged}
    if as_json:
        facts = {"root": report.root, "intact": report.intact, "snapshots": report.snapshots, "files": report.files}
        lists = {"extra": list(report.extra), "left_over": list(report.left_over)}
        _print_json(facts | {"bytes": report.size, "damaged": damaged} | lists)
        return
    read = f"{report.files} files of {report.snapshots} snapshots and their records, {size_text(report.size)}"
    wrong = [(name, "damaged", reason) for name, reason in damaged.items()]
    wrong += [(name, "extra", "no record names it") for name in report.extra]
    if wrong:
        table = Table("file", "", "why", title=f"{report.root}: {len(wrong)} not as written; read: {read}")
        for row in wrong:
            table.add_row(*map(escape, row))
        _print(table)
    else:
        print(f"{report.root}: everything is as it was written: {read}")
    if report.left_over:
        print(f"{len(report.left_over)} files of writers that never finished, which do no harm: {report.left_over[0]}")


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
