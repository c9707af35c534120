"""Where each rank's piece of each parameter lies: boxes of global tensors, and the live tensors that fill them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # the store's records use Box and are read without torch
    from torch import Tensor

__all__ = [
    "TALLY_MODULUS",
    "Box",
    "ParamShard",
    "ShardLayout",
    "TensorKind",
    "boxes_of_flat_range",
    "canonical_name",
    "cut",
    "flattened",
    "intersection",
    "reach",
    "row_major",
    "rows_around",
    "tally",
    "whole",
]

TensorKind = Literal["trained", "frozen", "buffer"]
"""A parameter that requires gradients, one that does not, or a persistent buffer."""

TALLY_MODULUS = (1 << 61) - 1
"""Tallies of boxes add up, modulo this prime, to that of all their elements."""

_WRAPPER_SEGMENTS = frozenset({"_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_orig_mod"})


@dataclass(frozen=True, slots=True)
class Box:
    """The block ``tensor[o0 : o0 + s0, o1 : o1 + s1, ...]`` of a global tensor, in elements."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements; 1 for the box of a 0-d tensor."""
        return math.prod(self.sizes)

    @property
    def slices(self) -> tuple[slice, ...]:
        """Index that cuts the box out of the global tensor."""
        return tuple(slice(o, o + s) for o, s in zip(self.offsets, self.sizes, strict=True))


@dataclass(frozen=True, slots=True)
class ParamShard:
    """One rank's live piece of one parameter or buffer.

    Attributes:
        name: Name in the unwrapped model, free of wrapper segments.
        global_shape: Shape of the whole tensor.
        boxes: The blocks of the tensor that this rank holds; none for an empty piece.
        local: Alias of the live storage. Its elements in row-major order are the
            row-major contents of the boxes, end to end. Local, any shape, dtype and device.
        current: Gives the storage that the model uses now; it is ``local`` unless
            somebody replaced the storage after the layout was made.
        kind: What the tensor is to the training.
        replica: Position of this rank among those that hold the same boxes. Exactly
            one of them has 0, and that one writes the piece to disk. Found by ``replicas.settled``.
        holders: How many ranks hold the same boxes. Found by ``replicas.settled``.
    """

    name: str
    global_shape: tuple[int, ...]
    boxes: tuple[Box, ...]
    local: Tensor
    current: Callable[[], Tensor]
    kind: TensorKind = "trained"
    replica: int = 0
    holders: int = 1


ShardLayout = tuple[ParamShard, ...]
"""All pieces that one rank holds, in an order that is the same on every rank."""


def canonical_name(name: str) -> str:
    """Name of a parameter in the unwrapped model: segments that wrappers put in are left out."""
    return ".".join(segment for segment in name.split(".") if segment not in _WRAPPER_SEGMENTS)


def whole(shape: Sequence[int]) -> Box:
    """The box that is the entire tensor."""
    return Box((0,) * len(shape), tuple(shape))


def intersection(a: Box, b: Box) -> Box | None:
    """Elements that two boxes of the same tensor share, or None where they share none."""
    offsets = tuple(map(max, a.offsets, b.offsets))
    ends = (min(oa + sa, ob + sb) for oa, sa, ob, sb in zip(a.offsets, a.sizes, b.offsets, b.sizes, strict=True))
    sizes = tuple(end - offset for end, offset in zip(ends, offsets, strict=True))
    return Box(offsets, sizes) if all(size > 0 for size in sizes) else None


def flattened(box: Box, shape: Sequence[int]) -> Box | None:
    """The box in the flattened tensor, or None where it is not one run of elements there."""
    start, inner, run = 0, 1, True
    for offset, size, length in zip(reversed(box.offsets), reversed(box.sizes), reversed(shape), strict=True):
        # Once a dimension is cut, those outside of it may hold a single row only.
        if not run and size != 1:
            return None
        run = run and size == length
        start, inner = start + offset * inner, inner * length
    return Box((start,), (box.numel,))


def boxes_of_flat_range(shape: Sequence[int], start: int, stop: int) -> tuple[Box, ...]:
    """Cut a row-major range of a tensor into boxes.

    Args:
        shape: Global shape, in elements.
        start: First element of the flattened tensor.
        stop: One past the last element.

    Returns:
        At most ``2 * len(shape) - 1`` disjoint boxes (one for a 0-d tensor) whose
        row-major contents, end to end, are the range.
    """
    if start >= stop:
        return ()
    if not shape:
        return (Box((), ()),)
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row
    if first > last:  # the range begins and ends inside one row
        return _inside_row(shape, last, start - last * row, stop - last * row)
    opening = _inside_row(shape, first - 1, start - (first - 1) * row, row) if start < first * row else ()
    closing = _inside_row(shape, last, 0, stop - last * row)
    full_rows = Box((first, *(0,) * (len(shape) - 1)), (last - first, *shape[1:]))
    return (*opening, *((full_rows,) if first < last else ()), *closing)


def rows_around(shape: Sequence[int], start: int, stop: int) -> Box:
    """The whole rows of a tensor in which the elements ``[start, stop)`` of it, flattened, lie."""
    if not shape:
        return Box((), ())
    row = max(math.prod(shape[1:]), 1)
    first, last = start // row, -(-stop // row)
    return Box((first, *(0 for _ in shape[1:])), (last - first, *shape[1:]))


def cut(boxes: Sequence[Box], start: int, stop: int) -> tuple[Box, ...]:
    """The elements ``[start, stop)`` of what some boxes hold end to end, as boxes of the same tensor."""
    pieces: list[Box] = []
    for box in boxes:
        inner = boxes_of_flat_range(box.sizes, max(start, 0), min(stop, box.numel))
        pieces += [Box(tuple(map(int.__add__, box.offsets, one.offsets)), one.sizes) for one in inner]
        start, stop = start - box.numel, stop - box.numel
    return tuple(pieces)


def tally(boxes: Sequence[Box]) -> int:
    """A number for which elements of a tensor some boxes hold, and how often: the sum over all they hold.

    So that boxes hold every element once exactly when their tallies add up to that of the whole tensor; others
    do so by accident about once in 2^61 divided by the sum of the tensor's lengths.
    """
    return sum(math.prod(map(_powers, range(len(box.sizes)), box.offsets, box.sizes)) for box in boxes) % TALLY_MODULUS


def _powers(dim: int, offset: int, size: int) -> int:
    """Sum of the powers, from ``offset`` on, of one arbitrary number for each dimension.

    An element's tally is the product of its indices' powers: a monomial of its own. Two sets of elements are two
    polynomials, which agree at arbitrary points only by accident; and sums over boxes are geometric series.
    """
    base = 0x1B7E151628AED2A6 * (2 * dim + 3) % TALLY_MODULUS  # from the digits of e
    series = (pow(base, size, TALLY_MODULUS) - 1) * pow(base - 1, -1, TALLY_MODULUS)
    return pow(base, offset, TALLY_MODULUS) * series % TALLY_MODULUS


def _inside_row(shape: Sequence[int], row: int, start: int, stop: int) -> tuple[Box, ...]:
    inner = boxes_of_flat_range(shape[1:], start, stop)
    return tuple(Box((row, *box.offsets), (1, *box.sizes)) for box in inner)


def row_major(sizes: Sequence[int]) -> tuple[int, ...]:
    """Elements from one to its neighbour in each dimension of a box that lies row by row."""
    return tuple(math.prod(sizes[dim + 1 :]) for dim in range(len(sizes)))


def reach(sizes: Sequence[int], steps: Sequence[int]) -> int:
    """Elements from the first to the last one of a box, with what lies between, given the steps between neighbours."""
    return 1 + sum((size - 1) * step for size, step in zip(sizes, steps, strict=True))
