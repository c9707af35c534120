"""Reading: any box of any stored average of one snapshot, and any range of the rest of the model, whoever stored it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sharded_phema.blocks import BlockFile
from sharded_phema.folder import Folder
from sharded_phema.layout import Box
from sharded_phema.manifest import RunRecord, SnapshotRecord
from sharded_phema.rounding import STORED_BYTES
from sharded_phema.store import names
from sharded_phema.store.cuts import Held, Layout
from sharded_phema.store.frozen import FrozenLayer, stored_frozen
from sharded_phema.store.stored import Numbers, Stored
from sharded_phema.store.tensors import TensorFile, as_tensor, bits_of
from sharded_phema.stream import Passing

__all__ = ["Elsewhere", "Snapshot"]

Shapes = dict[str, tuple[tuple[int, ...], str]]


class Elsewhere(Protocol):
    """Numbers of a snapshot that no run folder holds, as one rank would store them that has every tensor whole."""

    @property
    def widths(self) -> tuple[int, ...]:
        """Bytes of a number of each averaged parameter where they lie."""

    def stream(self, average: int) -> Passing:
        """All parameters of an average, end to end, in the dtype of the run's record."""

    def fill(self, key: str, dtype: str, numel: int, first: int, out: NDArray[Any]) -> None:
        """As ``TensorFile.fill``."""

    def check(self, expected: Sequence[tuple[str, str, int]]) -> None:
        """As ``TensorFile.check``."""


@dataclass(frozen=True)
class Snapshot:
    """All tracked averages at one training time, and the rest of the model, as every rank stored its part of them.

    Attributes:
        root: The run folder.
        name: Name of its own folder there.
        record: The run that it belongs to.
        facts: Its own record.
        layout: What each rank stores.
        frozen: Where the frozen tensors lie as they were then: what this session's ranks stored, then what it had
            found.
        elsewhere: Where its numbers are read instead; None for the run folder.
    """

    root: Folder
    name: str
    record: RunRecord
    facts: SnapshotRecord
    layout: Layout = field(repr=False)
    frozen: tuple[FrozenLayer, ...] = field(repr=False)
    elsewhere: Elsewhere | None = field(default=None, repr=False, compare=False)
    _files: dict[int, TensorFile] = field(default_factory=dict, init=False, repr=False, compare=False)
    _begins: dict[int, int] = field(default_factory=dict, init=False, repr=False, compare=False)
    _stored: dict[tuple[int, int], Stored] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def where(self) -> str:
        """Its folder, for people."""
        return f"{self.root.url}/{self.name}"

    @property
    def t(self) -> float:
        """Training time at which it was taken, in the run's unit."""
        return self.facts.t

    @property
    def start(self) -> float:
        """Training time of the first update that entered the averages."""
        return self.facts.start

    @property
    def size(self) -> int:
        """Bytes of its tensor files."""
        return sum(part.size for part in self.facts.parts)

    @property
    def widths(self) -> tuple[int, ...]:
        """Bytes of a number of each averaged parameter where they lie."""
        stored = (STORED_BYTES[self.record.dtype],) * len(self.record.parameters)
        return self.elsewhere.widths if self.elsewhere else stored

    @property
    def norms(self) -> tuple[float, ...]:
        """Squared norm of each average over the whole model; empty where numbers are not finite."""
        return self.facts.norms

    @property
    def gaps(self) -> tuple[float, ...]:
        """Squared norm of the difference of each pair of averages, in the order of ``itertools.combinations``."""
        return self.facts.gaps

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

    def averages_of(self, rank: int) -> tuple[BlockFile, int]:
        """A rank's file, and the byte of it at which its averages begin, one after another as the record lists them.

        Raises:
            StoreError: It is damaged, or does not hold them so.
        """
        if rank not in self._begins:
            averages, copied = self._tensors(rank)
            keys = [(key, self.record.dtype, math.prod(sizes)) for key, (sizes, _) in averages.items()]
            begins = self._file(rank).begins_as_written({**averages, **copied}) if keys else {}
            self._begins[rank] = begins[keys[0][0]] if begins else self._file(rank).begin_of(keys)
        return self._file(rank).file, self._begins[rank]

    def _tensors(self, rank: int) -> tuple[Shapes, Shapes]:
        """Sizes and dtype of what a rank stores of the averages and of the copied tensors, by key, in their order."""
        run, dtype = self.record, self.record.dtype
        part = [(names.box_key(run.parameters[i].name, n), sizes) for i, n, sizes in self.layout.part(rank)]
        averages = {names.tensor_name(label, key): (sizes, dtype) for label in run.averages for key, sizes in part}
        copied = {
            names.box_key(names.copied_name(run.copied[i].name), n): (sizes, run.copied[i].dtype)
            for i, n, sizes in self.layout.copied_part(rank)
        }
        return averages, copied

    def read_raw(self, index: int, start: int, stop: int) -> Tensor:
        """Elements ``[start, stop)`` of one flattened tensor that is stored as it is, in its own dtype.

        Args:
            index: Index into the run's ``raw``.
            start: First element.
            stop: One past the last.

        Raises:
            StoreError: A file is damaged, or not all of the elements are stored.
        """
        stored = self._raw(index)  # first: it proves that there can be so many elements
        out = np.empty(stop - start, bits_of(self.record.raw[index].dtype))
        stored.fill_flat(start, out)
        return as_tensor(out, self.record.raw[index].dtype)

    def read_raw_box(self, index: int, box: Box) -> Tensor:
        """One box of a tensor that is stored as it is, in its own dtype and the box's shape; see ``read_raw``."""
        return as_tensor(self._raw(index).read_box(box), self.record.raw[index].dtype)

    def check(self) -> None:
        """Read all files of this snapshot, and prove that they are what its record says.

        Raises:
            StoreError: One is missing or damaged, or there are others.
        """
        for _, check in self.checks():
            check()

    def checks(self) -> Iterator[tuple[str, Callable[[], None]]]:
        """Of each file of this snapshot: its name, and what reads all of it and raises where it is damaged."""
        for rank, expected in self._expected().items():
            yield names.tensors_file(self.name, rank), partial(self._check_file, rank, expected)

    def stores(self) -> Iterator[str]:
        """Records of the stores of frozen tensors that this snapshot refers to."""
        for layer in self.frozen:
            for rank, number in enumerate(layer.numbers):
                if number:
                    yield names.frozen_files(layer.session, number, rank)[1]

    def _check_file(self, rank: int, expected: Sequence[tuple[str, str, int]]) -> None:
        (self.elsewhere or self._file(rank)).check(expected)

    def _expected(self) -> Mapping[int, list[tuple[str, str, int]]]:
        """Of each rank that wrote a file: key, dtype and elements of each of its tensors."""
        found: dict[int, list[tuple[str, str, int]]] = {
            rank: [] for rank, part in enumerate(self.facts.parts) if part.size
        }
        tensors = [
            (names.tensor_name(label, parameter.name), self.record.dtype, self.layout.averaged(index))
            for label in self.record.averages
            for index, parameter in enumerate(self.record.parameters)
        ]
        for index, tensor in enumerate(self.record.copied):
            tensors.append((names.copied_name(tensor.name), tensor.dtype, self.layout.copied(index)))
        for name, dtype, held in tensors:
            for rank, boxes in held:
                keys = [(names.box_key(name, number), dtype, box.numel) for number, box in enumerate(boxes)]
                found.setdefault(rank, []).extend(keys)
        return found

    def _average(self, average: int, parameter: int) -> Stored:
        if (average, parameter) not in self._stored:
            record = self.record.parameters[parameter]
            name, held = names.tensor_name(self.record.averages[average], record.name), self.layout.averaged(parameter)
            self._stored[average, parameter] = self._tensor(name, record.shape, self.record.dtype, held, np.float32)
        return self._stored[average, parameter]

    def _raw(self, index: int) -> Stored:
        copied = len(self.record.copied)
        return self._copied(index) if index < copied else stored_frozen(self.frozen, index - copied)

    def _copied(self, index: int) -> Stored:
        tensor = self.record.copied[index]
        name, held = names.copied_name(tensor.name), self.layout.copied(index)
        return self._tensor(name, tensor.shape, tensor.dtype, held, bits_of(tensor.dtype))

    def _tensor(self, name: str, shape: tuple[int, ...], dtype: str, held: Held, kind: type[np.generic]) -> Stored:

        def fill(rank: int, number: int, box: Box, first: int, out: Numbers) -> None:
            holder = self.elsewhere or self._file(rank)
            holder.fill(names.box_key(name, number), dtype, box.numel, first, out)

        return Stored(self.where, name, shape, held, kind, fill)

    def _file(self, rank: int) -> TensorFile:
        if rank not in self._files:
            part = self.facts.parts[rank]
            file = BlockFile(self.root, names.tensors_file(self.name, rank), part.size, part.digests)
            self._files[rank] = TensorFile(file, self.facts.identity(rank))
        return self._files[rank]
