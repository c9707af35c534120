"""Compared: the bars of reconstruction, and its measurements as text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from costs import predicted

__all__ = ["CORE_EACH", "MANY", "ONE_CORE", "OURS", "bars", "report"]

Found = Mapping[str, Any]
Row = dict[str, Any]

NEAR, SWEEP, ONE, ONE_DCP, SHARED, OVER_MIB = 1.5, 10.0, 5.0, 10.0, 1.6, 300.0
PLAN_S, PLAN_MB = 10.0, 500.0
MANY = "ours, 2 workers"
ONE_CORE, CORE_EACH = "ours, one core", "ours, 2 workers, a core each"
OURS = ("ours", MANY, ONE_CORE, CORE_EACH)


def bars(found: Found) -> list[Row]:
    """What was promised, and what was found, of everything that was measured."""
    rows = []
    for size, section in found["sizes"].items():
        for case in section["cases"]:
            where = f"{size}, {case['targets']} targets, {case['cache']}"
            rows += [{"where": where, **row} for row in _of_case(case, section["recipe"]["budget (MiB)"])]
    if found.get("planned"):
        planned = found["planned"]
        rows.append(_most("planning", "opening and planning (s)", planned["all (s)"], PLAN_S))
        own = (planned["peak (MiB)"] - planned["imported (MiB)"]) * (1 << 20) / 1e6
        rows.append(_most("planning", "memory beside what imports take (MB)", own, PLAN_MB))
    return rows


def _of_case(case: Found, budget: float) -> list[Row]:
    ways: Found = case["ways"]
    rows: list[Row] = []
    if {"ours", "bare read"} <= ways.keys():
        rows.append(_most("", "seconds over a bare read's", _ratio(ways, "ours", "bare read"), NEAR))
        more = _ratio(ways, "ours", "bare read and write")
        rows.append(_most("", "seconds over a bare read and write's", more, NEAR))
    if {"ours", "classic"} <= ways.keys():
        times = SWEEP if case["targets"] > 1 else ONE
        rows.append(_least("", "classic way's seconds over ours", _ratio(ways, "classic", "ours"), times))
        error, theirs = ways["ours"]["worst error"], ways["classic"]["worst error"]
        if case["targets"] > 1:
            # What is left out may cost a hundredth: that is how far the choice of sources goes.
            rows.append(_most("", "worst error over the classic way's", error / theirs, 1.01))
    if {"ours", "dcp.load"} <= ways.keys() and case["targets"] == 1:
        rows.append(_least("", "dcp.load's seconds over ours", _ratio(ways, "dcp.load", "ours"), ONE_DCP))
    if {"ours", MANY} <= ways.keys():
        rows.append(_least("", "one worker's seconds over two's", _ratio(ways, "ours", MANY), SHARED))
    if {ONE_CORE, CORE_EACH} <= ways.keys():
        rows.append(_least("", "the same, a core for each worker", _ratio(ways, ONE_CORE, CORE_EACH), SHARED))
    for way in OURS:
        if way in ways:
            rows.append(_most("", f"{way}: peak memory (MiB)", ways[way]["peak (MiB)"], budget + OVER_MIB))
    return rows


def _ratio(ways: Found, one: str, other: str) -> float:
    ratio: float = ways[one]["best (s)"] / ways[other]["best (s)"]
    return ratio


def _most(where: str, claim: str, found: float, bound: float) -> Row:
    row = {"where": where, "bar": claim, "found": found, "bound": f"at most {bound:g}", "": _verdict(found <= bound)}
    return row if where else {key: value for key, value in row.items() if key != "where"}


def _least(where: str, claim: str, found: float, bound: float) -> Row:
    row = _most(where, claim, found, bound)
    return row | {"bound": f"at least {bound:g}", "": _verdict(found >= bound)}


def _verdict(passed: bool) -> str:
    return "pass" if passed else "FAIL"


def report(found: Found) -> str:
    """All figures in Markdown, the bars first."""
    lines = ["# Reconstruction", "", _PREAMBLE, "## Bars", "", *_table(bars(found))]
    for size, section in found["sizes"].items():
        lines += [f"## {size} parameters", "", *_about(section), ""]
        for case in section["cases"]:
            lines += [f"### {case['targets']} targets, cache {case['cache']}", "", _planned(case), ""]
            lines += _table([_row(name, way, case) for name, way in case["ways"].items()])
            lines += [f"- {name}: not measured: {why}." for name, why in case["left out"].items()]
            lines += [""] * bool(case["left out"])
    lines += ["## Cost model", "", _MODEL, "", *_table(_modelled(found))]
    lines += ["For 100e9 parameters in bfloat16 on 64 workers:", "", *_table(_huge(found))]
    if found.get("planned"):
        lines += ["## Planning", "", _about_planned(found["planned"]), ""]
        facts = {k: v for k, v in found["planned"].items() if k != "about"}
        lines += _table([{"what": what, "": value} for what, value in facts.items()])
    return "\n".join(lines)


_PREAMBLE = """\
Every way runs in a fresh process, on one thread. Seconds are counted from when everything is imported; from the start
of a process to its end is told beside them. The best round counts, ways taking turns; `x` is seconds over those of a
bare read of the bytes that the plan needs, into one buffer of 1 MiB. Planning is within ours and not within that.

Bytes are the operating system's own counts: asked for by calls (`rchar`; what is mapped into memory, as `load_file`
does, is in none of them), and moved from and to disks. Errors are |rebuilt - tracked| / |raw weights - tracked|, the
tracked averages having been moved at every step. The classic way and dcp.load sum every snapshot and average, up to 8
targets a pass, with coefficients of the fit to all of them; what they write is not flushed, ours is. What ema-pytorch
rebuilds stays in memory while the clock runs. One worker of ours uses two cores: it reads on one and sums on the other;
so two workers are also compared with one where each is held to a core of its own.
"""
_MODEL = (
    "`seconds = planning + max(read, sum) + write`; reading, summing and writing at the speeds of one worker times "
    "their number. Speeds here: those of the bare read, of the bare write, and of one matrix product."
)


def _about(section: Found) -> list[str]:
    about, recipe = section["about"], section["recipe"]
    widths = ", ".join(map(str, recipe["sigma_rels"]))
    made = (
        f"{recipe['snapshots']} snapshots of the averages {widths} in {recipe['dtype']}, stored by {recipe['ranks']} "
        f"ranks; written in {recipe['written in']}; budget {recipe['budget (MiB)']:.0f} MiB a worker. "
        f"Fit of the classic ways: {recipe['metric']}."
    )
    return [f"`{about['command']}` on {about['machine']}, commit {about['commit']}; load {about['load'][0]:.1f}.", made]


def _planned(case: Found) -> str:
    return (
        f"The plan reads {case['sources']} of {case['stored']} stored averages, {case['planned bytes'] / 1e9:.3g} GB, "
        f"and writes {case['written bytes'] / 1e9:.3g} GB. Largest forecast error {case['worst forecast']:.2g}."
    )


def _row(name: str, way: Found, case: Found) -> Row:
    bare = case["ways"].get("bare read", {}).get("best (s)")
    return {
        "way": name,
        "best (s)": way["best (s)"],
        "median (s)": way["median (s)"],
        "rounds": len(way["seconds"]),
        "x": way["best (s)"] / bare if bare else "-",
        "end to end (s)": way["end to end (s)"],
        "peak (MiB)": round(way["peak (MiB)"]),
        "asked (GB)": way["asked (bytes)"] / 1e9,
        "from disk (GB)": way["from disk (bytes)"] / 1e9,
        "to disk (GB)": way["to disk (bytes)"] / 1e9,
        "worst error": way.get("worst error", "-"),
    }


def _modelled(found: Found) -> list[Row]:
    rows = []
    for size, section in found["sizes"].items():
        for case in section["cases"]:
            ways = case["ways"]
            if not {"plan", "bare read", "bare read and write", "ours"} <= ways.keys():
                continue
            for workers, way in ((1, "ours"), (2, MANY)):
                if way in ways:
                    cost = predicted(workers=workers, **_speeds(case, section["recipe"]))
                    measured = ways[way]["best (s)"]
                    row = {"size": size, "targets": case["targets"], "cache": case["cache"], "workers": workers}
                    rows.append(row | _shown(cost) | {"measured (s)": measured, "ratio": measured / cost.seconds})
    return rows


def _speeds(case: Found, recipe: Found) -> dict[str, Any]:
    """Arguments of the model as the yardsticks of a case tell them."""
    best = {way: figures["best (s)"] for way, figures in case["ways"].items()}
    writing = max(best["bare read and write"] - best["bare read"], 1e-9)
    return {
        "parameters": recipe["parameters"],
        "sources": case["sources"],
        "targets": case["targets"],
        "read_gbps": case["planned bytes"] / 1e9 / best["bare read"],
        "write_gbps": case["written bytes"] / 1e9 / writing,
        "gflops": case["gflops"],
        "stored_bytes": case["planned bytes"] / recipe["parameters"] / case["sources"],
        "written_bytes": case["written bytes"] / recipe["parameters"] / case["targets"],
        "planning_s": best["plan"],
    }


def _huge(found: Found) -> list[Row]:
    """What the model says of a model that nobody here can measure."""
    cases = {case["targets"]: case for section in found["sizes"].values() for case in section["cases"]}
    rows = []
    for case in cases.values():
        for read, write, shared in ((1.0, 0.5, float("inf")), (1.0, 0.5, 10.0)):
            known = {"read_gbps": read, "write_gbps": write, "gflops": case["gflops"]}
            known |= {"shared_read_gbps": shared, "shared_write_gbps": shared}
            cost = predicted(100e9, case["sources"], case["targets"], 64, **known)
            row = {"targets": case["targets"], "sources": case["sources"], "read, a worker (GB/s)": read}
            rows.append(row | {"write (GB/s)": write, "storage at most (GB/s)": shared} | _shown(cost))
    return rows


def _shown(cost: Any) -> Row:
    figures: Row = asdict(cost)
    return {key.replace("_s", " (s)"): figures[key] for key in ("read_s", "sum_s", "write_s")} | {
        "predicted (s)": figures["seconds"]
    }


def _about_planned(planned: Found) -> str:
    about = planned["about"]
    return f"{about['ranks']:,} ranks, {about['tensors']:,} tensors, {about['snapshots']} snapshots of two averages, \
{about['targets']} targets, on {about['machine']}."


def _table(rows: list[Row]) -> list[str]:
    if not rows:
        return ["Nothing was measured.", ""]
    head = list(dict.fromkeys(key for row in rows for key in row))
    shown = [[_text(row.get(key, "-")) for key in head] for row in rows]
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *shown)] + [""]


def _text(cell: Any) -> str:
    return f"{cell:.3g}" if isinstance(cell, float) else f"{cell:,}" if isinstance(cell, int) else str(cell)
