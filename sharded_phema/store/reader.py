"""Reading: any box of any stored average of one snapshot, and any range of the rest of the model, whoever stored it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sharded_phema.layout import Box
from sharded_phema.manifest import LayoutRecord, PartRecord, RunRecord
from sharded_phema.store import names
from sharded_phema.store.frozen import FrozenLayer, frozen_layers, stored_frozen
from sharded_phema.store.stored import Numbers, Stored
from sharded_phema.store.tensors import as_tensor, bits_of, first_byte, read_bits, read_floats
from sharded_phema.tensorfile import DTYPES

__all__ = ["Snapshot"]


@dataclass(frozen=True)
class Snapshot:
    """All tracked averages at one training time, and the rest of the model, as every rank stored its part of them.

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
        return self._average(average, parameter).read_box(box)

    def read_flat(self, average: int, parameter: int, start: int, stop: int) -> NDArray[np.float32]:
        """Elements ``[start, stop)`` of one flattened parameter of one average."""
        out = np.empty(stop - start, np.float32)
        self.fill_flat(average, parameter, start, out)
        return out

    def fill_flat(self, average: int, parameter: int, start: int, out: NDArray[np.float32]) -> None:
        """Fill a contiguous array with the elements of one flattened parameter of one average from ``start`` on."""
        self._average(average, parameter).fill_flat(start, out)

    def read_raw(self, index: int, start: int, stop: int) -> Tensor:
        """Elements ``[start, stop)`` of one flattened tensor that is stored as it is, in its own dtype.

        Args:
            index: Index into the run's ``raw``.
            start: First element.
            stop: One past the last.

        Raises:
            StoreError: A file is damaged, or not all of the elements are stored.
        """
        tensor, copied = self.record.raw[index], len(self.record.copied)
        stored = self._copied(index) if index < copied else stored_frozen(self.frozen, index - copied)
        out = np.empty(stop - start, bits_of(tensor.dtype))
        stored.fill_flat(start, out)
        return as_tensor(out, tensor.dtype)

    @cached_property
    def frozen(self) -> tuple[FrozenLayer, ...]:
        """Where the frozen tensors lie as they were then: what this session's ranks stored, then what it had found.

        Raises:
            StoreError: A record is missing or damaged.
        """
        numbers = [part.frozen for part in self.parts]
        return frozen_layers(names.run_root(self.folder), self.record, self.parts[0].session, numbers)

    def _average(self, average: int, parameter: int) -> Stored:
        record, dtype = self.record.parameters[parameter], self.record.dtype
        name, width = names.tensor_name(self.record.averages[average], record.name), DTYPES[dtype][1].itemsize
        boxes = [layout.boxes[parameter] for layout in self.layouts]

        def fill(rank: int, number: int, first: int, out: Numbers) -> None:
            path, begin = self._locate(rank, name, number, dtype, boxes[rank][number].numel)
            read_floats(path, begin + width * first, dtype, out)

        return Stored(self.folder, record.name, record.shape, boxes, np.float32, fill)

    def _copied(self, index: int) -> Stored:
        tensor = self.record.copied[index]
        name, boxes = names.copied_name(tensor.name), [layout.copied[index] for layout in self.layouts]

        def fill(rank: int, number: int, first: int, out: Numbers) -> None:
            path, begin = self._locate(rank, name, number, tensor.dtype, boxes[rank][number].numel)
            read_bits(path, begin + out.itemsize * first, out)

        return Stored(self.folder, tensor.name, tensor.shape, boxes, bits_of(tensor.dtype), fill)

    def _locate(self, rank: int, name: str, number: int, dtype: str, numel: int) -> tuple[Path, int]:
        """File of a stored box, and the byte at which its numbers begin."""
        part, path = self.parts[rank], names.tensors_path(self.folder, rank)
        return path, first_byte(path, part.size, part.identity, names.box_key(name, number), dtype, numel)


def _added(parts: Sequence[tuple[float, ...]]) -> tuple[float, ...]:
    """Sums over ranks; empty where a rank has none."""
    return tuple(math.fsum(values) for values in zip(*parts, strict=True)) if all(parts) else ()
