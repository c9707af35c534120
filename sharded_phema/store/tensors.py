"""A rank's tensor file: streamed out in any dtypes, read back as float32 or as it lies, every block checked."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sharded_phema.blocks import BLOCK_BYTES, BlockFile, Digester
from sharded_phema.errors import StoreError
from sharded_phema.folder import Buffer, Folder
from sharded_phema.folder.contract import bytes_of
from sharded_phema.tensorfile import CODES, DTYPES, header_of, torch_dtype

__all__ = ["TensorFile", "as_tensor", "bits_of", "write_tensors"]

CHUNK = 1 << 20
"""Elements that are rounded and brought to the host at a time."""

_BITS: dict[int, type[np.generic]] = {1: np.uint8, 2: np.int16, 4: np.int32, 8: np.int64}
_MAX_HEADER = 100_000_000  # the limit that the safetensors format itself sets
_MEND = "restore the file from a backup, or use other snapshots"


@torch.no_grad()
def write_tensors(
    folder: Folder,
    name: str,
    tensors: Mapping[str, Tensor],
    dtypes: Mapping[str, str],
    metadata: Mapping[str, str],
) -> tuple[int, bytes]:
    """Write a safetensors file. Nothing longer than a chunk is made meanwhile, but for copies of strided tensors.

    Args:
        folder: The run folder.
        name: A file to make in it.
        tensors: Tensors on any device, by key.
        dtypes: What each is rounded to, to nearest: a key of CODES. A tensor of that dtype is written as it is.
        metadata: What the file says of itself.

    Returns:
        Its length in bytes, and the digests of its blocks end to end.

    Raises:
        StoreError: It cannot be written, or a finite number is too large for the dtype.
    """
    digester = Digester()
    size = folder.write(name, digester.through(_pieces(tensors, dtypes, metadata)))
    return size, digester.digests


def _pieces(tensors: Mapping[str, Tensor], dtypes: Mapping[str, str], metadata: Mapping[str, str]) -> Iterator[Buffer]:
    header, begins = header_of({key: (tuple(tensor.shape), dtypes[key]) for key, tensor in tensors.items()}, metadata)
    yield header
    for key in begins:
        for chunk in _chunks(tensors[key]):
            rounded = chunk.to(torch_dtype(dtypes[key]))
            if rounded is not chunk and _overflows(chunk, rounded):
                raise _too_large(key, tensors[key], dtypes[key])
            yield rounded.cpu().view(torch.uint8).numpy().data


def _chunks(tensor: Tensor) -> Iterator[Tensor]:
    """The flattened tensor piece by piece: aliases of it, or of a contiguous copy."""
    flat = tensor.resolve_conj().resolve_neg().reshape(-1)
    for start in range(0, flat.numel(), CHUNK):
        yield flat[start : start + CHUNK]


def _too_large(key: str, tensor: Tensor, dtype: str) -> StoreError:
    wider = "bfloat16 or float32" if dtype == "float16" else "float32"
    return StoreError(
        f"{key}: its largest magnitude {_largest(tensor):.6g} does not fit {dtype}",
        hint=f"store {wider}, in another run folder; earlier snapshots are intact",
    )


def _overflows(chunk: Tensor, rounded: Tensor) -> bool:
    infinite = rounded.isinf()
    return bool(infinite.any()) and bool((infinite & chunk.isfinite()).any())


def _largest(tensor: Tensor) -> float:
    """Largest finite magnitude."""
    finite = (chunk.abs().where(chunk.isfinite(), 0.0) for chunk in _chunks(tensor))
    return max(float(magnitudes.max()) for magnitudes in finite)


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file whose bytes are known from a record.

    Attributes:
        file: Its blocks.
        identity: What it must say of itself.
    """

    file: BlockFile
    identity: Mapping[str, str]
    _table: dict[str, tuple[str, int, int]] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def where(self) -> str:
        """The file, for messages."""
        return f"{self.file.folder.url}/{self.file.name}"

    def fill(self, key: str, dtype: str, numel: int, first: int, out: NDArray[Any]) -> None:
        """Fill a contiguous array with elements of a tensor from ``first`` on: its bits, or floats as float32.

        Args:
            key: The tensor.
            dtype: Its dtype, a key of CODES.
            numel: Its number of elements.
            first: First element wanted.
            out: float32 for a dtype of DTYPES; else of the tensor's width.

        Raises:
            StoreError: The file is damaged, or not what its record says.
        """
        begin = self._begin(key, dtype, numel) + torch_dtype(dtype).itemsize * first
        if out.dtype != np.float32 or dtype == "float32":
            self.file.fill(begin, bytes_of(out))
            return
        raw = np.empty(out.size * torch_dtype(dtype).itemsize, np.uint8)
        self.file.fill(begin, bytes_of(raw))
        torch.from_numpy(out).copy_(torch.from_numpy(raw).view(DTYPES[dtype][1]))

    def begins_as_written(self, tensors: Mapping[str, tuple[tuple[int, ...], str]]) -> dict[str, int]:
        """Where the numbers of each tensor begin, if the file has the very header that ``write_tensors`` gives it.

        That says as much as a check of the block that the header lies in, and reads less.

        Args:
            tensors: Shape and dtype of each, by key, in the order in which they were written.

        Returns:
            The byte for each key; empty if the header is another, which only reading it can tell about.

        Raises:
            StoreError: The file cannot be read.
        """
        header, begins = header_of(tensors, self.identity)
        if len(header) > self.file.size:
            return {}
        found, opened = bytearray(len(header)), self.file.folder.open(self.file.name)
        try:
            opened.fill(0, memoryview(found))
        finally:
            opened.close()
        return begins if found == header else {}

    def begin_of(self, expected: Iterable[tuple[str, str, int]]) -> int:
        """The byte at which the numbers of some tensors begin, end to end: key, dtype, elements of each.

        Raises:
            StoreError: The file is damaged, or they are not there so.
        """
        first = at = -1
        for key, dtype, numel in expected:
            begin = self._begin(key, dtype, numel)
            if at not in (-1, begin):
                raise StoreError(
                    f"{self.where}: expected {key} at byte {at}, found it at {begin}",
                    hint="the format wants averages end to end; rewrite the file so, or read it with another reader",
                )
            first, at = begin if first < 0 else first, begin + torch_dtype(dtype).itemsize * numel
        return max(first, 0)

    def check(self, expected: Sequence[tuple[str, str, int]]) -> None:
        """Read all of it, and prove that it holds these tensors and no others: key, dtype, elements.

        Raises:
            StoreError: It is damaged, or not what its record says.
        """
        self.file.check()
        for key, dtype, numel in expected:
            self._begin(key, dtype, numel)
        if extra := set(self._read_table()) - {key for key, _, _ in expected}:
            raise StoreError(
                f"{self.where}: holds tensors that no record names, such as {min(extra)}",
                hint="the layout was edited or swapped; restore the run folder",
            )

    def _begin(self, key: str, dtype: str, numel: int) -> int:
        """The byte at which the numbers of a tensor begin."""
        found, begin, end = self._read_table().get(key, ("nothing", 0, 0))
        if found != CODES[dtype] or end - begin != torch_dtype(dtype).itemsize * numel:
            raise StoreError(
                f"{self.where}: not the tensors that its record names: expected {numel} elements of {key} in "
                f"{CODES[dtype]}, found {end - begin} bytes of {found}",
                hint="the file was swapped or is stale; restore it from a backup",
            )
        return begin

    def _read_table(self) -> dict[str, tuple[str, int, int]]:
        """Of each tensor its dtype in the file, and where its bytes begin and end."""
        if not self._table:
            self._table.update(self._ranges(self._header()))
        return self._table

    def _header(self) -> bytes:
        length = bytearray(8)
        self.file.fill(0, memoryview(length))
        numel = int.from_bytes(length, "little")
        if not 2 <= numel <= min(self.file.size - 8, _MAX_HEADER):
            raise StoreError(f"{self.where}: its header cannot be {numel} bytes long", hint=_MEND)
        # Block by block, each of which is in the file: a length that is a lie takes no memory.
        header = bytearray()
        while len(header) < numel:
            part = bytearray(min(BLOCK_BYTES, numel - len(header)))
            self.file.fill(8 + len(header), memoryview(part))
            header += part
        return bytes(header)

    def _ranges(self, text: bytes) -> dict[str, tuple[str, int, int]]:
        base, ranges = 8 + len(text), {}
        try:
            header = json.loads(text)
            metadata = header.pop("__metadata__", {})
            for key, entry in header.items():
                begin, end = entry["data_offsets"]
                if not 0 <= begin <= end <= self.file.size - base:
                    raise ValueError(f"tensor {key} lies outside the file")
                ranges[key] = (entry["dtype"], base + begin, base + end)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise StoreError(f"{self.where}: its header cannot be read: {error}", hint=_MEND) from error
        if metadata != self.identity:
            raise StoreError(
                f"{self.where}: expected the tensors of {dict(self.identity)}, found those of {metadata}",
                hint="the file was swapped or is stale; restore it from a backup",
            )
        return ranges


def bits_of(dtype: str) -> type[np.generic]:
    """What elements of a dtype, a key of CODES, are read as: numpy has not all of them."""
    return _BITS[torch_dtype(dtype).itemsize]


def as_tensor(bits: NDArray[Any], dtype: str) -> Tensor:
    """What was read, as a tensor of its dtype."""
    return torch.from_numpy(bits).view(torch_dtype(dtype))
