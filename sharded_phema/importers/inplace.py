"""In place: one foreign checkpoint read like a snapshot, range by range, from where its own package left it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sharded_phema.errors import StoreError
from sharded_phema.importers.agreement import Model
from sharded_phema.importers.contract import Lazy, Tensors
from sharded_phema.store import names
from sharded_phema.tensorfile import torch_dtype

__all__ = ["InPlace"]

PIECE = 1 << 18
"""Elements that are read of a tensor at a time: as many as are summed at a time."""


class InPlace:
    """The numbers of a checkpoint, as ``store.Elsewhere`` has them. Nothing is read before it is asked for.

    Args:
        model: What all checkpoints of the run hold.
        opened: Reads the headers of this one: for each average its tensors.
    """

    def __init__(self, model: Model, opened: Callable[[], Mapping[str, Tensors]]) -> None:
        self._model, self._opened = model, cache(opened)

    @cached_property
    def widths(self) -> tuple[int, ...]:
        """Bytes of a number of each averaged parameter in the files."""
        return tuple(torch_dtype(self._model.dtypes[p.name]).itemsize for p in self._model.parameters)

    def stream(self, average: int) -> _Stream:
        """All parameters of an average, end to end, in the dtype of the run."""
        tensors = self._opened()[self._model.averages[average]]
        return _Stream([tensors[parameter.name] for parameter in self._model.parameters], self._model.dtype)

    def fill(self, key: str, dtype: str, numel: int, first: int, out: NDArray[Any]) -> None:
        """Elements of a tensor, as ``TensorFile.fill`` gives them."""
        lazy, into = self._by_key[key], torch.from_numpy(out)
        _pour(lazy, first, into if out.dtype == np.float32 else into.view(torch_dtype(dtype)))

    def check(self, expected: Sequence[tuple[str, str, int]]) -> None:
        """Read the tensors of some keys. That they can be read is all that can be proved: nobody kept digests."""
        for key, _, numel in expected:
            for start in range(0, numel, PIECE):
                self._by_key[key].read(start, min(start + PIECE, numel))

    @cached_property
    def _by_key(self) -> dict[str, Lazy]:
        opened, model = self._opened(), self._model
        tensors = {
            names.tensor_name(label, p.name): opened[label][p.name] for label in opened for p in model.parameters
        }
        first = opened[model.averages[0]]
        tensors |= {names.copied_name(raw.name): first[raw.name] for raw in model.copied}
        return {names.box_key(name, 0): lazy for name, lazy in tensors.items()}


class _Stream:
    """Tensors end to end as the bytes that they have in one dtype: a ``stream.Passing`` of which nothing is hashed.

    Attributes:
        bytes_read: Bytes of the numbers that were read so far, as wide as they are in the files.
    """

    def __init__(self, tensors: Sequence[Lazy], dtype: str) -> None:
        self._tensors, self._dtype, self.bytes_read = tensors, torch_dtype(dtype), 0
        self._firsts = np.cumsum([0, *(math.prod(lazy.shape) for lazy in tensors)])

    def fill(self, begin: int, out: memoryview) -> None:
        """Fill memory with the bytes from ``begin`` on.

        Raises:
            StoreError: A file is missing, damaged or changed.
        """
        at, stop = begin // self._dtype.itemsize, (begin + len(out)) // self._dtype.itemsize
        index = int(np.searchsorted(self._firsts, at, side="right")) - 1
        while at < stop:
            lazy, first, end = self._tensors[index], int(self._firsts[index]), int(self._firsts[index + 1])
            count = min(stop, end) - at
            if count:
                _pour(lazy, at - first, torch.frombuffer(out, dtype=self._dtype, count=count))
                out = out[count * self._dtype.itemsize :]
            self.bytes_read += count * torch_dtype(lazy.dtype).itemsize
            at, index = at + count, index + 1

    def check(self) -> None:
        """Nothing more can be proved than that all could be read."""

    def finish(self) -> None:
        """The same."""

    def close(self) -> None:
        """No file is held open."""


def _pour(lazy: Lazy, first: int, into: Tensor) -> None:
    """Fill memory with the elements of a tensor from ``first`` on, converted to its dtype.

    Raises:
        StoreError: They cannot be read, or a finite number is too large for the dtype.
    """
    for start in range(0, into.numel(), PIECE):
        part = into[start : start + PIECE]
        found = lazy.read(first + start, first + start + part.numel())
        assert found.numel() == part.numel(), lazy.shape
        part.copy_(found)
        # Other conversions are to wider dtypes.
        if (
            found.dtype == torch.float64
            and part.dtype == torch.float32
            and bool((part.isinf() & found.isfinite()).any())
        ):
            largest = float(found[found.isfinite()].abs().max())
            raise StoreError(
                f"a number of magnitude {largest:.6g} does not fit float32", hint="leave the checkpoint out"
            )
