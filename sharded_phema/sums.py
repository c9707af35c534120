"""Sums: weighted sums of stored averages, a block of elements at a time, in buffers that are made once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sharded_phema.folder import of_each
from sharded_phema.layout import Box, ParamShard, cut, flattened
from sharded_phema.losses import Losses
from sharded_phema.recipe import Plan
from sharded_phema.source import Source

__all__ = ["BLOCK", "GROUP", "Sums", "fill_shards", "one_thread"]

BLOCK = 1 << 17
"""Elements that are summed at a time."""

GROUP = 16
"""Stored averages that are summed in one matrix product; a block of each is held at a time (24 MiB in all)."""

Fill = Callable[[Source, NDArray[np.float32]], None]
"""Fills a contiguous array with the elements of a block of one stored average."""


class Sums:
    """Rebuilds blocks in buffers that are made once: fresh ones would cost more than the arithmetic.

    A block is a matrix product in float64 over GROUP sources at a time. Blocks, groups and their order
    are the same however the work was divided, and so is every element, bit for bit. ``fill`` may be called from several
    threads, each with a snapshot of its own.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._read = torch.empty(GROUP, BLOCK, dtype=torch.float32)
        self._values = torch.empty(GROUP, BLOCK, dtype=torch.float64)
        self._sums = torch.empty(len(plan.targets), BLOCK, dtype=torch.float64)

    def __call__(self, targets: Sequence[int], size: int, fill: Fill) -> NDArray[np.float64]:
        """A block of some targets, (targets, size), valid until the next call.

        Args:
            targets: Indices into the plan's targets.
            size: Elements of the block, at most BLOCK.
            fill: Reads the block from a source.
        """
        weights = self._plan.coefficients[:, targets]
        used = np.flatnonzero(weights.any(axis=1))
        sums = self._sums[: len(targets), :size].zero_()
        for first in range(0, len(used), GROUP):
            group = used[first : first + GROUP]
            values = self._values[: len(group), :size]
            values.copy_(self._filled([self._plan.sources[i] for i in group], size, fill))
            sums.addmm_(torch.from_numpy(weights[group].T.copy()), values)
        return sums.numpy()

    def _filled(self, sources: Sequence[Source], size: int, fill: Fill) -> Tensor:
        """The block of each source, (sources, size). Remote snapshots are all asked at once."""
        rows = self._read[: len(sources), :size]
        # One thread a snapshot: its averages lie in the same files, and may lie in the same blocks of them.
        shelves: dict[str, list[int]] = {}
        for row, source in enumerate(sources):
            shelves.setdefault(source.snapshot.name, []).append(row)

        def read(shelf: Sequence[int]) -> None:
            for row in shelf:
                fill(sources[row], rows[row].numpy())

        of_each(self._plan.run.root, read, [*shelves.values()])
        return rows


@contextmanager
def one_thread() -> Iterator[None]:
    """Matrix products that do not depend on how many threads shared them; processes share the work instead."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def fill_shards(plan: Plan, shards: Sequence[ParamShard], losses: Losses) -> None:
    """Write the first output of a plan into local shards, rounded to their dtype. Reads only their boxes.

    Args:
        plan: What to rebuild.
        shards: One for each parameter of the run, in its order.
        losses: Told which snapshot cannot be read.
    """
    with one_thread():
        _fill(Sums(plan), plan.outputs[0].choice, shards, losses)


def _fill(sums: Sums, choice: Sequence[int], shards: Sequence[ParamShard], losses: Losses) -> None:
    for parameter, (shard, target) in enumerate(zip(shards, choice, strict=True)):
        contiguous = shard.local.is_contiguous()
        flat = shard.local.view(-1) if contiguous else torch.empty_like(shard.local).reshape(-1)
        for start in range(0, flat.numel(), BLOCK):
            stop = min(start + BLOCK, flat.numel())
            boxes = cut(shard.boxes, start, stop)
            values = sums([target], stop - start, partial(_read, losses, parameter, boxes))
            flat[start:stop].copy_(torch.from_numpy(values[0]))
        if not contiguous:
            shard.local.copy_(flat.view(shard.local.shape))


def _read(losses: Losses, parameter: int, boxes: Sequence[Box], source: Source, out: NDArray[np.float32]) -> None:
    """Fill an array with boxes of one parameter of a stored average, end to end."""
    snapshot, start = source.snapshot, 0
    shape = snapshot.record.parameters[parameter].shape
    with losses.reading(snapshot):
        for box in boxes:
            part = out[start : start + box.numel]
            if (run := flattened(box, shape)) is not None:
                snapshot.fill_flat(source.average, parameter, run.offsets[0], part)
            else:
                part[:] = snapshot.read_box(source.average, parameter, box).reshape(-1)
            start += box.numel
