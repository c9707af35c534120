"""Export to DCP: rebuilt models as ordinary checkpoints of torch.distributed.checkpoint, each process its own part."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from sharded_phema.errors import OutputError
from sharded_phema.export import DRAFTS, Place, TensorFiles
from sharded_phema.layout import boxes_of_flat_range
from sharded_phema.store import BoxTensor, pieces_in
from sharded_phema.tensorfile import torch_dtype
from sharded_phema.world import agree, from_first, rank_and_size

__all__ = ["convert", "shares"]

Shapes = Mapping[str, tuple[int, ...]]


def convert(stage: Path, slugs: Sequence[str], shapes: Shapes, files: TensorFiles) -> None:
    """Turn rebuilt tensors into one checkpoint a target. Collective; it can be done again.

    Each process writes about the same number of elements, one box of a tensor after another, so that it never
    holds more than the largest of them.

    Args:
        stage: Folder with ``.drafts/<slug>``, filled by all processes, in which ``<slug>`` is to become a checkpoint.
        slugs: Folder of each target.
        shapes: Global shape of each tensor by name, in the order of ``files.places``.
        files: Where each tensor lies in a draft.

    Raises:
        OutputError: A checkpoint cannot be written, on whichever process.
    """
    rank, size = rank_and_size()
    mine = tuple(shares([math.prod(shape) for shape in shapes.values()], rank, size))
    for slug in slugs:
        drafts = stage / DRAFTS / slug
        state = {
            name: _boxes(drafts, place, shape, span)
            for (name, shape), place, span in zip(shapes.items(), files.places, mine, strict=True)
            if span is not None
        }
        from_first(partial(_clear, stage / slug))
        _save(state, stage / slug)
        del state
        agree(lambda: None)  # nobody reads the draft any more


def _clear(folder: Path) -> None:
    """Remove what a conversion that was killed left behind."""
    for path in [*folder.glob("*.distcp"), *folder.glob(".metadata*")]:
        path.unlink()


def shares(numels: Sequence[int], rank: int, size: int) -> Iterator[tuple[int, int] | None]:
    """Elements of each tensor that a process writes: an equal run of all elements, end to end.

    Returns:
        For each tensor the first element and the one after the last, or None. The first process takes those without
        elements.
    """
    total = sum(numels)
    begin, end = total * rank // size, total * (rank + 1) // size
    for first, numel in zip(itertools.accumulate(numels, initial=0), numels, strict=False):
        start, stop = max(begin - first, 0), min(end - first, numel)
        if numel == 0:
            yield (0, 0) if rank == 0 else None
        else:
            yield (start, stop) if start < stop else None


def _boxes(folder: Path, place: Place, shape: tuple[int, ...], span: tuple[int, int]) -> BoxTensor:
    """Some elements of a tensor as DCP takes them: views of the file, read when they are written."""
    (start, stop), dtype = span, torch_dtype(place.dtype)
    if start == stop:
        empty = torch.empty(shape, dtype=dtype)
        return BoxTensor(shape, {torch.Size([0] * len(shape)): empty}, empty)
    # Copy on write, because torch wants memory that could be written.
    data = np.memmap(
        folder / place.file,
        np.uint8,
        mode="c",
        offset=place.begin + start * dtype.itemsize,
        shape=((stop - start) * dtype.itemsize,),
    )
    flat = torch.from_numpy(data).view(dtype)
    return BoxTensor(shape, pieces_in(flat, boxes_of_flat_range(shape, start, stop)), flat)


def _save(state: Mapping[str, Tensor], folder: Path) -> None:
    # Pieces on the CPU gain nothing from threads that copy ahead.
    writer = FileSystemWriter(folder, per_thread_copy_ahead=0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*single process.*")
        try:
            save(dict(state), storage_writer=writer, planner=DefaultSavePlanner())
        except CheckpointException as wrapped:
            # It derives from BaseException, which no caller would catch.
            rank, (error, _) = next(iter(wrapped.failures.items()))
            raise OutputError(
                f"{folder}: process {rank} cannot write its part of the checkpoint: {error}",
                hint="check free space and permissions",
            ) from error
