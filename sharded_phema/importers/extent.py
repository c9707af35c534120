"""Extent: a range of bytes of a file, and numbers that lie in it in any order of rows and columns."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from sharded_phema.errors import StoreError
from sharded_phema.importers.contract import Lazy
from sharded_phema.layout import Box, boxes_of_flat_range, reach, row_major
from sharded_phema.tensorfile import torch_dtype

__all__ = ["Bytes", "Extent", "Held", "joined", "strided"]

# Numbers that are read for each that is wanted, at most, where they lie between those.
_SPARSE = 8


@dataclass(frozen=True, slots=True)
class Extent:
    """Bytes ``[begin, begin + length)`` of a file. Opened for every read: nothing is held meanwhile.

    ``changed_ns`` tells when the file was changed last, 0 if that is unknown; one that was changed since is not read.
    """

    path: Path
    begin: int
    length: int
    changed_ns: int = 0

    @classmethod
    def whole(cls, path: Path) -> Extent:
        """All of a file.

        Raises:
            StoreError: It cannot be read.
        """
        try:
            facts = os.stat(path)
            return cls(path, 0, facts.st_size, facts.st_mtime_ns)
        except OSError as error:
            raise _unreadable(path, error) from error

    def part(self, begin: int, length: int) -> Extent:
        """A range inside of this one.

        Raises:
            StoreError: It is not inside.
        """
        whole = type(begin) is type(length) is int  # they are read from files, whatever is said there
        if not (whole and 0 <= begin <= begin + length <= self.length):
            raise StoreError(
                f"{self.path}: expected {length} bytes from {begin} on, there are {self.length}",
                hint="the file was cut short or is not what it says; take it from a backup",
            )
        return Extent(self.path, self.begin + begin, length, self.changed_ns)

    def read(self) -> bytearray:
        """All of its bytes.

        Raises:
            StoreError: They cannot be read, or the file was changed meanwhile.
        """
        return self.stretches((0,), self.length)

    def stretches(self, begins: Sequence[int], length: int) -> bytearray:
        """Stretches of one length that begin at several places inside, end to end.

        Raises:
            StoreError: As of ``read``.
        """
        try:
            with open(self.path, "rb", buffering=0) as file:
                if self.changed_ns not in (0, os.fstat(file.fileno()).st_mtime_ns):
                    raise _changed(self.path)
                if len(begins) == 1:
                    found = _stretch(file, self.begin + begins[0], length)
                else:  # many and short, so that each call counts
                    number = file.fileno()
                    found = bytearray().join([os.pread(number, length, self.begin + begin) for begin in begins])
        except OSError as error:
            raise _unreadable(self.path, error) from error
        if missing := len(begins) * length - len(found):
            raise StoreError(f"{self.path}: ends {missing} bytes early", hint="take it from a backup")
        return found

    def file(self) -> io.RawIOBase:
        """The same as a file that ends with the range; to be closed."""
        return _Window(self)


@dataclass(frozen=True, slots=True)
class Held:
    """The same of bytes that are in memory already."""

    path: Path
    held: bytes

    @property
    def length(self) -> int:
        """Number of bytes."""
        return len(self.held)

    def part(self, begin: int, length: int) -> Held:
        """A range inside of this one.

        Raises:
            StoreError: It is not inside.
        """
        Extent(self.path, 0, len(self.held)).part(begin, length)
        return Held(self.path, self.held[begin : begin + length])

    def read(self) -> bytearray:
        """A copy of its bytes."""
        return bytearray(self.held)

    def stretches(self, begins: Sequence[int], length: int) -> bytearray:
        """Stretches of one length that begin at several places inside, end to end."""
        return bytearray().join(self.held[begin : begin + length] for begin in begins)


Bytes: TypeAlias = Extent | Held
"""Bytes that can be read in part."""


class _Window(io.RawIOBase):
    """Reads an extent from front to back, or anywhere."""

    def __init__(self, extent: Extent) -> None:
        self._extent, self._at = extent, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max({io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._extent.length}[whence] + offset, 0)
        return self._at

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        view = memoryview(buffer).cast("B")
        count = max(min(len(view), self._extent.length - self._at), 0)
        view[:count] = self._extent.part(self._at, count).read() if count else b""
        self._at += count
        return count


def strided(extent: Bytes, dtype: str, offset: int, shape: Sequence[int], strides: Sequence[int]) -> Lazy:
    """A tensor whose numbers lie in an extent.

    Args:
        extent: Numbers of the dtype, little-endian.
        dtype: A dtype, by torch's name.
        offset: Number at which the tensor begins.
        shape: Its shape.
        strides: Numbers from one element to the next in each dimension.

    Raises:
        StoreError: It does not lie inside, or a number is none that a tensor has.
    """
    sizes: tuple[int, ...] = tuple(shape)
    steps: tuple[int, ...] = tuple(strides)
    numbers = (offset, *sizes, *steps)
    if not set(map(type, numbers)) <= {int}:
        raise StoreError(f"{extent.path}: a tensor with {numbers!s:.80} for its place", hint="the file was edited")
    last = offset + sum((n - 1) * step for n, step in zip(sizes, steps, strict=False))
    fits = min(numbers) >= 0 and len(sizes) == len(steps)
    if not fits or (math.prod(sizes) > 0 and (last + 1) * torch_dtype(dtype).itemsize > extent.length):
        raise StoreError(
            f"{extent.path}: a tensor of shape {sizes} with strides {steps} from {offset} on does not lie in "
            f"{extent.length} bytes of {dtype}",
            hint="the file is damaged or was edited; take it from a backup",
        )
    return Lazy(sizes, dtype, partial(_read, extent, dtype, offset, sizes, steps))


def joined(shape: Sequence[int], pieces: Sequence[tuple[Lazy, int, int]]) -> Lazy:
    """A tensor whose elements lie, end to end, in pieces of flat tensors: in which, from where on, how many.

    Raises:
        StoreError: They are not as many as the shape says, do not lie in what they are pieces of, or differ in dtype.
    """
    dtypes = {lazy.dtype for lazy, _, _ in pieces}
    inside = all(0 <= begin <= begin + count <= math.prod(lazy.shape) for lazy, begin, count in pieces)
    if sum(count for _, _, count in pieces) != math.prod(shape) or len(dtypes) != 1 or not inside:
        raise StoreError(
            f"pieces {[(begin, count) for _, begin, count in pieces]!s:.80} are not a tensor of shape {tuple(shape)}",
            hint="files of two checkpoints were mixed, or some are missing",
        )

    def read(start: int, stop: int) -> Tensor:
        found, at = [torch.empty(0, dtype=torch_dtype(pieces[0][0].dtype))], 0
        for lazy, begin, count in pieces:
            first, after = max(start - at, 0), min(stop - at, count)
            if first < after:
                found.append(lazy.read(begin + first, begin + after))
            at += count
        return found[1] if len(found) == 2 else torch.cat(found)

    return Lazy(tuple(shape), next(iter(dtypes)), read)


def _read(
    extent: Bytes, dtype: str, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], start: int, stop: int
) -> Tensor:
    if start >= stop:
        return torch.empty(0, dtype=torch_dtype(dtype))
    if strides == row_major(shape) or math.prod(shape) == 1:
        return _numbers(extent, dtype, offset + start, stop - start)
    return torch.cat([_box(extent, dtype, offset, strides, box) for box in boxes_of_flat_range(shape, start, stop)])


def _box(extent: Bytes, dtype: str, offset: int, strides: tuple[int, ...], box: Box) -> Tensor:
    """A box of a tensor in any order of rows and columns, as one run of elements.

    Of a transposed tensor it lies all over the extent: read are stretches that hold little else.
    """
    order = sorted(range(len(strides)), key=lambda dim: -strides[dim])
    sizes, steps = [box.sizes[dim] for dim in order], [strides[dim] for dim in order]
    outer = next(dim for dim in range(len(order) + 1) if _is_dense(sizes[dim:], steps[dim:]))
    count, width = reach(sizes[outer:], steps[outer:]), torch_dtype(dtype).itemsize
    begins = np.array([offset + sum(o * step for o, step in zip(box.offsets, strides, strict=True))])
    for size, step in zip(sizes[:outer], steps[:outer], strict=True):
        begins = np.add.outer(begins, step * np.arange(size)).reshape(-1)
    found = torch.frombuffer(extent.stretches((begins * width).tolist(), count * width), dtype=torch_dtype(dtype))
    here = [step * count for step in row_major(tuple(sizes[:outer]))] + steps[outer:]
    return found.as_strided(sizes, here).permute(np.argsort(order).tolist()).reshape(-1)


def _is_dense(sizes: Sequence[int], steps: Sequence[int]) -> bool:
    """Whether a box is read at once with what lies between its elements."""
    return reach(sizes, steps) <= _SPARSE * math.prod(sizes)


def _numbers(extent: Bytes, dtype: str, begin: int, count: int) -> Tensor:
    width = torch_dtype(dtype).itemsize
    return torch.frombuffer(extent.part(begin * width, count * width).read(), dtype=torch_dtype(dtype))


def _stretch(file: io.FileIO, begin: int, length: int) -> bytearray:
    """Bytes of a file, as many as there are."""
    found = bytearray(length)
    view = memoryview(found)
    file.seek(begin)
    at = 0
    while at < length and (count := file.readinto(view[at:])):
        at += count
    return found if at == length else found[:at]


def _changed(path: Path) -> StoreError:
    return StoreError(
        f"{path}: was changed while it was read", hint="wait until what writes it is done, and start the same again"
    )


def _unreadable(path: Path, error: OSError) -> StoreError:
    return StoreError(f"{path} cannot be read: {error}", hint="check the path and its permissions")
