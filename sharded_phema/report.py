"""Report: what a sweep found as one HTML file that needs nothing else, fit to be opened from a mail."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

from sharded_phema import __version__
from sharded_phema.errors import ModelMismatch, OutputError
from sharded_phema.figures import coefficients, forecast, profiles, svg_bytes, sweep, timeline
from sharded_phema.figures.sweep import kinds_in
from sharded_phema.spelling import spelled
from sharded_phema.store import Run, open_run
from sharded_phema.tally import Entry, Tally
from sharded_phema.winner import rebuild_lines, targets_of

__all__ = ["report_html", "write_report"]

_CAPTIONS = {
    "length": "Quality against averaging length at the last training time. Points are means of repeated evaluations, "
    "bands and bars go from the least to the most.",
    "group": "One group of parameters at a time: its averaging length varies, all other parameters keep the base.",
    "time": "Quality against averaging length at several training times, and the best length over training.",
    "grid": "Averaging length against a second parameter. The line joins the best length of each of its values.",
}
# No script, no request: even a reader who trusts the file is asked for nothing but what lies in it.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 62rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin-top: 2.5rem; }
figure { margin: 1.5rem 0; }
img { width: 100%; height: auto; }
figcaption, footer { color: #555; font-size: 0.9rem; }
pre { background: #f4f4f4; padding: 0.8rem 1rem; overflow-x: auto; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.9rem; }
th, td { padding: 0.25rem 0.8rem; border-bottom: 1px solid #ddd; text-align: right; }
th.text, td.text { text-align: left; overflow-wrap: anywhere; }
tr.best { background: #fdf0e4; font-weight: 600; }
"""


def write_report(tally: Tally, out: Path, *, root: str | Path | None = None) -> None:
    """Write a sweep's figures, its table, and how to rebuild its best average, into one HTML file.

    Args:
        tally: What the sweep found.
        out: The file; one that is there is replaced.
        root: The run folder, to show also how the best is made up of what is stored.

    Raises:
        OutputError: matplotlib is missing, or ``out`` is no HTML file or cannot be written.
        ModelMismatch: The scores are those of another run.
        StoreError: There is no run.
        PhemaError: The run cannot rebuild the best any more.
    """
    if out.suffix.lower() not in (".html", ".htm"):
        raise OutputError(f"{out}: expected a name that ends in .html", hint="try --out report.html")
    page = report_html(tally, root)
    try:
        out.write_bytes(page.encode("utf-8", "replace"))
    except OSError as error:
        raise OutputError(f"{out} cannot be written: {error}", hint="check the folder and its permissions") from error


def report_html(tally: Tally, root: str | Path | None = None) -> str:
    """The page; arguments and errors are those of ``write_report``."""
    run = None if root is None else _opened(root, tally)
    drawn = [(f"quality: {kind}", _CAPTIONS[kind], sweep(tally, kind)) for kind in kinds_in(tally)]
    made = [] if run is None else list(_figures_of(run, tally.best))
    parts = [
        f"<h1>Averaging length and {escape(tally.metric)}</h1>",
        f"<p>{escape(_summary(tally))}</p>",
        "<h2>Rebuild the best</h2>",
        f"<pre>{escape(chr(10).join(rebuild_lines(tally.best, 'RUN' if root is None else str(root))))}</pre>",
        *(["<p>RUN stands for the run folder.</p>"] if root is None else []),
        "<h2>Quality</h2>",
        *(_figure(*one) for one in drawn),
        *(["<h2>How the best is rebuilt</h2>", *(_figure(*one) for one in made)] if made else []),
        "<h2>All scores, best first</h2>",
        _table(tally),
        f"<footer>sharded_phema {__version__}, run {escape(tally.run)}</footer>",
    ]
    head = f'<meta charset="utf-8">\n<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
    head += '<meta name="viewport" content="width=device-width">\n'
    head += f"<title>{escape(tally.metric)}</title>\n<style>{_STYLE}</style>"
    body = "\n".join(parts)
    return f'<!doctype html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{body}\n</body>\n</html>\n'


def _opened(root: str | Path, tally: Tally) -> Run:
    run = open_run(root)
    if run.record.run != tally.run:
        raise ModelMismatch(
            f"the scores are of run {tally.run}, and {run.root.url} holds run {run.record.run}",
            hint="give the run folder that was swept, or leave --run out",
        )
    return run


def _figures_of(run: Run, best: Entry) -> Iterator[tuple[str, str, Any]]:
    targets = targets_of(best)
    yield (
        "profiles",
        "How much each moment of training counts, in what is stored and in the best.",
        profiles(run, targets),
    )
    yield "coefficients", "Which stored averages make up the best, and their weights.", coefficients(run, targets)
    text = "What error to expect of each width; stored widths have none but rounding."
    yield "forecast", text, forecast(run, [best.first.t])
    yield "timeline", "What the run folder holds.", timeline(run)


def _figure(name: str, caption: str, drawn: Any) -> str:
    # As an image, a picture can neither run anything nor clash with the names inside another picture.
    data = base64.b64encode(svg_bytes(drawn)).decode()
    image = f'<img alt="{escape(name)}" src="data:image/svg+xml;base64,{data}">'
    return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"


def _summary(tally: Tally) -> str:
    count = sum(len(entry.values) for entry in tally.entries)
    best = tally.best
    others = f", the others as {best.first.base}" if best.first.base else ""
    second = f" with {best.first.second.name} {best.first.second.value:g}" if best.first.second else ""
    return (
        f"{count} evaluations of {len(tally.entries)} averages; {tally.better} is better. "
        f"Best: {best.first.target}{_inside(best)}{others}{second}, at {spelled(best.first.t)} {tally.unit}, "
        f"scored {_span(best)}."
    )


def _inside(entry: Entry) -> str:
    return "" if entry.first.group is None else f" in {entry.first.group}"


def _span(entry: Entry) -> str:
    if len(entry.values) == 1:
        return f"{entry.mean:.5g}"
    return f"{entry.mean:.5g} ({entry.least:.5g} to {entry.most:.5g} in {len(entry.values)} evaluations)"


def _table(tally: Tally) -> str:
    second = tally.seconds[0].name if tally.seconds else ""
    columns = ["target", *(["group", "others"] if tally.groups else []), *([second] if second else [])]
    columns += [tally.unit, "score", "least", "most", "evaluations", "forecast error"]
    texts = 3 if tally.groups else 1
    ordered = sorted(tally.entries, key=lambda entry: entry.mean, reverse=tally.better == "higher")
    rows = [_row(columns, texts, "th")]
    for entry in ordered:
        first = entry.first
        cells = [first.target, *([first.group or "", first.base or ""] if tally.groups else [])]
        cells += [f"{first.second.value:g}" if first.second else ""] * bool(second)
        cells += [spelled(first.t), *(f"{x:.5g}" for x in (entry.mean, entry.least, entry.most))]
        cells += [str(len(entry.values)), f"{first.forecast:.1e}"]
        rows.append(_row(cells, texts, "td", best=entry is tally.best))
    return '<div class="wide"><table>\n' + "\n".join(rows) + "\n</table></div>"


def _row(cells: Sequence[str], texts: int, kind: str, *, best: bool = False) -> str:
    classes = [' class="text"' if k < texts else "" for k in range(len(cells))]
    inner = [f"<{kind}{how}>{escape(cell)}</{kind}>" for cell, how in zip(cells, classes, strict=True)]
    return f"<tr{' class=best' * best}>{''.join(inner)}</tr>"
