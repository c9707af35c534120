"""Cuts: which rank writes which boxes of every tensor, gathered from all ranks and written down in few words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import overload

import numpy as np
from numpy.typing import NDArray

from sharded_phema.errors import StoreError
from sharded_phema.layout import Box, ShardLayout, tally, whole
from sharded_phema.manifest import Cut, LayoutRecord, RunRecord

__all__ = ["Held", "Here", "Layout", "Slabs", "here", "layout_record", "near"]

Held = Sequence[tuple[int, tuple[Box, ...]]]
"""Ranks that hold something of a tensor, in order, and what."""

Shape = tuple[int, ...]

Part = tuple[tuple[int, int, Shape], ...]
"""Boxes that one rank holds: index of the tensor, number of the box, its sizes."""


@dataclass(frozen=True)
class Here:
    """What one rank writes, small enough to be sent by thousands of ranks.

    Attributes:
        slabs: Tensors of which it writes one slab: index, dimension, first and last row. (slabs, 4)
        others: Boxes of other tensors of which it writes anything, by index.
    """

    slabs: NDArray[np.int64]
    others: Mapping[int, tuple[Box, ...]]


def here(layouts: Sequence[ShardLayout]) -> Here:
    """What this rank writes of several layouts; their tensors are counted through. Only first replicas write."""
    slabs: list[tuple[int, int, int, int]] = []
    others: dict[int, tuple[Box, ...]] = {}
    for index, shard in enumerate(shard for layout in layouts for shard in layout):
        if shard.replica or not shard.boxes:
            continue
        slab = _slab(shard.global_shape, shard.boxes)
        if slab is None:
            others[index] = shard.boxes
        else:
            slabs.append((index, *slab))
    return Here(np.array(slabs, np.int64).reshape(len(slabs), 4), others)


def _slab(shape: Shape, boxes: Sequence[Box]) -> tuple[int, int, int] | None:
    """Dimension, first row and the one after the last of a box that is cut along one dimension only."""
    (box, *more), dims = boxes, range(len(shape))
    cut = [dim for dim in dims if box.sizes[dim] != shape[dim]]
    if more or len(cut) > 1 or not shape or not box.numel:
        return None
    dim = cut[0] if cut else 0
    return dim, box.offsets[dim], box.offsets[dim] + box.sizes[dim]


def layout_record(run: RunRecord, ranks: Sequence[Here]) -> LayoutRecord:
    """The layout of all ranks, in rank order."""
    shapes = [parameter.shape for parameter in run.parameters] + [tensor.shape for tensor in run.raw]
    rows = np.concatenate([np.insert(one.slabs, 1, rank, axis=1) for rank, one in enumerate(ranks)])
    rows = rows[np.lexsort((rows[:, 1], rows[:, 0]))]  # by tensor, then rank
    firsts = np.searchsorted(rows[:, 0], np.arange(len(shapes) + 1))
    others: dict[int, dict[int, tuple[Box, ...]]] = {}
    for rank, one in enumerate(ranks):
        for index, boxes in one.others.items():
            others.setdefault(index, {})[rank] = boxes
    cuts = [
        _cut(shape, len(ranks), rows[begin:end, 1:], others.get(index, {}))
        for index, (shape, (begin, end)) in enumerate(zip(shapes, pairwise(firsts.tolist()), strict=True))
    ]
    averaged, copied = len(run.parameters), len(run.parameters) + len(run.copied)
    return LayoutRecord(run.run, len(ranks), tuple(cuts[:averaged]), tuple(cuts[averaged:copied]), tuple(cuts[copied:]))


def _cut(shape: Shape, ranks: int, slabs: NDArray[np.int64], others: Mapping[int, tuple[Box, ...]]) -> Cut:
    """One tensor's: as edges where its slabs follow each other from rank to rank."""
    dim = int(slabs[0, 1]) if len(slabs) else 0
    in_a_row = (
        len(slabs) > 0
        and not others
        and bool((slabs[:, 1] == dim).all())
        and bool((slabs[1:, 2] == slabs[:-1, 3]).all())
        and (slabs[0, 2], slabs[-1, 3]) == (0, shape[dim])
    )
    if in_a_row:
        last = np.searchsorted(slabs[:, 0], np.arange(ranks), side="right") - 1
        ends = np.where(last >= 0, slabs[last, 3], 0)
        return Cut(dim, (0, *ends.tolist()))
    boxes = {int(rank): (_box(shape, int(d), int(a), int(b)),) for rank, d, a, b in slabs} | dict(others)
    order = sorted(boxes)
    return Cut(0, (), tuple(order), tuple(boxes[rank] for rank in order))


def _box(shape: Shape, dim: int, begin: int, end: int) -> Box:
    full = whole(shape)
    return Box(
        (*full.offsets[:dim], begin, *full.offsets[dim + 1 :]), (*full.sizes[:dim], end - begin, *full.sizes[dim + 1 :])
    )


@dataclass(frozen=True)
class Layout:
    """What each rank of a world writes, as it is read.

    Attributes:
        record: The record.
        run: The run's record.
    """

    record: LayoutRecord
    run: RunRecord
    _held: dict[tuple[str, int], Held] = field(default_factory=dict, init=False, repr=False, compare=False)
    _parts: dict[int, Part] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        counts = [(len(self.record.averaged), len(self.run.parameters))]
        counts += [(len(self.record.copied), len(self.run.copied)), (len(self.record.frozen), len(self.run.frozen))]
        if self.record.run != self.run.run or any(found != expected for found, expected in counts):
            raise StoreError(
                f"a layout of run {self.record.run} with {[found for found, _ in counts]} tensors; expected run "
                f"{self.run.run} with {[expected for _, expected in counts]}",
                hint="the layout was swapped with another run's; restore the run folder",
            )

    def averaged(self, index: int) -> Held:
        """Who holds what of an averaged parameter."""
        return self._of("averaged", index, self.record.averaged, self.run.parameters[index].shape)

    def copied(self, index: int) -> Held:
        """Who holds what of a copied tensor."""
        return self._of("copied", index, self.record.copied, self.run.copied[index].shape)

    def frozen(self, index: int) -> Held:
        """Who holds what of a frozen tensor."""
        return self._of("frozen", index, self.record.frozen, self.run.frozen[index].shape)

    def part(self, rank: int) -> Part:
        """What a rank holds of one average, in the order of its file: parameter, number of the box, its sizes."""
        if rank not in self._parts:
            if len(self._parts) >= 16:  # ranks are asked for one after another
                self._parts.clear()
            self._parts[rank] = _part([self.averaged(index) for index in range(len(self.run.parameters))], rank)
        return self._parts[rank]

    def copied_part(self, rank: int) -> Part:
        """The same of the copied tensors."""
        return _part([self.copied(index) for index in range(len(self.run.copied))], rank)

    def _of(self, kind: str, index: int, cuts: Sequence[Cut], shape: Shape) -> Held:
        if (kind, index) not in self._held:
            self._held[kind, index] = _held(cuts[index], shape, self.record.world_size)
        return self._held[kind, index]


@dataclass(frozen=True)
class Slabs(Sequence[tuple[int, tuple[Box, ...]]]):
    """What ranks hold of a tensor that is cut into slabs, one after another; no box is made before it is asked for.

    Thousands of ranks times thousands of tensors would be gigabytes of boxes.

    Attributes:
        shape: Shape of the tensor.
        dim: The dimension that is cut.
        ranks: Ranks that hold a slab, in order. (slabs,)
        edges: Where these begin, and where the last one ends. (slabs + 1,)
    """

    shape: Shape
    dim: int
    ranks: NDArray[np.int64]
    edges: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.ranks)

    @overload
    def __getitem__(self, index: int) -> tuple[int, tuple[Box, ...]]: ...
    @overload
    def __getitem__(self, index: slice) -> Held: ...
    def __getitem__(self, index: int | slice) -> tuple[int, tuple[Box, ...]] | Held:
        """A rank and its slab."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        begin, end = self.edges[range(len(self))[index]], self.edges[range(1, len(self) + 1)[index]]
        return int(self.ranks[index]), (_box(self.shape, self.dim, int(begin), int(end)),)

    def of(self, rank: int) -> tuple[Box, ...]:
        """What a rank holds."""
        at = int(np.searchsorted(self.ranks, rank))
        return self[at][1] if at < len(self.ranks) and self.ranks[at] == rank else ()

    def near(self, box: Box) -> Held:
        """Those that may share elements with a box."""
        start, size = box.offsets[self.dim], box.sizes[self.dim]
        first = int(np.searchsorted(self.edges, start, side="right")) - 1
        return self[max(first, 0) : int(np.searchsorted(self.edges, start + size, side="left"))]


def _part(tensors: Sequence[Held], rank: int) -> Part:
    """What a rank holds of some tensors; boxes without elements are left out."""
    return tuple(
        (index, number, box.sizes)
        for index, held in enumerate(tensors)
        for number, box in enumerate(_of(held, rank))
        if box.numel
    )


def _of(held: Held, rank: int) -> tuple[Box, ...]:
    return held.of(rank) if isinstance(held, Slabs) else next((boxes for holder, boxes in held if holder == rank), ())


def near(held: Held, box: Box) -> Held:
    """Ranks that may hold something of a box of the tensor; few where it is cut into slabs."""
    return held.near(box) if isinstance(held, Slabs) else held


def _held(cut: Cut, shape: Shape, world_size: int) -> Held:
    held: Held | None = None
    if cut.edges:
        held = _slabs(cut, shape, world_size)
    elif len(cut.ranks) == len(cut.boxes) and all(rank < world_size for rank in cut.ranks):
        boxes = [box for several in cut.boxes for box in several]
        inside = all(_is_inside(box, shape) for box in boxes) and sum(box.numel for box in boxes) == math.prod(shape)
        # Boxes can overlap and yet add up, with a gap elsewhere.
        if inside and tally(boxes) == tally([whole(shape)]):
            held = tuple(zip(cut.ranks, cut.boxes, strict=True))
    if held is None:
        raise StoreError(
            f"the layout says of a tensor of shape {shape} what cannot be of {world_size} ranks: {str(cut)[:300]}",
            hint="the layout was edited or swapped; restore the run folder",
        )
    return held


def _slabs(cut: Cut, shape: Shape, world_size: int) -> Slabs | None:
    """Slabs that follow each other from one end of the tensor to the other; None where they do not."""
    if len(cut.edges) != world_size + 1 or cut.dim >= len(shape):
        return None
    if (cut.edges[0], cut.edges[-1]) != (0, shape[cut.dim]) or max(cut.edges) > shape[cut.dim]:
        return None
    edges = np.array(cut.edges, np.int64)
    lengths = np.diff(edges)
    ranks = np.flatnonzero(lengths)
    if (lengths < 0).any():
        return None
    return Slabs(shape, cut.dim, ranks, np.append(edges[ranks], edges[-1]))


def _is_inside(box: Box, shape: Shape) -> bool:
    return len(box.offsets) == len(box.sizes) == len(shape) and all(
        offset + size <= length for offset, size, length in zip(box.offsets, box.sizes, shape, strict=True)
    )
