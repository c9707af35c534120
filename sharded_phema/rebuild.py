"""Reconstruction: any average from the stored ones, each process its own blocks, in one pass over the snapshots."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from sharded_phema.errors import OrderError, OutputError, PhemaError
from sharded_phema.export import DRAFTS
from sharded_phema.feed import Feed
from sharded_phema.fit import Metric
from sharded_phema.job import Job, begin
from sharded_phema.like import check_like, copy_configuration
from sharded_phema.losses import Losses, leaving_out
from sharded_phema.outputs import Outputs
from sharded_phema.per_tensor import Wanted, parse_outputs
from sharded_phema.prepare import Prepared, Wish, prepare
from sharded_phema.recipe import Plan, Summary, recipe_text
from sharded_phema.select import Tolerance
from sharded_phema.source import MovementWish
from sharded_phema.store import Run, open_whole
from sharded_phema.sums import Precision, Sums, one_thread
from sharded_phema.work import Work
from sharded_phema.world import agree, from_first, gather, rank_and_size

__all__ = ["preview", "reconstruct"]

Progress = Callable[[Sequence[float], Iterable[int]], Iterable[int]]
"""Is given the bytes that each step moves, and the steps; gives the steps on, one by one."""


def reconstruct(
    root: str | Path | Run,
    targets: Sequence[Wanted] | Mapping[str, str | float],
    *,
    out: str | Path,
    format: str = "safetensors",
    dtype: str = "float32",
    max_shard_size: str | int = "5GB",
    tolerance: Tolerance = "auto",
    metric: Metric = "trajectory",
    movement: MovementWish = "auto",
    memory: str | int = "1GiB",
    precision: Precision = "float32",
    device: str = "cpu",
    like: str | Path | None = None,
    leave_out: Sequence[str] = (),
    strict: bool = False,
    force: bool = False,
    worker: int | None = None,
    workers: int | None = None,
    progress: Progress = lambda sizes, steps: steps,
) -> Plan:
    """Rebuild averages from a run's snapshots and write them, one folder a target.

    Under torchrun every process rebuilds and writes its own part; so do processes that know nothing of each other but
    ``worker`` and ``workers``. The files have the same bytes for any number of processes. Nothing appears at ``out``
    unless all of it does. A reconstruction that was killed goes on where it stopped when it is called again alike.

    A folder holds the whole model: beside the averages what was copied into snapshots or stored once, as of the last
    snapshot at or before the target's time (the latest, where its tensors have several).

    Damaged snapshots are left out, also those whose damage shows only as they are read: then everything is planned
    and written anew without them. The plan says which, and what that costs. What is damaged of tensors that
    are stored once, for all snapshots, is an error.

    Args:
        root: Run folder; or a run that is open, such as ``importers.open_foreign`` gives.
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
        max_shard_size: Limit of one file, such as "5GB"; "none" for one file whatever its size.
        tolerance: Largest forecast error, relative to |raw weights - target|; as few stored averages are read as
            reach it, and it is an error if none do. "auto" takes 1e-3, or what rounding of the stored averages makes
            if that is more, and rebuilds as well as it can; "exact" reads all.
        metric: "trajectory", "density", or "paper" for the paper's own procedure.
        movement: How fast weights moved when: "measured" from the norms that snapshots carry, "constant", "auto"
            (constant, unless the norms tell that the weights all but stopped at the end), or the run's learning
            rate as a function of training time or as (times, rates).
        memory: Limit of one process's buffers, such as "1GiB", whatever the model and the number of snapshots.
        precision: What sums are made in, "float32" or "float64".
        device: Where sums are made, such as "cuda"; other devices may round otherwise.
        like: A folder of a model in the manner of Hugging Face; its configuration and tokenizer are copied beside each
            output, so that ``from_pretrained`` opens it.
        leave_out: Folders of snapshots to do without.
        strict: Refuse instead of leaving damaged snapshots out.
        force: Replace an output that an earlier reconstruction made, or another unfinished one, once this is done.
        worker: Number of this process, from 0, among ``workers`` that share the work without a process group.
        workers: How many there are.
        progress: Wraps the steps of this process, to draw a bar.

    Returns:
        The plan, with the forecast of every target, and a summary of what was moved. Where workers share the work
        without a process group, the summary says whether the output is there already.

    Raises:
        PhemaError: A target, the run folder or the output folder will not do; nothing was written then.
    """
    settings: dict[str, Any] = {"format": format, "dtype": dtype, "max_shard_size": max_shard_size, "device": device}
    settings |= {"tolerance": tolerance, "metric": metric, "movement": movement, "precision": precision}
    settings |= {"memory": memory, "strict": strict, "force": force, "leave_out": leave_out, "like": like, "out": out}
    started, place = time.monotonic(), _place(worker, workers)
    first = preview(root, targets, workers=place[1], **settings)
    done: list[Prepared] = [first]
    summaries: list[Summary] = []

    def again(run: Run) -> Plan:
        done.append(prepare(run, replace(first.wish, leave_out=()), place[1], once=from_first))
        return done[-1].plan

    def act(plan: Plan, losses: Losses) -> None:
        rebuilding = _Rebuilding(done[-1], losses, place, alone=workers is not None)
        summaries.append(rebuilding.run(progress, started))

    if strict or workers is not None:
        act(first.plan, Losses())
        return replace(first.plan, summary=summaries[-1])
    return replace(leaving_out(first.plan, again, act), summary=summaries[-1])


def preview(
    root: str | Path | Run,
    targets: Sequence[Wanted] | Mapping[str, str | float],
    *,
    out: str | Path,
    workers: int | None = None,
    leave_out: Sequence[str] = (),
    like: str | Path | None = None,
    **settings: Any,
) -> Prepared:
    """All that can be said of a reconstruction before it runs; nothing is written. Collective.

    Args:
        root: As of ``reconstruct``, like all others.
        targets: What to rebuild.
        out: Where to.
        workers: How many would share the work; as many as there are processes, unless given.
        leave_out: Folders of snapshots to do without.
        like: A folder of a model in the manner of Hugging Face.
        settings: The other arguments of ``reconstruct``.

    Raises:
        PhemaError: It cannot be done.
    """
    if workers is not None and workers < 1:
        raise OrderError(f"{workers} workers: expected 1 or more", hint="leave workers out for one")
    if "://" in str(out):
        raise OutputError(f"{out}: expected a local folder, found a URL", hint="write to a disk, and copy it there")
    beside = Path(like) if like else None
    wish = Wish(parse_outputs(targets), Path(out), like=beside, leave_out=tuple(leave_out), **settings)
    run = agree(lambda: open_whole(root))
    if beside:
        check_like(beside, [*(p.name for p in run.record.parameters), *(r.name for r in run.record.raw)])
    return prepare(run, wish, workers or rank_and_size()[1], once=from_first)


def _place(worker: int | None, workers: int | None) -> tuple[int, int]:
    """Number of this worker, and how many there are."""
    if worker is None and workers is None:
        return rank_and_size()
    if worker is None or workers is None or not 0 <= worker < workers:
        raise OrderError(
            f"worker {worker} of {workers}: expected a number from 0 to one less than there are",
            hint="for instance --worker 0 --workers 4 for the first of four",
        )
    if rank_and_size()[1] > 1:
        raise OrderError(
            "worker and workers are for processes without a process group, and this one has one of "
            f"{rank_and_size()[1]} ranks",
            hint="leave them out under torchrun, which shares the work itself",
        )
    return worker, workers


class _Rebuilding:
    """One attempt to carry out what was prepared, by one of several workers."""

    def __init__(self, prepared: Prepared, losses: Losses, place: tuple[int, int], *, alone: bool) -> None:
        self._prepared, self._wish, self._plan = prepared, prepared.wish, prepared.plan
        self._losses, self._alone = losses, alone
        self._drafts = Path(DRAFTS if self._wish.format == "dcp" else "")
        self._blocks, self._workers = prepared.division.shares[place[0]], place[1]
        self._is_full = False

    def run(self, progress: Progress, started: float) -> Summary:
        """Do this worker's share, and commit the output once all is done. Collective, unless alone."""
        job = self._begin()
        try:
            moved = agree(lambda: self._try_work(job, progress))
            if self._wish.format == "dcp" and not self._alone:
                self._convert(job.files)
                finished = from_first(lambda: job.commit(_check_converted))
            else:
                finalize = self._convert if self._wish.format == "dcp" else _nothing
                finished = from_first(lambda: job.commit(finalize))
        except PhemaError as error:
            # What lies there is of use to nobody, unless it is the disk that failed, or others are at work.
            kept = self._alone or any(gather(self._is_full or _is_full(error)))
            if not kept and rank_and_size()[0] == 0:
                job.discard()
            raise
        read, written = (sum(figures) for figures in zip(*gather(moved), strict=True))
        return Summary(read, written, time.monotonic() - started, self._workers, finished)

    def _begin(self) -> Job:
        made = self._prepared
        request, blocks = made.request, len(made.division.grid)
        make = partial(
            begin, self._wish.out, request, self._plan.coefficients, blocks, self._create, force=self._wish.force
        )
        first: list[Job] = []  # of rank 0, which lays out what the others join
        from_first(lambda: first.append(make()))
        return agree(lambda: first[0] if first else make())

    def _create(self, files: Path) -> None:
        for index, slug in enumerate(self._prepared.slugs):
            self._prepared.files.create(files / self._drafts / slug)
            (files / slug).mkdir(exist_ok=True)
            text = recipe_text(self._plan, index, self._wish.dtype, self._wish.metric)
            (files / slug / "phema.json").write_text(text)
            if self._wish.like:
                copy_configuration(self._wish.like, files / slug)

    def _try_work(self, job: Job, progress: Progress) -> tuple[int, int]:
        try:
            return self._work(job, progress)
        except PhemaError as error:
            self._is_full = _is_full(error)  # on its way to other processes the error loses its cause
            raise

    def _work(self, job: Job, progress: Progress) -> tuple[int, int]:
        plan, division = replace(self._plan, coefficients=job.coefficients), self._prepared.division
        done = job.done()
        blocks = [block for block in self._blocks if not done[block]]
        feed, outputs = Feed(self._losses), Outputs(self._prepared.files, plan.run.record)
        sums = Sums(plan, feed, self._prepared.strip, self._wish.precision, self._wish.device)
        folders = [job.files / self._drafts / slug for slug in self._prepared.slugs]
        work = Work(plan, division.grid, outputs, folders, self._losses, sums, feed)
        steps = work.run(blocks, job)
        with one_thread():
            for _ in progress((division.read + division.written)[blocks].tolist(), steps):
                pass
            for _ in steps:  # a bar may not ask for what follows the last step
                pass
        return work.bytes_read, work.bytes_written

    def _convert(self, files: Path) -> None:
        """Turn drafts into checkpoints. Drafts go last and at once, so that it can be done again."""
        if not (files / DRAFTS).is_dir():
            return
        from sharded_phema.export_dcp import convert  # other formats do without torch.distributed.checkpoint

        record = self._plan.run.record
        shapes = {p.name: p.shape for p in record.parameters} | {r.name: r.shape for r in record.raw}
        convert(files, self._prepared.slugs, shapes, self._prepared.files)
        from_first(lambda: _remove(files / DRAFTS, files.parent / "drafts"))


def _remove(drafts: Path, aside: Path) -> None:
    """Remove a folder that nobody may find half removed; what stays of it aside goes with the job's folder."""
    drafts.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def _is_full(error: PhemaError) -> bool:
    """Whether the disk that is written to failed: the same call, made again, goes on where it stopped."""
    return isinstance(error, OutputError) and isinstance(error.__cause__, OSError)


def _check_converted(files: Path) -> None:
    """A process that was killed as it finished, on a machine that cannot be asked, may have hidden the drafts."""
    if (files / DRAFTS).is_dir():
        raise OutputError(
            f"{files}: an earlier conversion was cut short, and this one did not see it",
            hint="start the same again: it goes on where it stopped",
        )


def _nothing(files: Path) -> None:
    """Safetensors are what they are to be."""
