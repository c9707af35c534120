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

import torch
from torch import Tensor

from sharded_phema.errors import StoreError
from sharded_phema.importers.contract import Lazy
from sharded_phema.tensorfile import torch_dtype

__all__ = ["Bytes", "Extent", "Held", "joined", "strided"]


@dataclass(frozen=True, slots=True)
class Extent:
    """Bytes ``[begin, begin + length)`` of a file. Opened for every read: nothing is held meanwhile."""

    path: Path
    begin: int
    length: int

    @classmethod
    def whole(cls, path: Path) -> Extent:
        """All of a file.

        Raises:
            StoreError: It cannot be read.
        """
        try:
            return cls(path, 0, os.stat(path).st_size)
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
        return Extent(self.path, self.begin + begin, length)

    def read(self) -> bytearray:
        """All of its bytes.

        Raises:
            StoreError: They cannot be read.
        """
        found = bytearray(self.length)
        try:
            with open(self.path, "rb", buffering=0) as file:
                file.seek(self.begin)
                view, at = memoryview(found), 0
                while at < self.length and (count := file.readinto(view[at:])):
                    at += count
        except OSError as error:
            raise _unreadable(self.path, error) from error
        if at != self.length:
            raise StoreError(f"{self.path}: ends {self.length - at} bytes early", hint="take it from a backup")
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
    if strides == _row_major(shape) or math.prod(shape) == 1:
        return _numbers(extent, dtype, offset + start, stop - start)
    # Whole rows: of a transposed tensor each takes nearly all of the extent, so that they are read together.
    row = math.prod(shape[1:])
    first, after = start // row, -(-stop // row)
    begin, sizes = offset + first * strides[0], (after - first, *shape[1:])
    count = 1 + sum((n - 1) * step for n, step in zip(sizes, strides, strict=True))
    rows = _numbers(extent, dtype, begin, count).as_strided(sizes, strides)
    return rows.reshape(-1)[start - first * row : stop - first * row].contiguous()


def _numbers(extent: Bytes, dtype: str, begin: int, count: int) -> Tensor:
    width = torch_dtype(dtype).itemsize
    return torch.frombuffer(extent.part(begin * width, count * width).read(), dtype=torch_dtype(dtype))


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


def _unreadable(path: Path, error: OSError) -> StoreError:
    return StoreError(f"{path} cannot be read: {error}", hint="check the path and its permissions")
