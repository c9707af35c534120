"""``sharded-phema plot``: profiles, forecast, coefficients, timeline, sweep, report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

__all__ = ["plots"]

plots = typer.Typer(no_args_is_help=True, help="Draw what a run holds and can rebuild, and what a sweep found.")

RunFolder = Annotated[str, typer.Argument(metavar="RUN", help="Run folder that PostHocEMA wrote: a path or URL.")]
Targets = Annotated[list[str], typer.Argument(metavar="TARGET...", help="What to rebuild, such as 0.12 or window:0.2.")]
Scores = Annotated[Path, typer.Argument(metavar="SCORES.jsonl", help="File of scores that a sweep wrote.")]
Picture = Annotated[Path, typer.Option("--out", help="PNG, PDF or SVG file to draw.")]
Better = Annotated[Literal["lower", "higher"], typer.Option(help="Which scores are better.")]


@plots.command("profiles", epilog="Example: sharded-phema plot profiles run/ema 0.12 window:0.2 --out profiles.png")
def plot_profiles(run: RunFolder, targets: Targets, out: Picture) -> None:
    """How much each moment of training counts: the stored averages, and targets rebuilt from them."""
    from sharded_phema.plot import draw_profiles
    from sharded_phema.store import open_run
    from sharded_phema.target import parse_targets

    draw_profiles(open_run(run), parse_targets(targets), out)


@plots.command("forecast", epilog="Example: sharded-phema plot forecast run/ema --tolerance 1e-2 --out forecast.png")
def plot_forecast(
    run: RunFolder,
    out: Picture,
    time: Annotated[
        list[float] | None, typer.Option(help="Training time to rebuild at; several draw several curves.")
    ] = None,
    tolerance: Annotated[float | None, typer.Option(help="Error to mark, and the widths that stay below it.")] = None,
) -> None:
    """Forecast error of every width that could be rebuilt."""
    from sharded_phema.plot import draw_forecast
    from sharded_phema.store import open_run

    draw_forecast(open_run(run), out, time or (), tolerance)


@plots.command(
    "coefficients", epilog="Example: sharded-phema plot coefficients run/ema 0.12 window:0.2 --out coefficients.png"
)
def plot_coefficients(
    run: RunFolder,
    targets: Targets,
    out: Picture,
    tolerance: Annotated[str, typer.Option(help="As of reconstruct: auto, exact or a number.")] = "auto",
) -> None:
    """Which snapshots each target is rebuilt from, and with which weights."""
    from sharded_phema.plot import draw_coefficients
    from sharded_phema.store import open_run
    from sharded_phema.target import parse_targets

    draw_coefficients(open_run(run), parse_targets(targets), out, _tolerance(tolerance))


@plots.command("timeline", epilog="Example: sharded-phema plot timeline run/ema --out timeline.png")
def plot_timeline(run: RunFolder, out: Picture) -> None:
    """Sessions, snapshots that are used, abandoned or damaged, their sizes, and how far the averages lie apart."""
    from sharded_phema.plot import draw_timeline
    from sharded_phema.store import open_run

    draw_timeline(open_run(run), out)


@plots.command("sweep", epilog="Example: sharded-phema plot sweep scores.jsonl --out sweep.png")
def plot_sweep(
    scores: Scores,
    out: Picture,
    kind: Annotated[
        Literal["auto", "length", "group", "time", "grid"],
        typer.Option(
            help="length: score over width; group: of parts of the model; time: over training; "
            "grid: beside a second parameter; auto: the first of group, grid, time, length that there are scores for."
        ),
    ] = "auto",
    better: Better = "lower",
) -> None:
    """Quality against averaging length, the best marked."""
    from sharded_phema.plot import draw_sweep
    from sharded_phema.scores import read_scores
    from sharded_phema.tally import tally

    draw_sweep(tally(read_scores(scores), better=better), out, kind)


@plots.command("report", epilog="Example: sharded-phema plot report scores.jsonl --run run/ema --out report.html")
def plot_report(
    scores: Scores,
    out: Annotated[Path, typer.Option("--out", help="HTML file to write.")],
    run: Annotated[
        str | None, typer.Option(metavar="RUN", help="The run folder, to show also how the best is rebuilt.")
    ] = None,
    better: Better = "lower",
) -> None:
    """One HTML file that needs nothing else: figures, all scores, and how to rebuild the best."""
    from sharded_phema.report import write_report
    from sharded_phema.scores import read_scores
    from sharded_phema.tally import tally

    write_report(tally(read_scores(scores), better=better), out, root=run)


def _tolerance(text: str) -> Any:
    try:
        return text if text in ("auto", "exact") else float(text)
    except ValueError:
        raise typer.BadParameter(f"expected auto, exact or a number, found {text}", param_hint="--tolerance") from None
