"""Stored: one tensor as the boxes that ranks stored of it, from which any box and any flat range can be read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sharded_phema.errors import StoreError
from sharded_phema.layout import Box, boxes_of_flat_range, flattened, intersection, rows_around
from sharded_phema.store.cuts import Held, near

__all__ = ["Stored"]

Numbers = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor in storage.

    Attributes:
        where: What it lies in, for messages.
        name: Its name, for messages.
        shape: Its global shape.
        held: The ranks that stored something of it, and their boxes.
        kind: What its elements are read as.
        fill: Fills a contiguous 1-d array with the elements of a rank's box: given the rank, the number of the box,
            the box, the first of its elements, row-major, that is wanted, and the array.
    """

    where: str
    name: str
    shape: tuple[int, ...]
    held: Held
    kind: type[np.generic]
    fill: Callable[[int, int, Box, int, Numbers], None]

    def read_box(self, box: Box) -> Numbers:
        """One box of the tensor, as an array of its shape.

        Raises:
            StoreError: A file is damaged, or the stored boxes do not cover the box.
        """
        out, found = np.empty(box.sizes, self.kind), 0
        for rank, boxes in near(self.held, box):
            for number, stored in enumerate(boxes):
                if (shared := intersection(stored, box)) is not None:
                    out[_within(box, shared)] = self._cut(rank, number, stored, shared)
                    found += shared.numel
        self._check_found(box, found)
        return out

    def fill_flat(self, start: int, out: Numbers) -> None:
        """Fill a contiguous 1-d array with the elements of the flattened tensor from ``start`` on.

        Raises:
            StoreError: As of ``read_box``.
        """
        wanted, found = Box((start,), (out.size,)), 0
        for rank, boxes in near(self.held, rows_around(self.shape, start, start + out.size)):
            for number, box in enumerate(boxes):
                # Rows, as most ways of sharding store them: the range is one run of bytes in each file it touches.
                if (stored := flattened(box, self.shape)) is None:
                    self._fill_boxes(start, out)
                    return
                if (shared := intersection(stored, wanted)) is not None:
                    self.fill(rank, number, box, shared.offsets[0] - stored.offsets[0], out[_within(wanted, shared)])
                    found += shared.numel
        self._check_found(wanted, found)

    def _fill_boxes(self, start: int, out: Numbers) -> None:
        """The same where some rank stores columns: the range is cut into boxes of the tensor's own shape."""
        for box in boxes_of_flat_range(self.shape, start, start + out.size):
            out[: box.numel] = self.read_box(box).reshape(-1)
            out = out[box.numel :]

    def _cut(self, rank: int, number: int, stored: Box, shared: Box) -> Numbers:
        """Read ``shared`` out of the row-major ``stored`` box.

        One read spans it from its first to its last element; where it is narrower than
        the stored rows, what lies between is read and skipped.
        """
        strides = np.ones(len(stored.sizes), np.int64)
        strides[:-1] = np.cumprod(stored.sizes[:0:-1], dtype=np.int64)[::-1]
        corner = np.subtract(shared.offsets, stored.offsets)
        first = int(corner @ strides)
        last = first + int(np.subtract(shared.sizes, 1) @ strides)
        span = np.empty(last + 1 - first, self.kind)
        self.fill(rank, number, stored, first, span)
        steps = tuple(span.itemsize * int(s) for s in strides)
        return np.lib.stride_tricks.as_strided(span, shared.sizes, steps, writeable=False)

    def _check_found(self, box: Box, found: int) -> None:
        if found != box.numel:
            raise StoreError(
                f"{self.where}: {found} of {box.numel} elements of {self.name} in {box} are stored",
                hint="the layout records of the run were edited or mixed; restore the run folder",
            )


def _within(outer: Box, inner: Box) -> tuple[slice, ...]:
    """Index of ``inner`` in an array that holds ``outer``."""
    return Box(tuple(i - o for i, o in zip(inner.offsets, outer.offsets, strict=True)), inner.sizes).slices
