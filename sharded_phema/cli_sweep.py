"""The command line of sweeps: ``sharded-phema sweep``, alone or under torchrun."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from sharded_phema.errors import OrderError

__all__ = ["EXAMPLE", "sweep"]

EXAMPLE = "Example: sharded-phema sweep run/ema --targets 0.02:0.28:0.01 --metric my_package.scores:fid"


def sweep(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Run folder that PostHocEMA wrote: a path or URL.")],
    targets: Annotated[
        str, typer.Option(help="Widths and other targets: 0.05,0.10,window:0.2; LOW:HIGH:STEP; LOW:HIGH to search.")
    ] = "0.02:0.28:0.02",
    metric: Annotated[
        str | None, typer.Option(help="Function that scores weights, PACKAGE.MODULE:FUNCTION or FILE.py:FUNCTION.")
    ] = None,
    command: Annotated[
        str | None,
        typer.Option(
            help="Or a command, such as 'python eval.py {dir}', whose last line is the score; also {target}, {t}, "
            "{value}, {repeat}, {rank}."
        ),
    ] = None,
    scores: Annotated[Path, typer.Option(help="File of scores, by which a sweep goes on.")] = Path("scores.jsonl"),
    form: Annotated[
        Literal["state_dict", "folder"] | None,
        typer.Option(help="What the function is given; a dictionary, unless said."),
    ] = None,
    like: Annotated[
        Path | None, typer.Option(help="Folder of a Hugging Face model, whose configuration is copied beside folders.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of folders: float32, bfloat16 or float16.")] = "float32",
    memory: Annotated[str, typer.Option(help="Limit of one process, rebuilt dictionaries included.")] = "1GiB",
    disk: Annotated[str | None, typer.Option(help="Limit of rebuilt folders at a time; half of what is free.")] = None,
    scratch: Annotated[
        Path | None, typer.Option(help="Where rebuilt folders lie meanwhile; beside the scores.")
    ] = None,
    tolerance: Annotated[str, typer.Option(help="Largest forecast error, auto or exact, as for reconstruct.")] = "auto",
    better: Annotated[Literal["lower", "higher"], typer.Option(help="Which scores are better.")] = "lower",
    repeats: Annotated[int, typer.Option(help="How often each average is measured, for noisy metrics.")] = 1,
    times: Annotated[
        str, typer.Option(help="Training times to read all targets at: 50000,100000, all, or count=8 snapshots.")
    ] = "",
    group: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Parameters that alone have the targets, all others --base; repeatable."),
    ] = None,
    base: Annotated[str | None, typer.Option(help="Target of the parameters outside the group.")] = None,
    second: Annotated[
        str | None, typer.Option(metavar="NAME=VALUES", help="Second parameter of the metric: guidance=1.0,1.5,2.0.")
    ] = None,
    search: Annotated[bool, typer.Option("--search", help="Search the best width between the targets.")] = False,
    per_tensor_search: Annotated[
        bool, typer.Option("--per-tensor-search", help="Experimental: search a width for each --group.")
    ] = False,
    evaluations: Annotated[int, typer.Option(help="Averages that a search may try.")] = 12,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Measure averages of a run by your own metric, and say which is best.

    Killed and called again alike, it goes on where it stopped; nothing is measured twice.
    """
    from sharded_phema.sweep_tables import show_sweep
    from sharded_phema.sweeping import sweep as measure
    from sharded_phema.tally import tally
    from sharded_phema.winner import rebuild_lines
    from sharded_phema.world import launched, rank_and_size

    wish: dict[str, Any] = {"form": form, "like": like, "dtype": dtype, "memory": memory, "disk": disk}
    wish |= {"scratch": scratch, "tolerance": _tolerance(tolerance), "better": better, "repeats": repeats}
    wish |= {"times": times, "groups": group or [], "base": base, "second": second, "evaluations": evaluations}
    wish |= {"towards": _towards(search, per_tensor_search, len(group or []), evaluations)}
    with launched(), _bar() as progress:
        found = measure(run, targets, _metric(metric, command), scores=scores, progress=progress, **wish)
        if rank_and_size()[0] == 0:
            put_together = tally(found, better=better)
            lines = [*rebuild_lines(put_together.best, run)]
            lines[-1] += _as_measured(like=like, dtype=dtype, tolerance=tolerance)
            show_sweep(put_together, lines, open_ends=not per_tensor_search, as_json=json)


def _as_measured(*, like: Path | None, dtype: str, tolerance: str) -> str:
    """More words of a command line that rebuilds what was measured."""
    words = ["--like", str(like)] if like else []
    words += ["--dtype", dtype] if dtype != "float32" else []
    words += ["--tolerance", tolerance] if tolerance != "auto" else []
    return "".join(f" {shlex.quote(word)}" for word in words)


def _metric(metric: str | None, command: str | None) -> Any:
    from sharded_phema.sweeping import Command

    if (metric is None) == (command is None):
        raise OrderError(
            f"a sweep takes one metric or command, found {'none' if metric is None else 'both'}",
            hint="for example --metric my_package.scores:fid, or --command 'python eval.py {dir}'",
        )
    return metric if command is None else Command(command)


def _towards(search: bool, per_tensor: bool, groups: int, evaluations: int) -> str:
    """Where to; a search over groups says first what it costs."""
    from sharded_phema.sweeping import descent_cost
    from sharded_phema.world import launch_rank

    if not per_tensor:
        return "best" if search else "grid"
    if launch_rank() == 0:
        rounds = (evaluations - 1) / descent_cost(max(groups, 1))
        print(
            f"experimental: {groups} groups take up to {descent_cost(groups)} evaluations a round after the first; "
            f"it stops at {evaluations}, which is {rounds:.1f} rounds for each time and second value",
            file=sys.stderr,
        )
    return "per-tensor"


def _tolerance(text: str) -> Any:
    try:
        return text if text in ("auto", "exact") else float(text)
    except ValueError:
        raise typer.BadParameter(f"expected auto, exact or a number, found {text}", param_hint="--tolerance") from None


@contextmanager
def _bar() -> Iterator[Callable[[int, int], object]]:
    """A bar of the evaluations, on the terminal of the first process and nowhere else."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from sharded_phema.world import launch_rank

    columns = (TextColumn("measuring"), BarColumn(), MofNCompleteColumn(), TextColumn("scores"), TimeRemainingColumn())
    console = Console(stderr=True)
    hidden = not console.is_terminal or launch_rank() != 0
    with Progress(*columns, console=console, disable=hidden, transient=True) as progress:
        task = progress.add_task("", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
