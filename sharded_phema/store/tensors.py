"""A rank's tensor file: streamed out in the run's dtype, read back as float32."""

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
from sharded_phema.tensorfile import DTYPES, header_of

__all__ = ["read_floats", "tensor_table", "write_tensors"]

CHUNK = 1 << 20
"""Elements that are rounded and brought to the host at a time."""

_MAX_HEADER = 100_000_000  # the limit that the safetensors format itself sets
_MEND = "restore the file from a backup, or use other snapshots"


@torch.no_grad()
def write_tensors(path: Path, tensors: Mapping[str, Tensor], dtype: str, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, rounding to nearest; nothing that is made meanwhile is longer than a chunk.

    Args:
        path: A file to make.
        tensors: Contiguous float32 tensors on any device, by key. On the host, float32 is written as it lies.
        dtype: A key of DTYPES.
        metadata: What the file says of itself.

    Raises:
        StoreError: A finite number is too large for the dtype.
    """
    with path.open("wb") as file:
        file.write(header_of({key: tuple(tensor.shape) for key, tensor in tensors.items()}, dtype, metadata))
        for key, tensor in tensors.items():
            for chunk in _chunks(tensor):
                rounded = chunk.to(DTYPES[dtype][1])
                if rounded is not chunk and _overflows(chunk, rounded):
                    wider = "bfloat16 or float32" if dtype == "float16" else "float32"
                    raise StoreError(
                        f"{key}: its largest magnitude {_largest(tensor):.6g} does not fit {dtype}",
                        hint=f"store {wider}, in another run folder; earlier snapshots are intact",
                    )
                file.write(rounded.cpu().view(torch.uint8).numpy().data)


def _chunks(tensor: Tensor) -> Iterator[Tensor]:
    """Aliases of the flattened tensor."""
    flat = tensor.view(-1)
    for start in range(0, flat.numel(), CHUNK):
        yield flat[start : start + CHUNK]


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


def read_floats(path: Path, begin: int, dtype: str, out: NDArray[np.float32]) -> None:
    """Fill a contiguous array with the numbers of a dtype that lie at a byte of a file, as float32.

    Raises:
        StoreError: The file cannot be read, or ends early.
    """
    kind = DTYPES[dtype][1]
    raw = out.view(np.uint8) if kind == torch.float32 else np.empty(out.size * kind.itemsize, np.uint8)
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(begin)
            missing = raw.data
            while missing and (count := file.readinto(missing)):
                missing = missing[count:]
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error}", hint=_MEND) from error
    if missing:
        raise StoreError(f"{path}: ends {len(missing)} bytes early", hint=_MEND)
    if kind != torch.float32:
        torch.from_numpy(out).copy_(torch.from_numpy(raw).view(kind))
