"""Naming: training times in the names of files and folders, and state dicts by the place that they have in a file."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from sharded_phema.errors import StoreError
from sharded_phema.importers.contract import Tensors, within
from sharded_phema.importers.torchfile import tensors_of

__all__ = ["below", "files_in", "sizes_of", "time_of"]


def time_of(name: str, pattern: str, where: str) -> float:
    """The training time in a name.

    Args:
        name: Of a file or folder, without its ending.
        pattern: Regular expression whose first group is the time; empty for the last integer.
        where: The file, for people.

    Raises:
        StoreError: There is none, or the pattern is none.
    """
    try:
        found = re.findall(pattern or r"[0-9]+", name)
    except re.error as error:
        raise StoreError(f"--time-pattern {pattern!r}: {error}", hint="for example 'step_([0-9]+)'") from error
    text = found[-1] if found else ""
    try:
        time = float(text if isinstance(text, str) else text[0])
    except ValueError:
        time = math.nan
    if not (math.isfinite(time) and time > 0.0):
        raise StoreError(
            f"{where}: expected a training time above 0 in the name {name!r}, found {text or 'none'!r}",
            hint="say where it stands: --time-pattern 'step_([0-9]+)'; a checkpoint of time 0 holds nothing trained",
        )
    return time


def files_in(folder: Path, patterns: Sequence[str], what: str) -> tuple[Path, ...]:
    """Files or folders directly in a folder that match a pattern, by name; or the path itself where it is a file.

    Raises:
        StoreError: There is none.
    """
    if folder.is_file():
        return (folder,)
    found = sorted({path for pattern in patterns for path in folder.glob(pattern)})
    if not found:
        raise StoreError(
            f"{folder}: expected {what}, found none", hint="give the folder in which they lie, or another --from"
        )
    return tuple(found)


def sizes_of(paths: Iterable[Path]) -> tuple[int, ...]:
    """Bytes of files, and when each was changed, in nanoseconds."""
    facts = [path.stat() for path in paths]
    return tuple(number for fact in facts for number in (fact.st_size, fact.st_mtime_ns))


def below(value: Any, key: str, prefix: str, where: str) -> Tensors:
    """The tensors at a place of what was loaded.

    Args:
        value: What a file holds.
        key: Place in it, with dots between its parts; empty for all of it.
        prefix: How their names begin there; it is taken off.
        where: The file, for people.

    Raises:
        StoreError: There is nothing at that place, or no tensor.
    """
    inner = value
    for part in filter(None, key.split(".")):
        if not isinstance(inner, dict) or part not in inner:
            some = ", ".join(map(str, list(inner)[:8])) if isinstance(inner, dict) else type(inner).__name__
            raise StoreError(f"{where}: holds nothing at --key {key}; there is {some}", hint="choose another --key")
        inner = inner[part]
    return within(tensors_of(inner), prefix, where)
