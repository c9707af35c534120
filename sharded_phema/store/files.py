"""Files that appear whole or not at all, and never in the place of another."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError

from sharded_phema.errors import StoreError

__all__ = ["place", "read_floats", "tensor_table", "write_text"]

_MAX_HEADER = 100_000_000  # the limit that the safetensors format itself sets


def place(path: Path, write: Callable[[Path], object]) -> None:
    """Have ``write`` fill a temporary file, and give it its name when it is safe on disk.

    Raises:
        StoreError: The file exists already, or cannot be written.
    """
    if path.exists():
        raise StoreError(f"{path} exists already and is never overwritten", hint="use another run folder")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        _flush(temporary)
        temporary.rename(path)
        _flush(path.parent)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            temporary.unlink()
        raise StoreError(
            f"{path}: cannot be written: {error}", hint="check free space and permissions; earlier snapshots are intact"
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write a new text file, whole or not at all."""
    place(path, lambda temporary: temporary.write_text(text))


@lru_cache(maxsize=4096)
def tensor_table(path: Path, size: int) -> tuple[dict[str, str], dict[str, tuple[int, int]]]:
    """Metadata of a safetensors file, and where each tensor's bytes begin and end in it.

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
        raise StoreError(
            f"{path}: cannot be read: {error}", hint="restore the file from a backup, or use other snapshots"
        ) from error


def _ranges(header: dict[str, dict[str, list[int]]], base: int, size: int) -> tuple[dict, dict]:  # type: ignore[type-arg]
    metadata = header.pop("__metadata__", {})
    ranges = {}
    for key, entry in header.items():
        begin, end = entry["data_offsets"]
        if not 0 <= begin <= end <= size - base:
            raise ValueError(f"tensor {key} lies outside the file")
        ranges[key] = (base + begin, base + end)
    return metadata, ranges


def read_floats(path: Path, begin: int, end: int) -> NDArray[np.float32]:
    """The little-endian float32 numbers in bytes ``[begin, end)`` of a file."""
    count, hint = (end - begin) // 4, "restore the file from a backup, or use other snapshots"
    try:
        values = np.fromfile(path, dtype="<f4", count=count, offset=begin)
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error}", hint=hint) from error
    if values.size != count:
        raise StoreError(f"{path}: ends {4 * (count - values.size)} bytes early", hint=hint)
    return values


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
