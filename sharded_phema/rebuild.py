"""Reconstruction: any average from the stored ones, each process its own blocks, in one pass over the snapshots."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from sharded_phema.errors import OutputError
from sharded_phema.export import Place, TensorFiles, byte_count, staged, tensor_files
from sharded_phema.export_dcp import DRAFTS, convert
from sharded_phema.fit import Metric
from sharded_phema.losses import Losses, leaving_out
from sharded_phema.per_tensor import Wanted, parse_outputs
from sharded_phema.recipe import Plan, plan_rebuild, recipe_text
from sharded_phema.select import Tolerance
from sharded_phema.source import MovementWish, Source
from sharded_phema.store import Run, open_run
from sharded_phema.sums import BLOCK, Sums, one_thread
from sharded_phema.world import agree, from_first, rank_and_size

__all__ = ["Blocks", "reconstruct"]

FORMATS = ("safetensors", "dcp")

WHOLE = 1 << 62
"""Limit of a file that may have any length."""

T = TypeVar("T")


class Blocks(Iterable[None]):
    """The blocks of one process; iterating rebuilds and writes one after another.

    The grid of blocks starts at each parameter and does not depend on the number of processes, so that the result
    does not either.
    """

    def __init__(self, plan: Plan, files: TensorFiles, folders: Sequence[Path], losses: Losses | None = None) -> None:
        self._plan, self._files, self._folders, self._losses = plan, files, folders, losses or Losses()
        self._record = plan.run.record
        shapes = [p.shape for p in self._record.parameters] + [r.shape for r in self._record.raw]
        sizes = [math.prod(shape) for shape in shapes]
        grid = [(p, i, min(i + BLOCK, size)) for p, size in enumerate(sizes) for i in range(0, size, BLOCK)]
        rank, ranks = rank_and_size()
        self._mine = grid[len(grid) * rank // ranks : len(grid) * (rank + 1) // ranks]

    def __len__(self) -> int:
        return len(self._mine)

    def __iter__(self) -> Iterator[None]:
        rebuilt, averaged = Sums(self._plan), len(self._record.parameters)
        for tensor, start, stop in self._mine:
            place = self._files.places[tensor]
            if tensor < averaged:
                self._rebuild(rebuilt, tensor, place, start, stop)
            else:
                self._carry_over(tensor - averaged, place, start, stop)
            yield

    def _rebuild(self, rebuilt: Sums, parameter: int, place: Place, start: int, stop: int) -> None:
        choice = [output.choice[parameter] for output in self._plan.outputs]
        targets = sorted(set(choice))
        values = rebuilt(targets, stop - start, partial(_read, self._losses, parameter, start))
        for folder, target in zip(self._folders, choice, strict=True):
            self._files.write(folder, self._record.parameters[parameter], place, start, values[targets.index(target)])

    def _carry_over(self, index: int, place: Place, start: int, stop: int) -> None:
        """Write what was stored as it is, as of the time of each output; each snapshot is read once."""
        folders: dict[int, list[Path]] = {}
        for folder, output in zip(self._folders, self._plan.outputs, strict=True):
            folders.setdefault(self._plan.snapshot_of(output), []).append(folder)
        for number, several in folders.items():
            snapshot = self._plan.run.snapshots[number]
            # Frozen tensors are no snapshot's own: without them, no other snapshot would do either.
            copied = index < len(self._record.copied)
            with self._losses.reading(snapshot) if copied else nullcontext():
                values = snapshot.read_raw(index, start, stop)
            for folder in several:
                self._files.write_raw(folder, self._record.raw[index], place, start, values)


def _read(losses: Losses, parameter: int, start: int, source: Source, out: NDArray[np.float32]) -> None:
    with losses.reading(source.snapshot):
        source.snapshot.fill_flat(source.average, parameter, start, out)


def _opened(root: str | Path) -> Run:
    run = open_run(root)
    run.check_frozen()
    return run


def reconstruct(
    root: str | Path,
    targets: Sequence[Wanted] | Mapping[str, str | float],
    *,
    out: str | Path,
    format: str = "safetensors",
    dtype: str = "float32",
    max_shard_size: str | int = "5GB",
    tolerance: Tolerance = "auto",
    metric: Metric = "trajectory",
    movement: MovementWish = "auto",
    progress: Callable[[Iterable[T]], Iterable[T]] = iter,
) -> Plan:
    """Rebuild averages from a run's snapshots and write them, one folder a target.

    Under torchrun every process rebuilds and writes its own part; the files have the
    same bytes for any number of processes. Nothing appears at ``out`` unless all of it does.

    A folder holds the whole model: beside the averages what was copied into snapshots or stored once, as of the last
    snapshot at or before the target's time (the latest, where its tensors have several).

    Damaged snapshots are left out, also those whose damage shows only as they are read: then everything is planned
    and written anew without them. The plan says which, and what that costs. What is damaged of tensors that
    are stored once, for all snapshots, is an error.

    Args:
        root: Run folder.
        targets: Targets such as ``0.12``, ``"power:gamma=5"``, ``"window:0.2"``, ``"decay:linear:0.2"``. A mapping of
            patterns of parameter names to targets, such as ``{"*.attn.*": 0.05, "*": 0.12}``, is one target whose
            tensors are rebuilt differently, alone or in the list; the first pattern that matches counts.
        out: Folder to make; a subfolder per target (``per-tensor`` for a mapping) holds ``model.safetensors`` and
            ``phema.json``.
        format: "safetensors": files, and an index where there are several, as Hugging Face reads them; or "dcp": a
            checkpoint that ``torch.distributed.checkpoint`` loads, and ``phema.json``. Its names, dtypes and numbers
            are those of the files.
        dtype: "float32", "bfloat16" or "float16"; sums are rounded to it at the very end. Parameters that were not
            averaged are written in it too if they are of a floating dtype of 16 bits or more; buffers and whole numbers
            keep their own.
        max_shard_size: Limit of one file, such as "5GB".
        tolerance: Largest forecast error, relative to |raw weights - target|; as few stored averages are read as
            reach it, and it is an error if none do. "auto" takes 1e-3, or what rounding of the stored averages makes
            if that is more, and rebuilds as well as it can; "exact" reads all.
        metric: "trajectory", "density", or "paper" for the paper's own procedure.
        movement: How fast weights moved when: "measured" from the norms that snapshots carry, "constant", "auto"
            (constant, unless the norms tell that the weights all but stopped at the end), or the run's learning
            rate as a function of training time or as (times, rates).
        progress: Wraps the blocks of this process, to draw a bar.

    Returns:
        The plan, with the forecast of every target.

    Raises:
        PhemaError: A target, the run folder or the output folder will not do; nothing was written then.
    """
    if format not in FORMATS:
        raise OutputError(f"format: expected {' or '.join(FORMATS)}, found {format!r}", hint="leave format out")
    if "://" in str(out):
        raise OutputError(f"{out}: expected a local folder, found a URL", hint="write to a disk, and copy it there")
    out, drafts = Path(out), Path(DRAFTS if format == "dcp" else "")
    wanted, limit = parse_outputs(targets), byte_count(max_shard_size)
    run = agree(lambda: _opened(root))
    wish: dict[str, Any] = {"tolerance": tolerance, "metric": metric, "movement": movement, "once": from_first}
    files = tensor_files(run.record.parameters, dtype, WHOLE if format == "dcp" else limit, run.record.raw)

    def planned(run: Run) -> Plan:
        return plan_rebuild(run, wanted, **wish)

    def write(plan: Plan, losses: Losses) -> None:
        slugs = [output.output.slug for output in plan.outputs]

        def create(stage: Path) -> None:
            for index, slug in enumerate(slugs):
                files.create(stage / drafts / slug)
                (stage / slug).mkdir(exist_ok=True)
                (stage / slug / "phema.json").write_text(recipe_text(plan, index, dtype, metric))

        with staged(out, create) as stage, one_thread():
            blocks = Blocks(plan, files, [stage / drafts / slug for slug in slugs], losses)
            agree(lambda: [None for _ in progress(blocks)])  # type: ignore[arg-type]
            if format == "dcp":
                shapes = {p.name: p.shape for p in run.record.parameters} | {r.name: r.shape for r in run.record.raw}
                convert(stage, slugs, shapes, files)

    return leaving_out(planned(run), planned, write)
