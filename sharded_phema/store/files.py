"""Files that appear whole or not at all, and never in the place of another."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from sharded_phema.errors import StoreError

__all__ = ["place", "write_text"]


def place(path: Path, write: Callable[[Path], object]) -> None:
    """Have ``write`` fill a temporary file, and give it its name when it is safe on disk.

    Whatever fails, no temporary file stays.

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
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if not isinstance(error, OSError):
            raise
        raise StoreError(
            f"{path}: cannot be written: {error}", hint="check free space and permissions; earlier snapshots are intact"
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write a new text file, whole or not at all."""
    place(path, lambda temporary: temporary.write_text(text))


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
