"""The command line's ``import``, and the foreign checkpoints that ``reconstruct --from`` reads where they lie."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

if TYPE_CHECKING:
    from sharded_phema.store import Run

__all__ = ["ForeignFormat", "HowToRead", "add_import", "named"]

_FORMATS = "edm2, ema-pytorch, posthoc-ema, dcp, torchtitan, deepspeed, hf, lightning or torch"
ForeignFormat = Annotated[
    str | None,
    typer.Option(
        "--from",
        metavar="FORMAT",
        help=f"RUN is no run folder but holds checkpoints of this format: {_FORMATS}. They are read where they lie.",
    ),
]
HowToRead = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=VALUE", help="With --from: an option of import, such as profile=0.05 or start=100."),
]


def add_import(app: typer.Typer) -> None:
    """Give the command line its command ``import``."""
    epilog = "Example: sharded-phema import checkpoints --from hf -o run/ema"
    app.command("import", epilog=epilog)(_import)


def named(source: str, format: str | None, words: Sequence[str]) -> str | Run:
    """The run folder that the user named; of foreign checkpoints, a run of which nothing is written. Collective.

    Args:
        source: What the user named.
        format: That of the checkpoints; None for a run folder.
        words: How to read them.

    Raises:
        PhemaError: The checkpoints cannot be read, or a word is given without a format.
    """
    from sharded_phema.errors import OutputError

    if format is None:
        if words:
            raise OutputError("--reading says how --from reads", hint="give --from, or leave --reading out")
        return source
    from sharded_phema.importers import open_foreign
    from sharded_phema.importers.bringing import reading_of

    return open_foreign(source, format=format, reading=reading_of(words), assumed=_say)


def _import(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="Folder of the checkpoints, or one file.")],
    out: Annotated[str, typer.Option("--out", "-o", metavar="RUN", help="Run folder to make: a path or URL.")],
    format: Annotated[
        str, typer.Option("--from", metavar="FORMAT", help=f"{_FORMATS}; told from the names of files without.")
    ] = "",
    profile: Annotated[
        list[str] | None,
        typer.Option(
            help="What the tensors are: checkpoint (the weights themselves), exponential:decay=0.9999, 0.05, "
            "power:gamma=12.86 ...; one for each average, in order, of ema-pytorch and posthoc-ema."
        ),
    ] = None,
    unit: Annotated[str | None, typer.Option(help="What training time counts; steps, or images of edm2.")] = None,
    start: Annotated[float | None, typer.Option(help="Training time of the first weights averaged.")] = None,
    update_every: Annotated[
        float | None, typer.Option(help="Steps between updates of the averages, of ema-pytorch and posthoc-ema.")
    ] = None,
    time_pattern: Annotated[
        str, typer.Option(help="Regular expression whose group is the time in a name; the last integer without.")
    ] = "",
    key: Annotated[str, typer.Option(help="Place of the state dict in a checkpoint, such as model.")] = "",
    prefix: Annotated[str, typer.Option(help="Read tensors whose names begin so, without it, such as net_ema.")] = "",
    copy: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Tensors to copy, not average, such as '*running_*'.")
    ] = None,
    memory: Annotated[str, typer.Option(help="Limit of the tensors held at a time.")] = "1GiB",
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Bring checkpoints or averages of another package into a run folder, as what they really are.

    Nothing in them is executed. Interrupted and called again alike, it goes on where it stopped.
    """
    from sharded_phema.importers.bringing import import_run, reading_of
    from sharded_phema.tables import show_info

    words = {"unit": unit, "start": start, "update-every": update_every, "time-pattern": time_pattern, "key": key}
    words["prefix"] = prefix
    given = [f"{name}={value}" for name, value in words.items() if value not in (None, "")]
    given += [f"profile={text}" for text in profile or []] + [f"copy={text}" for text in copy or []]
    how: dict[str, Any] = {"format": format, "reading": reading_of(given), "memory": memory}
    run = import_run(source, out, progress=_byte_bar, assumed=_say, **how)
    show_info(run, as_json=json)


def _say(sentence: str) -> None:
    from sharded_phema.world import rank_and_size

    if rank_and_size()[0] == 0:
        Console(stderr=True, soft_wrap=True, highlight=False).print(f"[bold]assumed:[/] {escape(sentence)}")


def _byte_bar(sizes: Sequence[float], steps: Iterable[int]) -> Iterator[int]:
    """A bar of the bytes that are stored, on a terminal."""
    columns = (TextColumn("importing"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=sum(sizes))
        for size, step in zip(sizes, steps, strict=True):
            yield step
            progress.advance(task, size)
