"""Records as they lie in a run folder: written, read, and proved to belong to the run."""

from __future__ import annotations

import xxhash

from sharded_phema.errors import StoreError
from sharded_phema.folder import Folder, is_there
from sharded_phema.manifest import (
    FrozenRecord,
    LayoutRecord,
    R,
    Record,
    RunRecord,
    SessionRecord,
    SnapshotRecord,
)
from sharded_phema.store import names
from sharded_phema.store.cuts import Layout
from sharded_phema.transcript import decode, encode

__all__ = ["check_run", "layout_id", "read_layout", "read_record", "write_record"]

MAX_BYTES = 1 << 28
"""Longest record that is read."""


def write_record(folder: Folder, name: str, record: Record) -> None:
    """Write a record; one that is there already, equal to the last byte, is kept.

    Raises:
        StoreError: Another record lies there, or it cannot be written.
    """
    text = encode(record)
    if is_there(folder, name) and folder.read(name, MAX_BYTES) == text:
        return
    folder.write(name, [text])


def read_record(kind: type[R], folder: Folder, name: str) -> R:
    """The record in a file.

    Raises:
        StoreError: It cannot be read, or is no such record.
    """
    return decode(kind, folder.read(name, MAX_BYTES), f"{folder.url}/{name}")


def check_run(where: str, run: RunRecord, record: SessionRecord | LayoutRecord | FrozenRecord | SnapshotRecord) -> None:
    """Prove that a record is of the run in whose folder it lies.

    Raises:
        StoreError: It is not.
    """
    if record.run != run.run:
        raise StoreError(
            f"{where}: holds a {type(record).__name__} of run {record.run}, the folder is of run {run.run}",
            hint="files of two runs were mixed; move the foreign ones away",
        )


def layout_id(record: LayoutRecord) -> str:
    """Identity of a layout: a digest of its record, so that all sessions that are cut alike share one."""
    return xxhash.xxh3_64_hexdigest(encode(record))


def read_layout(folder: Folder, run: RunRecord, session: SessionRecord) -> Layout:
    """What each rank of a session writes.

    Raises:
        StoreError: The layout is missing, damaged, or another's.
    """
    name = names.layout_file(session.layout)
    record = read_record(LayoutRecord, folder, name)
    check_run(f"{folder.url}/{name}", run, record)
    if (found := layout_id(record)) != session.layout:
        raise StoreError(
            f"{folder.url}/{name}: expected the layout {session.layout}, found {found}",
            hint="the layout was swapped with another's or edited; restore the run folder",
        )
    if record.world_size != session.world_size:
        raise StoreError(
            f"{folder.url}/{name}: expected the layout of {session.world_size} ranks, found {record.world_size}",
            hint="the layout was swapped with another's; restore the run folder",
        )
    return Layout(record, run)
