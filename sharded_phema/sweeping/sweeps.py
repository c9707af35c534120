"""Sweeps: the user's metric over averages of a run: along a grid, or towards the best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from sharded_phema.scores import Score
from sharded_phema.select import Tolerance
from sharded_phema.store import Run, open_whole
from sharded_phema.sweeping.evaluation import Evaluation, Told
from sharded_phema.sweeping.folders import folder_supply
from sharded_phema.sweeping.ledger import opened_ledger
from sharded_phema.sweeping.live import live_supply
from sharded_phema.sweeping.metric import Metric, measure_of
from sharded_phema.sweeping.ranges import Times, expand_seconds
from sharded_phema.sweeping.route import route_of
from sharded_phema.sweeping.states import state_supply
from sharded_phema.sweeping.supply import Supply
from sharded_phema.sweeping.wish import Form, SweepWish, Towards
from sharded_phema.tally import Better
from sharded_phema.world import agree

__all__ = ["sweep"]


def sweep(
    root: str | Path,
    targets: str | Sequence[str | float],
    metric: Metric,
    *,
    scores: str | Path,
    form: Form | None = None,
    model: Any = None,
    optimizer: Any = None,
    like: str | Path | None = None,
    dtype: str = "float32",
    memory: str | int = "1GiB",
    disk: str | int | None = None,
    scratch: str | Path | None = None,
    tolerance: Tolerance = "auto",
    better: Better = "lower",
    repeats: int = 1,
    times: Times = (),
    groups: Sequence[str] = (),
    base: str | float | None = None,
    second: str | Mapping[str, Sequence[float]] | None = None,
    towards: Towards = "grid",
    evaluations: int = 12,
    progress: Told = lambda done, total: None,
) -> list[Score]:
    """Measure averages of a run by the user's own metric. Collective.

    Averages are rebuilt in batches, each in one pass over the snapshots, and every score is appended to a file at once.
    A sweep that was killed, or is asked for more, repeats nothing that the file holds.

    Under torchrun, processes share the averages of a batch out (``state_dict``: each rebuilds its own; ``folder``: all
    rebuild together) and rank 0 writes the file. A metric of a live ``model`` is called by every process with the same
    average; what rank 0's says counts.

    Args:
        root: Run folder, a path or URL.
        targets: Widths and other targets: ``"0.05,0.10,window:0.2"``, ``"0.02:0.28:0.01"`` in steps, or a list.
        metric: A function, its text ``"package.module:function"`` or ``"file.py:function"``, or a ``Command``. A
            function is given the weights, which it must not change, the second parameter by its name, and those of
            ``target``, ``t`` and ``repeat`` that it has arguments for. It returns a finite number.
        scores: File of scores, one JSON object a line; not in the run folder.
        form: What the metric is given: ``"state_dict"``, whole tensors by name; ``"folder"``, the path of a rebuilt
            model; ``"model"``, the live model. A dictionary for functions, unless said, and a folder for commands.
        model: Live model, sharded or not, as ``load_into`` takes it, for that form. Its own weights are put back.
        optimizer: As ``load_into`` takes it.
        like: For folders: a Hugging Face model, whose configuration is copied beside.
        dtype: For folders: "float32", "bfloat16" or "float16".
        memory: Limit of one process for rebuilding, and for its dictionaries.
        disk: Limit of the folders that are there at once; half of what is free, unless given.
        scratch: Folder for them, which all processes see; beside the scores, unless given.
        tolerance: As ``reconstruct`` takes it.
        better: ``"lower"`` or ``"higher"`` scores are better, which only searches ask.
        repeats: How often each average is measured, for noisy metrics.
        times: Training times at which all targets are read: a list, ``"all"`` snapshots, or ``"count=8"``.
        groups: Patterns of parameter names. Each one's parameters alone have the targets, all others the base.
        base: Target of the others.
        second: A second parameter of the metric and its values: ``{"guidance": [1.0, 2.0]}``.
        towards: ``"grid"`` measures all targets; ``"best"`` searches the best width between the least and the
            largest one, for each time, group and second value; ``"per-tensor"``, experimental, searches one width for
            each of the groups, starting from the base.
        evaluations: Averages that one search may try, each ``repeats`` times.
        progress: Is told by rank 0 how many evaluations are done and how many there are.

    Returns:
        Scores of all that was asked for, measured now or before.

    Raises:
        PhemaError: Something will not do, the metric gave no score, or the file is of another run or metric.
        Exception: What the metric raises passes through, on the process where it was raised.
    """
    options: dict[str, Any] = {"form": form, "like": like, "dtype": dtype, "memory": memory, "disk": disk}
    options |= {"towards": towards, "evaluations": evaluations, "better": better, "repeats": repeats}
    wish = SweepWish(
        metric=metric, has_model=model is not None, groups=tuple(groups), has_base=base is not None, **options
    )
    path = wish.checked(Path(scores), root)
    seconds = expand_seconds(second)
    measure = agree(lambda: measure_of(metric, second=seconds[0].name if seconds[0] else ""))
    run = agree(lambda: open_whole(root))
    how: Any = {"towards": towards, "evaluations": evaluations, "better": better}
    route = agree(lambda: route_of(run, targets, times, groups, base, seconds, **how))
    folder = Path(scratch or f"{path}.work")
    with (
        opened_ledger(path, run.record, measure.name) as ledger,
        _supply(wish, run, root, folder, model, optimizer, tolerance) as supply,
    ):
        expected = route.size * repeats
        evaluation = Evaluation(measure, supply, ledger, repeats=repeats, told=progress, expected=expected)
        route.go(evaluation)
        return evaluation.scores


def _supply(
    wish: SweepWish, run: Run, root: str | Path, scratch: Path, model: Any, optimizer: Any, tolerance: Tolerance
) -> AbstractContextManager[Supply]:
    if wish.kind == "model":
        return live_supply(root, model, optimizer, tolerance)
    if wish.kind == "state_dict":
        return state_supply(run, wish.memory_bytes, tolerance)
    settings = {"memory": wish.memory, "dtype": wish.dtype, "like": wish.like, "tolerance": tolerance}
    return folder_supply(run, root, scratch, wish.disk_bytes, settings)
