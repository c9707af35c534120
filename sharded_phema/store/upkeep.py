"""Upkeep: what is removed from a run folder, and the proof that it is ours to remove."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from sharded_phema.errors import StoreError
from sharded_phema.folder import Folder
from sharded_phema.folder.temporary import writer_of
from sharded_phema.manifest import SnapshotRecord
from sharded_phema.store import names
from sharded_phema.store.reader import Snapshot
from sharded_phema.store.run import Run

__all__ = ["Waste", "discard_part", "remove_snapshot", "remove_unfinished", "remove_waste", "waste_of"]

_PART = re.compile(r"rank-[0-9]{5,}\.safetensors")
_STORE = re.compile(r"rank-[0-9]{5,}\.(safetensors|json)")
_DAY_S = 86400.0


@dataclass(frozen=True, slots=True)
class Waste:
    """What a run folder holds that no average is ever rebuilt from.

    Attributes:
        abandoned: Snapshots that a resume from an earlier state left behind.
        unfinished: Names of snapshots without a record.
        frozen: Files of stores of frozen tensors that no snapshot which stays refers to, records first.
        temporary: Files of writers that were killed.
        nbytes: What all of it takes.
    """

    abandoned: tuple[Snapshot, ...]
    unfinished: tuple[str, ...]
    frozen: tuple[str, ...]
    temporary: tuple[str, ...]
    nbytes: int


def waste_of(run: Run, staying: Sequence[Snapshot]) -> Waste:
    """Find what nothing needs once only some snapshots are left. Removes nothing.

    Args:
        run: The run.
        staying: Its snapshots that are to stay.
    """
    folder = run.root
    sizes = {name: size for name, size in _files(folder, "")}
    temporary = tuple(name for name in sizes if _is_dead(name.rpartition("/")[2]))
    frozen = _unused_frozen(run, staying, sizes)
    parts = [name for name in sizes if name.startswith(tuple(f"{each}/" for each in run.unfinished))]
    files = {*temporary, *frozen, *parts}
    size = sum(sizes[name] for name in files) + sum(snapshot.size for snapshot in run.abandoned)
    return Waste(run.abandoned, run.unfinished, frozen, temporary, size)


def remove_waste(run: Run, waste: Waste) -> None:
    """Remove it. Called by the one who holds the run's claim.

    Raises:
        StoreError: Something cannot be removed; the rest of a snapshot is unfinished then, and can be removed later.
    """
    for snapshot in waste.abandoned:
        remove_snapshot(snapshot)
    remove_unfinished(run.root, waste.unfinished)
    for name in waste.frozen:
        run.root.remove(name)
    for folder in dict.fromkeys(name.rpartition("/")[0] for name in waste.frozen):
        _remove_if_empty(run.root, folder)
    run.root.clean("", older_than_s=_DAY_S)


def _files(folder: Folder, name: str) -> Iterator[tuple[str, int]]:
    """Every file of a run folder with its length."""
    for entry in folder.list(name):
        path = f"{name}/{entry.name}" if name else entry.name
        if entry.is_folder:
            yield from _files(folder, path)
        else:
            yield path, entry.size


def _is_dead(name: str) -> bool:
    writer = writer_of(name)
    return writer is not None and writer.is_dead


def _unused_frozen(run: Run, staying: Sequence[Snapshot], files: dict[str, int]) -> tuple[str, ...]:
    """Files of frozen tensors that none of some snapshots refers to; none while a damaged one may be mended."""
    if run.damaged:
        return ()
    used = {
        file
        for snapshot in staying
        for layer in snapshot.frozen
        for rank, number in enumerate(layer.numbers)
        if number
        for file in names.frozen_files(layer.session, number, rank)
    }
    inside = [name for name in files if name.startswith(f"{names.FROZEN}/") and name.count("/") == 2]
    unused = [name for name in inside if name not in used and _STORE.fullmatch(name.rpartition("/")[2])]
    return tuple(sorted(unused, key=lambda name: (not name.endswith(".json"), name)))


def discard_part(folder: Folder, record: SnapshotRecord, rank: int) -> None:
    """Remove what a rank wrote of a snapshot that will never exist; whatever stays is unfinished. Never fails."""
    name = names.snapshot_folder(record.session, record.snapshot)
    with suppress(StoreError):
        folder.remove(names.tensors_file(name, rank))
        if not folder.list(name):
            folder.remove(name)  # fails where another rank is still writing


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
    """Remove snapshots that their writers never finished, and all temporary files of writers that are dead.

    Called by the one who holds the run's claim.

    A folder that holds anything but parts of a snapshot and temporary files of writers that are dead is left alone.

    Returns:
        Names of those removed.
    """
    removed = []
    # Everywhere: a writer may have died over a record, or just after it gave a file its name.
    folder.clean("", older_than_s=_DAY_S)
    for name in unfinished:
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
