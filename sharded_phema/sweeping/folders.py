"""Folders: rebuilt weights on disk, as folders in the manner of Hugging Face, which all processes rebuild together."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from sharded_phema.errors import OutputError
from sharded_phema.export import tensor_files
from sharded_phema.per_tensor import Wanted
from sharded_phema.rebuild import reconstruct
from sharded_phema.store import Run
from sharded_phema.sweeping.supply import MOST, Supplied, Supply, forecasts_of
from sharded_phema.world import from_first, rank_and_size

__all__ = ["folder_supply"]

WHOLE = 1 << 62


@contextmanager
def folder_supply(
    run: Run, root: str | Path, scratch: Path, disk: int | None, settings: Mapping[str, Any]
) -> Iterator[Supply]:
    """Rebuilds folders, one for each target, and removes them once they were measured.

    A sweep that is killed, or whose metric fails, leaves them behind, to be looked at; the next one with the same place
    goes on with what was being rebuilt, and removes the rest.

    Args:
        run: Where the averages are stored.
        root: Its folder.
        scratch: Folder to make, which all processes see; nothing else may lie there.
        disk: Bytes that rebuilt folders may take at once; half of what is free, unless given.
        settings: More arguments of ``reconstruct``.

    Raises:
        OutputError: Not even one fits, or the place cannot be written.
    """
    room = from_first(lambda: _room(run, scratch, disk, settings.get("dtype", "float32")))
    yield Supply(room, partial(_rebuilt, root, scratch, settings))
    from_first(lambda: _remove(scratch))


@contextmanager
def _rebuilt(
    root: str | Path, scratch: Path, settings: Mapping[str, Any], wanted: Sequence[Wanted]
) -> Iterator[Supplied]:
    out = scratch / "rebuilt"
    from_first(lambda: _remove(out))
    plan = reconstruct(root, wanted, out=out, force=True, **settings)
    rank, size = rank_and_size()
    folders = [out / output.output.slug for output in plan.outputs]
    yield Supplied({index: folders[index] for index in range(len(folders))[rank::size]}, forecasts_of(plan))
    from_first(lambda: _remove(out))


def _room(run: Run, scratch: Path, disk: int | None, dtype: str) -> int:
    """How many rebuilt folders fit."""
    files = tensor_files(run.record.parameters, dtype, WHOLE, run.record.raw)
    size = sum(files.sizes.values())
    try:
        scratch.mkdir(parents=True, exist_ok=True)
        limit = shutil.disk_usage(scratch).free // 2 if disk is None else disk
    except OSError as error:
        raise OutputError(f"{scratch} cannot be made: {error}", hint="give --scratch another folder") from error
    if limit < size:
        raise OutputError(
            f"{scratch}: one rebuilt model takes {size} bytes, found a limit of {limit}",
            hint="give --scratch a folder on a larger disk, or raise --disk",
        )
    return min(MOST, limit // max(size, 1))


def _remove(folder: Path) -> None:
    """Remove what is ours to remove: rebuilt folders, and the empty folder around them."""
    if folder.name == "rebuilt":
        shutil.rmtree(folder, ignore_errors=True)
    elif folder.is_dir() and not os.listdir(folder):
        folder.rmdir()
