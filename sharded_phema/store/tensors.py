"""A rank's tensor file: streamed out in any dtypes, read back as float32 or as it lies."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sharded_phema.errors import StoreError
from sharded_phema.tensorfile import CODES, DTYPES, header_of, torch_dtype

__all__ = ["as_tensor", "bits_of", "first_byte", "read_bits", "read_floats", "tensor_table", "write_tensors"]

CHUNK = 1 << 20
"""Elements that are rounded and brought to the host at a time."""

_BITS: dict[int, type[np.generic]] = {1: np.uint8, 2: np.int16, 4: np.int32, 8: np.int64}
_MAX_HEADER = 100_000_000  # the limit that the safetensors format itself sets
_MEND = "restore the file from a backup, or use other snapshots"


@torch.no_grad()
def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], dtypes: Mapping[str, str], metadata: Mapping[str, str]
) -> None:
    """Write a safetensors file. Nothing longer than a chunk is made meanwhile, but for copies of strided tensors.

    Args:
        path: A file to make.
        tensors: Tensors on any device, by key.
        dtypes: What each is rounded to, to nearest: a key of CODES. A tensor of that dtype is written as it is.
        metadata: What the file says of itself.

    Raises:
        StoreError: A finite number is too large for the dtype.
    """
    header, begins = header_of({key: (tuple(tensor.shape), dtypes[key]) for key, tensor in tensors.items()}, metadata)
    with path.open("wb") as file:
        file.write(header)
        for key in begins:
            for chunk in _chunks(tensors[key]):
                rounded = chunk.to(torch_dtype(dtypes[key]))
                if rounded is not chunk and _overflows(chunk, rounded):
                    raise _too_large(key, tensors[key], dtypes[key])
                file.write(rounded.cpu().view(torch.uint8).numpy().data)


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


@lru_cache(maxsize=4096)
def tensor_table(path: Path, size: int) -> tuple[dict[str, str], dict[str, tuple[str, int, int]]]:
    """Metadata of a safetensors file, and of each tensor its dtype there and where its bytes begin and end.

    Args:
        path: The file.
        size: Length in bytes that it must have.

    Raises:
        StoreError: The file is missing, of another length, or its header is no safetensors header.
    """
    try:
        with path.open("rb") as file:
            found = os.fstat(file.fileno()).st_size
            if found != size:
                raise ValueError(f"it has {found} bytes, its record says {size}")
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(size - 8, _MAX_HEADER):
                raise ValueError(f"its header cannot be {length} bytes long")
            return _ranges(json.loads(file.read(length)), 8 + length, size)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StoreError(f"{path}: cannot be read: {error}", hint=_MEND) from error


def _ranges(header: dict[str, dict[str, Any]], base: int, size: int) -> tuple[dict, dict]:  # type: ignore[type-arg]
    metadata = header.pop("__metadata__", {})
    ranges = {}
    for key, entry in header.items():
        begin, end = entry["data_offsets"]
        if not 0 <= begin <= end <= size - base:
            raise ValueError(f"tensor {key} lies outside the file")
        ranges[key] = (entry["dtype"], base + begin, base + end)
    return metadata, ranges


def bits_of(dtype: str) -> type[np.generic]:
    """What elements of a dtype, a key of CODES, are read as: numpy has not all of them."""
    return _BITS[torch_dtype(dtype).itemsize]


def as_tensor(bits: NDArray[Any], dtype: str) -> Tensor:
    """What was read, as a tensor of its dtype."""
    return torch.from_numpy(bits).view(torch_dtype(dtype))


def first_byte(path: Path, size: int, identity: Mapping[str, str], key: str, dtype: str, numel: int) -> int:
    """The byte at which the numbers of a tensor begin, once the file is proved to be what its record says.

    Args:
        path: The file.
        size: Length in bytes that it must have.
        identity: What it must say of itself.
        key: The tensor.
        dtype: Its dtype, a key of CODES.
        numel: Its number of elements.

    Raises:
        StoreError: The file is damaged, or another.
    """
    metadata, ranges = tensor_table(path, size)
    found, begin, end = ranges.get(key, ("nothing", 0, 0))
    if metadata != identity or found != CODES[dtype] or end - begin != torch_dtype(dtype).itemsize * numel:
        raise StoreError(
            f"{path}: not the tensors that its record names: expected {dict(identity)} with {numel} elements "
            f"of {key} in {CODES[dtype]}, found {metadata} with {end - begin} bytes of {found}",
            hint="the file was swapped or is stale; restore it from a backup",
        )
    return begin


def read_floats(path: Path, begin: int, dtype: str, out: NDArray[np.float32]) -> None:
    """Fill a contiguous array with the numbers of a dtype that lie at a byte of a file, as float32.

    Raises:
        StoreError: The file cannot be read, or ends early.
    """
    kind = DTYPES[dtype][1]
    if kind == torch.float32:
        read_bits(path, begin, out)
        return
    raw = np.empty(out.size * kind.itemsize, np.uint8)
    read_bits(path, begin, raw)
    torch.from_numpy(out).copy_(torch.from_numpy(raw).view(kind))


def read_bits(path: Path, begin: int, out: NDArray[Any]) -> None:
    """Fill a contiguous array with the bytes that lie at a byte of a file.

    Raises:
        StoreError: The file cannot be read, or ends early.
    """
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(begin)
            missing = out.view(np.uint8).data
            while missing and (count := file.readinto(missing)):
                missing = missing[count:]
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error}", hint=_MEND) from error
    if missing:
        raise StoreError(f"{path}: ends {len(missing)} bytes early", hint=_MEND)
