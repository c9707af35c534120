"""Outputs: rebuilt strips written into the files of several output folders, rounded at the very end."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from sharded_phema.errors import OutputError
from sharded_phema.export import TensorFiles
from sharded_phema.folder.contract import bytes_of
from sharded_phema.manifest import RunRecord
from sharded_phema.store import Piece
from sharded_phema.tensorfile import torch_dtype

__all__ = ["Outputs", "flush"]

OPEN_FILES = 128
"""Files that are held open at most."""


@dataclass(frozen=True, slots=True)
class _Run:
    """Elements of a strip that lie end to end in a file, and the byte at which they begin there."""

    file: str
    begin: int
    start: int
    stop: int


@dataclass(frozen=True)
class Outputs:
    """The output folders of one job, as one process writes its part of them.

    Attributes:
        files: Where each tensor lies in a folder, the same in all.
        record: The run, for names.
    """

    files: TensorFiles
    record: RunRecord
    _rooms: dict[torch.dtype, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)
    _open: OrderedDict[str, int] = field(default_factory=OrderedDict, init=False, repr=False, compare=False)

    def write(self, pieces: Sequence[Piece], values: Tensor, folders: Sequence[Sequence[Path]]) -> int:
        """Write a strip of averaged parameters.

        Args:
            pieces: Flat ranges of parameters, end to end.
            values: Their numbers in each target, (targets, elements).
            folders: Where each target goes.

        Returns:
            Bytes written.

        Raises:
            OutputError: A number does not fit the dtype of the output, or a file cannot be written.
        """
        runs, written = self._runs(pieces), 0
        dtype = torch_dtype(self.files.places[pieces[0].parameter].dtype)
        for row, several in zip(values, folders, strict=True):
            self._check_range(pieces, row, dtype)
            numbers = self._rounded(row, dtype)
            for folder in several:
                written += sum(
                    self._put(f"{folder}/{run.file}", run.begin, numbers[run.start : run.stop]) for run in runs
                )
        return written

    def _rounded(self, row: Tensor, dtype: torch.dtype) -> Tensor:
        """Numbers in the dtype of the output, until the next ones: fresh memory would cost more than the rounding."""
        if row.dtype == dtype:
            return row
        if len(room := self._rooms.get(dtype, row[:0])) < len(row):
            room = self._rooms[dtype] = torch.empty_like(row, dtype=dtype)
        return room[: len(row)].copy_(row)

    def write_raw(self, index: int, start: int, values: Tensor, folders: Sequence[Path]) -> int:
        """Write elements of one flattened tensor that was stored as it is; infinities stay what they are.

        Args:
            index: Index into the run's ``raw``.
            start: First element.
            values: In the tensor's own dtype, of shape (elements,).
            folders: Where it goes.

        Returns:
            Bytes written.

        Raises:
            OutputError: A finite number does not fit another dtype, or a file cannot be written.
        """
        place = self.files.places[len(self.record.parameters) + index]
        numbers = values.to(torch_dtype(place.dtype))
        if numbers is not values and bool((infinite := numbers.isinf() & values.isfinite()).any()):
            raise _too_large(self.record.raw[index].name, float(values[infinite].abs().max()), numbers.dtype)
        begin = place.begin + start * numbers.element_size()
        return sum(self._put(f"{folder}/{place.file}", begin, numbers) for folder in folders)

    def duplicates(self) -> list[int]:
        """Descriptors of the files that are open, for somebody else to flush and close.

        Raises:
            OutputError: There are too many.
        """
        with _failing(self.files.places[0].file):
            return [os.dup(descriptor) for descriptor in self._open.values()]

    def close(self) -> None:
        """Close the files."""
        while self._open:
            os.close(self._open.popitem()[1])

    def _runs(self, pieces: Sequence[Piece]) -> list[_Run]:
        """Where a strip goes: what follows each other also in the file is written at once."""
        runs: list[_Run] = []
        at = 0
        for piece in pieces:
            place = self.files.places[piece.parameter]
            width = torch_dtype(place.dtype).itemsize
            begin, stop = place.begin + piece.box.offsets[0] * width, at + piece.numel
            last = runs[-1] if runs else None
            if last and last.file == place.file and begin == last.begin + (at - last.start) * width:
                runs[-1] = _Run(last.file, last.begin, last.start, stop)
            else:
                runs.append(_Run(place.file, begin, at, stop))
            at = stop
        return runs

    def _check_range(self, pieces: Sequence[Piece], row: Tensor, dtype: torch.dtype) -> None:
        # One pass over numbers that caches hold; most strips need no second look.
        least, most = torch.aminmax(row)
        if max(-float(least), float(most)) <= torch.finfo(dtype).max:
            return
        for piece, numbers in zip(pieces, torch.split(row, [piece.numel for piece in pieces]), strict=True):
            if not bool(numbers.to(dtype).isfinite().all()):
                name = self.record.parameters[piece.parameter].name
                raise _too_large(name, float(numbers.abs().max()), dtype)

    def _put(self, path: str, begin: int, numbers: Tensor) -> int:
        view = bytes_of(numbers.view(torch.uint8).numpy())
        size = len(view)
        with _failing(path):
            descriptor = self._descriptor(path)
            while view:
                done = os.pwrite(descriptor, view, begin)
                view, begin = view[done:], begin + done
        return size

    def _descriptor(self, path: str) -> int:
        if path not in self._open:
            if len(self._open) >= OPEN_FILES:
                _, oldest = self._open.popitem(last=False)
                flush([oldest], path)
            self._open[path] = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        self._open.move_to_end(path)
        return self._open[path]


def flush(descriptors: Sequence[int], where: Path | str) -> None:
    """Have open files on disk, and close them, whether or not that can be done.

    Raises:
        OutputError: It cannot.
    """
    try:
        with _failing(where):
            for descriptor in descriptors:
                os.fsync(descriptor)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


@contextmanager
def _failing(path: Path | str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written: {error.strerror or error}",
            hint="free space there or mend the permissions, and start the same again: it goes on where it stopped",
        ) from error


def _too_large(name: str, magnitude: float, dtype: torch.dtype) -> OutputError:
    return OutputError(
        f"{name}: its largest magnitude {magnitude:.3g} does not fit {str(dtype).removeprefix('torch.')}",
        hint="write float32 or bfloat16, or look for non-finite weights in training",
    )
