"""Audit: proof that a single record is what was written, and what it speaks of too, apart from any snapshot."""

from __future__ import annotations

from sharded_phema.blocks import BlockFile
from sharded_phema.errors import StoreError
from sharded_phema.folder import Folder, is_there
from sharded_phema.manifest import ClaimRecord, FrozenRecord, LayoutRecord, RunRecord, SessionRecord
from sharded_phema.store import names
from sharded_phema.store.cuts import Layout
from sharded_phema.store.frozen import FrozenLayer
from sharded_phema.store.records import check_run, layout_id, read_layout, read_record
from sharded_phema.store.run import Run

__all__ = ["check_claim", "check_frozen", "check_layout", "check_session"]

MAX_RANKS = 1 << 20
"""Ranks that a session may have, before its layout was looked at."""


def check_claim(folder: Folder, run: RunRecord, name: str) -> None:
    """Prove that a file is a claim to this run, of the number that it is named by.

    Raises:
        StoreError: It is not. One that was released meanwhile is none any more, and no fault.
    """
    if not is_there(folder, name):
        return
    record = read_record(ClaimRecord, folder, name)
    _check(folder, name, record.run == run.run and name == names.claim_file(record.number), "claim")


def check_layout(folder: Folder, run: RunRecord, name: str) -> None:
    """Prove that a file is a layout of this run, and that its ranks hold every element of every tensor once.

    Raises:
        StoreError: It is not.
    """
    record = read_record(LayoutRecord, folder, name)
    _check(folder, name, name == names.layout_file(layout_id(record)), "layout")
    check_run(f"{folder.url}/{name}", run, record)
    layout = Layout(record, run)
    for tensors, held in (
        (run.parameters, layout.averaged),
        (run.copied, layout.copied),
        (run.frozen, layout.frozen),
    ):
        for index in range(len(tensors)):
            held(index)


def check_session(folder: Folder, run: RunRecord, name: str) -> None:
    """Prove that a file is the record of a session of this run, and that the one it continued is there.

    Raises:
        StoreError: It is not.
    """
    record = read_record(SessionRecord, folder, name)
    check_run(f"{folder.url}/{name}", run, record)
    parent = names.session_file(record.parent)
    if record.parent and not is_there(folder, parent):
        raise StoreError(
            f"{folder.url}/{name}: continues a session whose record is missing: {parent}",
            hint="restore that record from a backup; its snapshots cannot be read without it",
        )


def check_frozen(run: Run, name: str) -> None:
    """Prove that a file is the record of a rank's store of frozen tensors, and its tensors are what was written.

    Raises:
        StoreError: Either is not.
    """
    folder = run.root
    record = read_record(FrozenRecord, folder, name)
    expected = names.frozen_files(record.session, record.number, record.rank)[1]
    _check(folder, name, record.run == run.record.run and name == expected, "store")
    session_file = names.session_file(record.session)
    if not is_there(folder, session_file):
        # The session was killed before its first snapshot: nothing tells what its ranks hold.
        tensors = names.frozen_files(record.session, record.number, record.rank)[0]
        BlockFile(folder, tensors, record.size, record.digests).check()
        return
    session = read_record(SessionRecord, folder, session_file)
    _check(folder, name, record.number > 0 and record.rank < session.world_size <= MAX_RANKS, "store")
    numbers = tuple(record.number if rank == record.rank else 0 for rank in range(session.world_size))
    layout = read_layout(folder, run.record, session)
    FrozenLayer(folder, run.record, record.session, numbers, layout).check()


def _check(folder: Folder, name: str, fits: bool, what: str) -> None:
    if not fits:
        raise StoreError(
            f"{folder.url}/{name}: holds another {what} than the one that belongs there",
            hint="files were swapped or copied; restore the run folder",
        )
