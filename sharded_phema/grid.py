"""Grid: the elements of a model in the order in which they are rebuilt, cut into blocks and shared out to workers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from sharded_phema.layout import Box, flattened
from sharded_phema.manifest import Cut
from sharded_phema.store import Layout, Piece

__all__ = ["BLOCK", "Grid", "Pieces", "RawRange", "grid_of", "shares"]

BLOCK = 1 << 20
"""Elements of a block, at most: what is shared out, and noted as done."""

Pieces = tuple[Piece, ...]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class RawRange:
    """Elements ``[start, stop)`` of a flattened tensor that was stored as it is; ``index`` counts the run's ``raw``."""

    index: int
    start: int
    stop: int


@dataclass(frozen=True)
class Grid:
    """All blocks of a model.

    Averaged elements go rank by rank, as the ranks of one layout stored them, so that what is read of its files is
    one long run each. Parameters that ranks hold as columns are shared out to them as rows. Blocks depend on the
    run alone, never on the number of workers.

    Attributes:
        edges: For each averaged parameter, flattened, where each rank's part begins and the last one's ends.
            (parameters, ranks + 1)
        raw: Elements of each tensor that is stored as it is.
    """

    edges: Ints = field(repr=False)
    raw: tuple[int, ...]
    _counts: Ints = field(init=False, repr=False, compare=False)
    _ends: Ints = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        elements = np.concatenate([np.diff(self.edges, axis=1).sum(axis=0), np.array(self.raw, np.int64)])
        object.__setattr__(self, "_counts", -(-elements // BLOCK))
        object.__setattr__(self, "_ends", np.cumsum(self._counts))

    def __len__(self) -> int:
        return int(self._counts.sum())

    def __getitem__(self, block: int) -> Pieces | RawRange:
        """What a block holds: pieces of averaged parameters, or a range of another tensor."""
        part = int(np.searchsorted(self._ends, block, side="right"))
        number, ranks = block - int(self._ends[part] - self._counts[part]), self.edges.shape[1] - 1
        if part < ranks:
            return self._pieces(part, number)
        start = number * BLOCK
        return RawRange(part - ranks, start, min(start + BLOCK, self.raw[part - ranks]))

    def _pieces(self, rank: int, number: int) -> Pieces:
        held = np.concatenate([[0], np.cumsum(self.edges[:, rank + 1] - self.edges[:, rank])])
        start, stop = number * BLOCK, min((number + 1) * BLOCK, int(held[-1]))
        first, last = np.searchsorted(held, start, side="right") - 1, np.searchsorted(held, stop, side="left")
        pieces = []
        for p in range(int(first), int(last)):
            begin, end = max(start, int(held[p])), min(stop, int(held[p + 1]))
            if begin < end:
                at = int(self.edges[p, rank]) + begin - int(held[p])
                pieces.append(Piece(p, Box((at,), (end - begin,)), True))
        return tuple(pieces)

    def costs(self, averaged: Sequence[float], raw: Sequence[float]) -> NDArray[np.float64]:
        """Cost of each block, given that of an element of each averaged parameter and of each other tensor."""
        numel = np.diff(self.edges, axis=1)
        totals = np.asarray(averaged, np.float64) @ numel
        found = [np.empty(0)]
        # Within a rank a block counts by its elements: parameters that cost differently lie in all of them alike.
        for elements, total in zip(numel.sum(axis=0).tolist(), totals, strict=True):
            found.append(_sizes(elements) * (total / max(elements, 1)))
        found += [_sizes(elements) * cost for elements, cost in zip(self.raw, raw, strict=True)]
        return np.concatenate(found)


def _sizes(elements: int) -> NDArray[np.float64]:
    full, rest = divmod(elements, BLOCK)
    return np.array([*[BLOCK] * full, *([rest] if rest else [])], np.float64)


def grid_of(layout: Layout) -> Grid:
    """The grid in which what ranks stored with a layout is read in long runs."""
    run, ranks = layout.run, layout.record.world_size
    shapes = [parameter.shape for parameter in run.parameters]
    edges = [_edges(cut, shape, ranks) for cut, shape in zip(layout.record.averaged, shapes, strict=True)]
    table = np.stack(edges) if edges else np.zeros((0, ranks + 1), np.int64)
    return Grid(table, tuple(math.prod(tensor.shape) for tensor in run.raw))


def _edges(cut: Cut, shape: tuple[int, ...], ranks: int) -> Ints:
    """Where each rank's part of a flattened parameter begins, and the last one's ends."""
    numel = math.prod(shape)
    # Rows of the first dimension, or of the first one that has more than one.
    if cut.edges and math.prod(shape[: cut.dim]) == 1:
        return np.array(cut.edges, np.int64) * math.prod(shape[cut.dim + 1 :])
    if not cut.edges and _are_runs(cut, shape):
        held = np.zeros(ranks + 1, np.int64)
        held[np.array(cut.ranks, int) + 1] = [sum(box.numel for box in boxes) for boxes in cut.boxes]
        return np.cumsum(held)
    return numel * np.arange(ranks + 1, dtype=np.int64) // ranks


def _are_runs(cut: Cut, shape: tuple[int, ...]) -> bool:
    """Whether every rank holds one run of elements, and these follow each other from rank to rank."""
    at = 0
    for box in (box for boxes in cut.boxes for box in boxes):
        run = flattened(box, shape)
        if run is None or run.offsets[0] != at:
            return False
        at += run.numel
    return all(one < next_ for one, next_ in pairwise(cut.ranks)) and at == math.prod(shape)


def shares(costs: NDArray[np.float64], workers: int) -> tuple[range, ...]:
    """Blocks of each worker: a run of them each, of about the same cost."""
    ends = np.cumsum(costs)
    total = float(ends[-1]) if len(ends) else 0.0
    # A block goes to the worker within whose part of the whole its middle lies.
    middles = ends - costs / 2
    cuts = [int(np.searchsorted(middles, total * worker / workers)) for worker in range(workers)] + [len(costs)]
    cuts[0] = 0
    return tuple(range(first, last) for first, last in pairwise(cuts))
