"""Spans: which runs of elements in whose files hold some boxes of averaged parameters."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from sharded_phema.errors import StoreError
from sharded_phema.layout import Box, boxes_of_flat_range, flattened, intersection, reach, row_major, rows_around
from sharded_phema.store.cuts import Layout, near

__all__ = ["Piece", "Span", "Spans", "Strides"]

Strides: TypeAlias = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""Sizes of a box, and by how many elements its neighbours lie apart in the file and in memory."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements of one parameter that are wanted end to end with those of other pieces.

    Attributes:
        parameter: Index into the run's parameters.
        box: Of the parameter; or of the flattened parameter, where it has one dimension and ``flat`` is set.
        flat: Whether it is.
    """

    parameter: int
    box: Box
    flat: bool

    @classmethod
    def of(cls, parameter: int, box: Box, shape: Sequence[int]) -> Piece:
        """A box of a parameter, as a run of elements where it is one."""
        run = flattened(box, shape)
        return cls(parameter, run or box, run is not None)

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.box.numel

    def cut(self, start: int, stop: int) -> tuple[Piece, ...]:
        """Its elements ``[start, stop)``, in row-major order."""
        if self.flat:
            return (Piece(self.parameter, Box((self.box.offsets[0] + start,), (stop - start,)), True),)
        boxes = boxes_of_flat_range(self.box.sizes, start, stop)
        shifted = [Box(tuple(map(int.__add__, self.box.offsets, box.offsets)), box.sizes) for box in boxes]
        return tuple(Piece(self.parameter, box, False) for box in shifted)


@dataclass(frozen=True, slots=True)
class Span:
    """A run of elements in one rank's part of an average.

    Attributes:
        rank: Whose part.
        first: Its first element, counted over all that the rank holds of one average, in the order of the parameters.
        count: Its elements.
        begin: Element of the wanted pieces, end to end, that the first one is.
        strides: How they lie there, where they are not wanted as one run.
    """

    rank: int
    first: int
    count: int
    begin: int
    strides: Strides | None = None


@dataclass(frozen=True)
class Spans:
    """Finds elements in the files that were written with one layout.

    Attributes:
        layout: What each rank stores.
    """

    layout: Layout
    _columns: dict[int, NDArray[np.int64]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def firsts(self, rank: int) -> NDArray[np.int64]:
        """Where each parameter begins among all that a rank holds of one average, and where the last one ends.

        Array of shape (parameters + 1,).
        """
        if rank not in self._columns:
            held = np.zeros(len(self.layout.run.parameters) + 1, np.int64)
            for parameter, _, sizes in self.layout.part(rank):
                held[parameter + 1] += math.prod(sizes)
            self._columns[rank] = np.cumsum(held)
        return self._columns[rank]

    def of(self, pieces: Sequence[Piece]) -> tuple[Span, ...]:
        """The runs that hold some pieces, in their order; those that follow each other as one.

        Raises:
            StoreError: The stored boxes do not cover them.
        """
        spans: list[Span] = []
        begin = 0
        for piece in pieces:
            found = 0
            for span, numel in self._of_flat(piece, begin) if piece.flat else self._of_box(piece, begin):
                found += numel
                _append(spans, span)
            if found != piece.numel:
                raise self._missing(piece, found)
            begin += piece.numel
        return tuple(spans)

    def _of_flat(self, piece: Piece, begin: int) -> Iterator[tuple[Span, int]]:
        shape, start, numel = self._shape(piece.parameter), piece.box.offsets[0], piece.numel
        for rank, boxes in near(self.layout.averaged(piece.parameter), rows_around(shape, start, start + numel)):
            first = int(self.firsts(rank)[piece.parameter])
            for box in boxes:
                if (stored := flattened(box, shape)) is not None:
                    if (shared := intersection(stored, piece.box)) is not None:
                        skipped, at = shared.offsets[0] - stored.offsets[0], shared.offsets[0] - start
                        yield Span(rank, first + skipped, shared.numel, begin + at), shared.numel
                else:
                    yield from self._in_rows(piece, box, rank, first, begin)
                first += box.numel

    def _in_rows(self, piece: Piece, stored: Box, rank: int, first: int, begin: int) -> Iterator[tuple[Span, int]]:
        """What a stored box, no run of elements, has of a run of them."""
        start = piece.box.offsets[0]
        for box in boxes_of_flat_range(self._shape(piece.parameter), start, start + piece.numel):
            if (shared := intersection(stored, box)) is not None:
                yield _span(rank, first, stored, begin, box, shared), shared.numel
            begin += box.numel

    def _of_box(self, piece: Piece, begin: int) -> Iterator[tuple[Span, int]]:
        for rank, boxes in near(self.layout.averaged(piece.parameter), piece.box):
            first = int(self.firsts(rank)[piece.parameter])
            for stored in boxes:
                if (shared := intersection(stored, piece.box)) is not None:
                    yield _span(rank, first, stored, begin, piece.box, shared), shared.numel
                first += stored.numel

    def _shape(self, parameter: int) -> tuple[int, ...]:
        return self.layout.run.parameters[parameter].shape

    def _missing(self, piece: Piece, found: int) -> StoreError:
        return StoreError(
            f"{found} of {piece.numel} elements of {self.layout.run.parameters[piece.parameter].name} in {piece.box} "
            "are stored",
            hint="the layout records of the run were edited or mixed; restore the run folder",
        )


def _append(spans: list[Span], span: Span) -> None:
    if spans and not (span.strides or spans[-1].strides) and span.rank == spans[-1].rank:
        last = spans[-1]
        if (span.first, span.begin) == (last.first + last.count, last.begin + last.count):
            spans[-1] = Span(last.rank, last.first, last.count + span.count, last.begin)
            return
    spans.append(span)


def _span(rank: int, first: int, stored: Box, begin: int, wanted: Box, shared: Box) -> Span:
    """What a stored box and a wanted one share: from its first to its last element in the file."""
    there, here = row_major(stored.sizes), row_major(wanted.sizes)
    skipped = sum(s * (i - o) for s, i, o in zip(there, shared.offsets, stored.offsets, strict=True))
    at = sum(s * (i - o) for s, i, o in zip(here, shared.offsets, wanted.offsets, strict=True))
    count, length = reach(shared.sizes, there), reach(shared.sizes, here)
    as_one = count == length == shared.numel
    return Span(rank, first + skipped, count, begin + at, None if as_one else (shared.sizes, there, here))
