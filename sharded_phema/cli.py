"""The command line: ``sharded-phema plan | info | reconstruct | sweep | plot``, alone or under torchrun."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from sharded_phema import __version__, cli_sweep
from sharded_phema.cli_import import ForeignFormat, HowToRead, add_import, named
from sharded_phema.cli_plot import plots
from sharded_phema.errors import PhemaError

__all__ = ["app", "main"]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Post-hoc averaging of model weights for sharded training.",
    epilog="Targets: 0.12 (sigma_rel), power:gamma=5, exponential:tau=2000, window:0.2, decay:linear:0.2, "
    "each with an optional @t=TIME.",
)

RunFolder = Annotated[str, typer.Argument(metavar="RUN", help="Run folder that PostHocEMA wrote: a path or URL.")]
Rebuilt = Annotated[
    list[str] | None, typer.Argument(metavar="[TARGET...]", help="What to rebuild, such as 0.12 or window:0.2.")
]
Kept = Annotated[
    list[str] | None, typer.Argument(metavar="[TARGET...]", help="What will be wanted; without any, no snapshot goes.")
]
Metric = Literal["trajectory", "density", "paper"]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]

Tolerance = Annotated[
    str,
    typer.Option(
        help="Largest forecast error to accept, relative to |raw - target|; as few averages are read as reach it. "
        "auto: about 1e-3, never refused; exact: read all."
    ),
]
PerTensor = Annotated[
    list[Path] | None,
    typer.Option(metavar="FILE", help='JSON of targets by parameter, such as {"*.attn.*": 0.05, "*": "0.12"}.'),
]
Version = Annotated[bool, typer.Option("--version", help="Print the version.")]

_WIDTHS = ["0.03", "0.05", "0.07", "0.10", "0.15", "0.20", "0.25", "decay:linear:0.2", "decay:cosine:0.2"]


@app.callback(invoke_without_command=True)
def _options(version: Version = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@app.command(epilog="Example: sharded-phema plan 0.03:0.25 decay:linear:0.2 --tolerance 1e-2 --parameters 1.5e9")
def plan(
    targets: Annotated[
        list[str] | None, typer.Argument(metavar="[TARGET...]", help="What will be wanted; 0.03:0.25 is a range.")
    ] = None,
    snapshots: Annotated[str, typer.Option(help="Numbers of snapshots to compare.")] = "8,16,32,64",
    sigma_rels: Annotated[str, typer.Option(help="Widths that training tracks.")] = "0.05,0.10",
    length: Annotated[float, typer.Option(help="Length of the run, in its unit of training time.")] = 100_000,
    parameters: Annotated[float, typer.Option(help="Parameters of the model.")] = 1e9,
    tolerance: Annotated[
        float | None, typer.Option(help="Recommend what to track, and in which dtype, so that no error is larger.")
    ] = None,
    stillness: Annotated[float, typer.Option(help="|weights|^2 over the squared distance they walk in the run.")] = 10,
    json: Json = False,
) -> None:
    """Before training: what n snapshots of which widths will rebuild, the disk they take, and what to choose."""
    from sharded_phema.forecast import outlook
    from sharded_phema.recommend import Request, recommend, spread_widths
    from sharded_phema.tables import show_outlooks
    from sharded_phema.target import parse_targets

    wanted = parse_targets(text for target in targets or _WIDTHS for text in spread_widths(target))
    tracked, counts = parse_targets(sigma_rels.split(",")), _counts(snapshots)
    outlooks = [outlook(tracked, wanted, n, length=length, parameters=parameters) for n in counts]
    wish = [] if tolerance is None else [Request(wanted, length, parameters, tolerance, stillness)]
    show_outlooks(outlooks, wanted, [plan for request in wish for plan in recommend(request)], as_json=json)


@app.command(epilog="Example: sharded-phema info run/ema")
def info(run: RunFolder, json: Json = False) -> None:
    """What a run folder holds: averages, snapshots, sizes."""
    from sharded_phema.store import open_run
    from sharded_phema.tables import show_info

    show_info(open_run(run), as_json=json)


@app.command(
    epilog="Example: torchrun --nproc-per-node 8 -m sharded_phema reconstruct run/ema 0.12 decay:linear:0.2 --out out"
)
def reconstruct(
    run: RunFolder,
    out: Annotated[str, typer.Option(help="Folder to make; one subfolder per target.")],
    targets: Rebuilt = None,
    per_tensor: PerTensor = None,
    format: Annotated[
        Literal["safetensors", "dcp"], typer.Option(help="dcp: a checkpoint of torch.distributed.checkpoint.")
    ] = "safetensors",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    max_shard_size: Annotated[str, typer.Option(help="Limit of one file of safetensors; none: one file.")] = "5GB",
    like: Annotated[
        Path | None, typer.Option(help="Folder of a Hugging Face model, whose configuration is copied beside.")
    ] = None,
    tolerance: Tolerance = "auto",
    metric: Annotated[Metric, typer.Option(help="trajectory, density, or paper for its own procedure.")] = "trajectory",
    movement: Annotated[
        Literal["auto", "measured", "constant"],
        typer.Option(help="How fast weights moved when; auto: constant unless they all but stopped."),
    ] = "auto",
    memory: Annotated[str, typer.Option(help="Limit of the buffers of one worker.")] = "1GiB",
    precision: Annotated[Literal["float32", "float64"], typer.Option(help="What sums are made in.")] = "float32",
    device: Annotated[str, typer.Option(help="Where sums are made, such as cuda.")] = "cpu",
    worker: Annotated[
        int | None, typer.Option(help="Number of this process, from 0, of --workers started apart.")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="How many processes started apart share the work.")] = None,
    leave_out: Annotated[
        list[str] | None, typer.Option(metavar="SNAPSHOT", help="Folder of a snapshot to do without.")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Refuse instead of leaving damaged snapshots out.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace an earlier output, or another unfinished one.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be read and written, and stop.")] = False,
    source_format: ForeignFormat = None,
    reading: HowToRead = None,
    json: Json = False,
) -> None:
    """Rebuild averages of any length from stored snapshots; with several workers, each its own part.

    Killed and called again alike, it goes on where it stopped.
    """
    from sharded_phema.per_tensor import read_patterns
    from sharded_phema.rebuild import preview
    from sharded_phema.rebuild import reconstruct as rebuild
    from sharded_phema.tables import show_prepared, show_rebuilt
    from sharded_phema.world import launched, rank_and_size

    wish: dict[str, Any] = {"out": out, "format": format, "dtype": dtype, "max_shard_size": max_shard_size}
    wish |= {"like": like, "tolerance": _tolerance(tolerance), "metric": metric, "movement": movement}
    wish |= {"memory": memory, "precision": precision, "device": device, "leave_out": leave_out or []}
    wish |= {"strict": strict, "force": force}
    wanted: list[Any] = [*(targets or []), *(read_patterns(path) for path in per_tensor or [])]
    with launched():
        source = named(run, source_format, reading or [])
        if dry_run:
            prepared = preview(source, wanted, workers=workers, **wish)
            if rank_and_size()[0] == 0:
                show_prepared(prepared, as_json=json)
            return
        done = rebuild(source, wanted, worker=worker, workers=workers, progress=_byte_bar, **wish)
        if rank_and_size()[0] == 0:
            show_rebuilt(done, out, as_json=json)


@app.command(epilog="Example: sharded-phema prune run/ema 0.03:0.25 decay:linear:0.2 --tolerance 1e-2")
def prune(
    run: RunFolder,
    targets: Kept = None,
    tolerance: Annotated[float | None, typer.Option(help="Largest forecast error that a target may have then.")] = None,
    count: Annotated[int | None, typer.Option(help="Snapshots to keep.")] = None,
    size: Annotated[str | None, typer.Option("--bytes", help="Disk to keep, such as 10GB.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Remove it. Nothing is removed without.")] = False,
    json: Json = False,
) -> None:
    """After training: which snapshots the targets can do without, and what was left behind; with --yes, remove both."""
    from sharded_phema.pruning import plan_pruning
    from sharded_phema.pruning import prune as remove
    from sharded_phema.tables import show_pruning

    limits = {"tolerance": tolerance, "count": count, "bytes": size}
    plan = plan_pruning(run, targets or [], [f"{name}={value}" for name, value in limits.items() if value is not None])
    if yes:
        remove(plan)
    show_pruning(plan, removed=yes, as_json=json)


@app.command(epilog="Example: sharded-phema verify run/ema")
def verify(run: RunFolder, json: Json = False) -> None:
    """Read every file of a run, and say what is not as it was written; exit code 1 if anything is."""
    from sharded_phema.tables import show_report
    from sharded_phema.verify import verify as verified

    report = verified(run, progress=partial(_bar, doing="verifying", what="files"))
    show_report(report, as_json=json)
    if not report.intact:
        raise typer.Exit(1)


app.command(epilog=cli_sweep.EXAMPLE)(cli_sweep.sweep)
add_import(app)
app.add_typer(plots, name="plot")


def main() -> None:
    """Run the command line. Exit code 0: done, 1: an error that the caller can mend, 2: usage."""
    # Read when numpy is loaded, by the commands: many small solves are faster without threads that wait for each other.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    try:
        app(prog_name="sharded-phema")
    except PhemaError as error:
        from sharded_phema.world import launch_rank

        if launch_rank() == 0:
            console = Console(stderr=True, soft_wrap=True, highlight=False)
            console.print(f"[bold red]error:[/] {escape(error.message)}\n[bold]hint:[/] {escape(error.hint)}")
        sys.exit(1)


def _counts(text: str) -> list[int]:
    try:
        return [int(count) for count in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"expected numbers such as 8,16,32, found {text}", param_hint="--snapshots") from None


def _tolerance(text: str) -> Any:
    try:
        return text if text in ("auto", "exact") else float(text)
    except ValueError:
        raise typer.BadParameter(f"expected auto, exact or a number, found {text}", param_hint="--tolerance") from None


def _bar(steps: Iterable[Any], doing: str, what: str) -> Iterator[Any]:
    columns = (TextColumn(doing), BarColumn(), MofNCompleteColumn(), TextColumn(what), TimeRemainingColumn())
    with _progress(*columns) as progress:
        yield from progress.track(steps)


def _byte_bar(sizes: Sequence[float], steps: Iterable[Any]) -> Iterator[Any]:
    """A bar of the bytes that are read and written, with their rate."""
    columns = (TextColumn("rebuilding"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with _progress(*columns) as progress:
        task = progress.add_task("", total=sum(sizes))
        for size, step in zip(sizes, steps, strict=True):
            progress.advance(task, size)
            yield step


def _progress(*columns: ProgressColumn) -> Progress:
    """On the terminal of the first process, and nowhere else."""
    from sharded_phema.world import rank_and_size

    console = Console(stderr=True)
    return Progress(*columns, console=console, disable=not console.is_terminal or rank_and_size()[0] != 0)
