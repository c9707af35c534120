"""Upkeep: what is removed from a run folder, and the proof that it is ours to remove."""

from __future__ import annotations

import re

from sharded_phema.folder import Folder
from sharded_phema.folder.temporary import writer_of
from sharded_phema.store import names
from sharded_phema.store.reader import Snapshot

__all__ = ["remove_snapshot", "remove_unfinished"]

_PART = re.compile(r"rank-[0-9]{5,}\.safetensors")
_DAY_S = 86400.0


def remove_snapshot(snapshot: Snapshot) -> int:
    """Remove a snapshot, its record first: whatever interrupts this, no reader sees half of it.

    Returns:
        Bytes that were freed.

    Raises:
        StoreError: Something cannot be removed.
    """
    folder = snapshot.root
    folder.remove(names.snapshot_file(snapshot.name))
    for rank, part in enumerate(snapshot.facts.parts):
        if part.size:
            folder.remove(names.tensors_file(snapshot.name, rank))
    _remove_if_empty(folder, snapshot.name)
    return snapshot.size


def remove_unfinished(folder: Folder, unfinished: tuple[str, ...]) -> tuple[str, ...]:
    """Remove snapshots that their writers never finished. Called by the one who holds the run's claim.

    A folder that holds anything but parts of a snapshot and temporary files of writers that are dead is left alone.

    Returns:
        Names of those removed.
    """
    removed = []
    for name in unfinished:
        folder.clean(name, older_than_s=_DAY_S)
        files = folder.list(name)
        if all(_PART.fullmatch(entry.name) and not entry.is_folder for entry in files):
            for entry in files:
                folder.remove(f"{name}/{entry.name}")
            _remove_if_empty(folder, name)
            removed.append(name)
    return tuple(removed)


def _remove_if_empty(folder: Folder, name: str) -> None:
    if not [entry for entry in folder.list(name) if writer_of(entry.name) is None]:
        folder.clean(name, older_than_s=_DAY_S)
        if not folder.list(name):
            folder.remove(name)
