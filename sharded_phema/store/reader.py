"""Reading: any box of any stored average of one snapshot, whichever ranks stored it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sharded_phema.errors import StoreError
from sharded_phema.layout import Box, boxes_of_flat_range, flattened, intersection
from sharded_phema.manifest import LayoutRecord, PartRecord, RunRecord
from sharded_phema.store import names
from sharded_phema.store.tensors import read_floats, tensor_table
from sharded_phema.tensorfile import DTYPES

__all__ = ["Snapshot"]


@dataclass(frozen=True)
class Snapshot:
    """All tracked averages at one training time, as every rank stored its part of them.

    Attributes:
        folder: Where it lies.
        record: The run that it belongs to.
        parts: The part of each rank, in rank order.
        layouts: What each rank stores throughout the session, in rank order.
    """

    folder: Path
    record: RunRecord
    parts: tuple[PartRecord, ...]
    layouts: tuple[LayoutRecord, ...] = field(repr=False)

    @property
    def t(self) -> float:
        """Training time at which it was taken, in the run's unit."""
        return self.parts[0].t

    @property
    def start(self) -> float:
        """Training time of the first update that entered the averages."""
        return self.parts[0].start

    @property
    def size(self) -> int:
        """Bytes of its tensor files."""
        return sum(part.size for part in self.parts)

    @property
    def norms(self) -> tuple[float, ...]:
        """Squared norm of each average over the whole model; empty where numbers are not finite."""
        return _added([part.norms for part in self.parts])

    @property
    def gaps(self) -> tuple[float, ...]:
        """Squared norm of the difference of each pair of averages, in the order of ``itertools.combinations``."""
        return _added([part.gaps for part in self.parts])

    def read_box(self, average: int, parameter: int, box: Box) -> NDArray[np.float32]:
        """One box of one parameter of one average, as float32, read from the ranks that stored parts of it.

        Args:
            average: Index into the run's averages.
            parameter: Index into the run's parameters.
            box: Any box of the global parameter.

        Returns:
            Array of shape ``box.sizes``.

        Raises:
            StoreError: A file is damaged, or the stored boxes do not cover the box.
        """
        out, found = np.empty(box.sizes, np.float32), 0
        for rank, layout in enumerate(self.layouts):
            for number, stored in enumerate(layout.boxes[parameter]):
                if (shared := intersection(stored, box)) is not None:
                    path, begin = self._locate(rank, average, parameter, number)
                    out[_within(box, shared)] = _cut(path, begin, stored, shared, self.record.dtype)
                    found += shared.numel
        self._check_found(parameter, box, found)
        return out

    def read_flat(self, average: int, parameter: int, start: int, stop: int) -> NDArray[np.float32]:
        """Elements ``[start, stop)`` of one flattened parameter of one average."""
        out = np.empty(stop - start, np.float32)
        self.fill_flat(average, parameter, start, out)
        return out

    def fill_flat(self, average: int, parameter: int, start: int, out: NDArray[np.float32]) -> None:
        """Fill a contiguous array with the elements of one flattened parameter of one average from ``start`` on."""
        shape = self.record.parameters[parameter].shape
        wanted, width, found = Box((start,), (out.size,)), DTYPES[self.record.dtype][1].itemsize, 0
        for rank, layout in enumerate(self.layouts):
            for number, box in enumerate(layout.boxes[parameter]):
                # Rows, as most ways of sharding store them: the range is one run of bytes in each file it touches.
                if (stored := flattened(box, shape)) is None:
                    self._fill_boxes(average, parameter, start, out)
                    return
                if (shared := intersection(stored, wanted)) is not None:
                    path, begin = self._locate(rank, average, parameter, number)
                    begin += width * (shared.offsets[0] - stored.offsets[0])
                    read_floats(path, begin, self.record.dtype, out[_within(wanted, shared)])
                    found += shared.numel
        self._check_found(parameter, wanted, found)

    def _fill_boxes(self, average: int, parameter: int, start: int, out: NDArray[np.float32]) -> None:
        """The same where some rank stores columns: the range is cut into boxes of the parameter's own shape."""
        for box in boxes_of_flat_range(self.record.parameters[parameter].shape, start, start + out.size):
            out[: box.numel] = self.read_box(average, parameter, box).reshape(-1)
            out = out[box.numel :]

    def _check_found(self, parameter: int, box: Box, found: int) -> None:
        if found != box.numel:
            raise StoreError(
                f"{self.folder}: {found} of {box.numel} elements of {self.record.parameters[parameter].name} "
                f"in {box} are stored",
                hint="the layout records of the run were edited or mixed; restore the run folder",
            )

    def _locate(self, rank: int, average: int, parameter: int, number: int) -> tuple[Path, int]:
        """File of a stored box, and the byte at which its numbers begin."""
        part, stored = self.parts[rank], self.layouts[rank].boxes[parameter][number]
        tensor = names.tensor_name(self.record.averages[average], self.record.parameters[parameter].name)
        path = names.tensors_path(self.folder, rank)
        metadata, ranges = tensor_table(path, part.size)
        code, kind = DTYPES[self.record.dtype]
        found, begin, end = ranges.get(names.box_key(tensor, number), ("nothing", 0, 0))
        if metadata != part.identity or found != code or end - begin != kind.itemsize * stored.numel:
            raise StoreError(
                f"{path}: not the tensors that its record names: expected {part.identity} with {stored.numel} elements "
                f"of {tensor} in {code}, found {metadata} with {end - begin} bytes of {found}",
                hint="the file was swapped or is stale; restore it from a backup",
            )
        return path, begin


def _added(parts: Sequence[tuple[float, ...]]) -> tuple[float, ...]:
    """Sums over ranks; empty where a rank has none."""
    return tuple(math.fsum(values) for values in zip(*parts, strict=True)) if all(parts) else ()


def _within(outer: Box, inner: Box) -> tuple[slice, ...]:
    """Index of ``inner`` in an array that holds ``outer``."""
    return Box(tuple(i - o for i, o in zip(inner.offsets, outer.offsets, strict=True)), inner.sizes).slices


def _cut(path: Path, begin: int, stored: Box, shared: Box, dtype: str) -> NDArray[np.float32]:
    """Read ``shared`` out of the row-major ``stored`` box that begins at a byte of a file.

    One read spans it from its first to its last element; where it is narrower than
    the stored rows, what lies between is read and skipped.
    """
    strides = np.ones(len(stored.sizes), np.int64)
    strides[:-1] = np.cumprod(stored.sizes[:0:-1], dtype=np.int64)[::-1]
    corner = np.subtract(shared.offsets, stored.offsets)
    first = int(corner @ strides)
    last = first + int(np.subtract(shared.sizes, 1) @ strides)
    span = np.empty(last + 1 - first, np.float32)
    read_floats(path, begin + DTYPES[dtype][1].itemsize * first, dtype, span)
    steps = tuple(span.itemsize * int(s) for s in strides)
    return np.lib.stride_tricks.as_strided(span, shared.sizes, steps, writeable=False)
