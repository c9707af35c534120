"""Work: which worker rebuilds which blocks, what that moves, and doing it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sharded_phema.feed import Feed
from sharded_phema.grid import Grid, Pieces, RawRange, grid_of, shares
from sharded_phema.job import Job
from sharded_phema.losses import Losses
from sharded_phema.outputs import Outputs, flush
from sharded_phema.recipe import Plan
from sharded_phema.store import Layout
from sharded_phema.sums import Strip, Sums, strips
from sharded_phema.tensorfile import torch_dtype

__all__ = ["CHECKPOINT", "Division", "Work", "divide"]

CHECKPOINT = 32
"""Blocks (128 MiB of sums) after which what was read is proven, what was written is sent to disk, and it is noted."""


@dataclass(frozen=True)
class Division:
    """Who rebuilds what.

    Attributes:
        grid: All blocks.
        read: Bytes that each block reads of tensor files. (blocks,)
        written: Bytes that it writes, over all outputs. (blocks,)
        shares: Blocks of each worker.
    """

    grid: Grid
    read: NDArray[np.float64] = field(repr=False)
    written: NDArray[np.float64] = field(repr=False)
    shares: tuple[range, ...]


def divide(plan: Plan, outputs: Outputs, workers: int) -> Division:
    """Share the blocks of a model out so that every worker moves about as many bytes. Reads nothing."""
    record, grid = plan.run.record, grid_of(_layout(plan))
    choices = [tuple(output.choice[p] for output in plan.outputs) for p in range(len(record.parameters))]
    used = {choice: int(np.any(plan.coefficients[:, list(set(choice))] != 0, axis=1).sum()) for choice in set(choices)}
    times = len({plan.snapshot_of(output) for output in plan.outputs})
    averaged = [float(used[c] * width) for c, width in zip(choices, plan.run.snapshots[0].widths, strict=True)]
    raw = [float(times * torch_dtype(tensor.dtype).itemsize) for tensor in record.raw]
    widths = [float(torch_dtype(place.dtype).itemsize * len(plan.outputs)) for place in outputs.files.places]
    read = grid.costs(averaged, raw)
    written = grid.costs(widths[: len(averaged)], widths[len(averaged) :])
    return Division(grid, read, written, shares(read + written, workers))


def _layout(plan: Plan) -> Layout:
    """The one that most of what is read was written with."""
    layouts = [source.snapshot.layout for source in plan.sources] or [plan.run.snapshots[-1].layout]
    commonest = Counter(map(id, layouts)).most_common(1)[0][0]
    return next(layout for layout in layouts if id(layout) == commonest)


class Work:
    """Rebuilds blocks and writes them into the output folders.

    Args:
        plan: What to rebuild.
        grid: The blocks.
        outputs: Writes the files.
        folders: One of each output of the plan.
        losses: Told which snapshot cannot be read.
        sums: Rebuilds strips with ``feed``.
        feed: Reads them.
    """

    def __init__(
        self, plan: Plan, grid: Grid, outputs: Outputs, folders: Sequence[Path], losses: Losses, sums: Sums, feed: Feed
    ) -> None:
        self._plan, self._grid, self._outputs, self._folders = plan, grid, outputs, folders
        self._losses, self._sums, self._feed = losses, sums, feed
        self._raw_read = self.bytes_written = 0
        parameters = range(len(plan.run.record.parameters))
        self._choices = [tuple(output.choice[p] for output in plan.outputs) for p in parameters]

    @property
    def bytes_read(self) -> int:
        """Bytes that were read of tensor files so far."""
        return self._feed.bytes_read + self._raw_read

    def run(self, blocks: Sequence[int], job: Job) -> Iterator[int]:
        """Do some blocks, in order, noting in the job what is done for good. Gives the number of each.

        Raises:
            StoreError: What is needed cannot be read, or is damaged.
            OutputError: A number does not fit the output's dtype, or a file cannot be written.
        """
        with ThreadPoolExecutor(1, "sharded_phema_flush") as flusher:
            flushed: Future[None] | None = None
            try:
                for first in range(0, len(blocks), CHECKPOINT):
                    some = blocks[first : first + CHECKPOINT]
                    yield from self._do(some)
                    self._feed.finish()
                    if flushed:
                        flushed.result()
                    # The disk writes while the next ones are read.
                    flushed = flusher.submit(_noted, self._outputs.duplicates(), job, some)
                if flushed:
                    flushed.result()
            finally:
                self._feed.close()
                self._outputs.close()

    def _do(self, blocks: Sequence[int]) -> Iterator[int]:
        """Each block once it is written: averaged ones, then the others, as they lie in the grid."""
        contents = [self._grid[block] for block in blocks]
        numbers = iter(blocks)
        sums = self._sums.over(job for block in contents if isinstance(block, tuple) for job in self._jobs(block))
        for job, written in self._written(sums):
            self.bytes_written += written
            if job.last:
                yield next(numbers)
        for block in contents:
            if isinstance(block, RawRange):
                self._carry_over(block)
                yield next(numbers)

    def _written(self, strips: Iterable[tuple[Strip, Tensor]]) -> Iterator[tuple[Strip, int]]:
        """Each strip once it is written, with the bytes of it: by a thread, while the next one is summed."""
        with ThreadPoolExecutor(1, "sharded_phema_writer") as writer:
            last: tuple[Strip, Future[int]] | None = None
            for job, values in strips:
                following = job, writer.submit(self._outputs.write, job.pieces, values, self._folders_of(job))
                if last:
                    yield last[0], last[1].result()
                last = following
            if last:
                yield last[0], last[1].result()

    def _jobs(self, block: Pieces) -> Iterator[Strip]:
        """A block as strips, each of one choice of targets."""
        jobs = [
            Strip(tuple(sorted(set(choice))), strip)
            for choice, pieces in groupby(block, lambda piece: self._choices[piece.parameter])
            for strip in strips(pieces, self._sums.strip)
        ]
        yield from jobs[:-1]
        yield replace(jobs[-1], last=True)

    def _folders_of(self, job: Strip) -> list[list[Path]]:
        """Where each of the targets goes."""
        choice = self._choices[job.pieces[0].parameter]
        return [[f for f, k in zip(self._folders, choice, strict=True) if k == target] for target in job.targets]

    def _carry_over(self, block: RawRange) -> None:
        """Write what was stored as it is, as of the time of each output; each snapshot is read once."""
        folders: dict[int, list[Path]] = {}
        for folder, output in zip(self._folders, self._plan.outputs, strict=True):
            folders.setdefault(self._plan.snapshot_of(output), []).append(folder)
        for number, several in folders.items():
            snapshot = self._plan.run.snapshots[number]
            # Frozen tensors are no snapshot's own: without them, no other snapshot would do either.
            copied = block.index < len(self._plan.run.record.copied)
            with self._losses.reading(snapshot) if copied else nullcontext():
                values = snapshot.read_raw(block.index, block.start, block.stop)
            self._raw_read += values.nbytes
            self.bytes_written += self._outputs.write_raw(block.index, block.start, values, several)


def _noted(descriptors: Sequence[int], job: Job, blocks: Sequence[int]) -> None:
    """Have what was written on disk, and note it."""
    flush(descriptors, job.out)
    for _, run in groupby(enumerate(blocks), lambda pair: pair[1] - pair[0]):
        numbers = [number for _, number in run]
        job.mark(numbers[0], numbers[-1] + 1)
