"""The snapshots of a run folder, sorted into finished, unfinished and damaged ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

from sharded_phema.errors import StoreError
from sharded_phema.folder import Entry, Folder, of_each
from sharded_phema.manifest import RawTensor, RunRecord, SessionRecord, SnapshotRecord
from sharded_phema.rounding import STORED_BYTES
from sharded_phema.store import names
from sharded_phema.store.cuts import Layout
from sharded_phema.store.frozen import frozen_layers
from sharded_phema.store.reader import Snapshot
from sharded_phema.store.records import check_run, read_layout, read_record
from sharded_phema.tensorfile import torch_dtype

__all__ = ["Damaged", "Shelf", "raw_bytes"]


@dataclass(frozen=True, slots=True)
class Damaged:
    """A snapshot that cannot be read.

    Attributes:
        name: Its folder in the run folder.
        reason: Why.
        facts: Its record; None where that cannot be read either.
        abandoned: Whether it lies on a timeline that a later resume left behind, as far as is known.
    """

    name: str
    reason: str
    facts: SnapshotRecord | None = None
    abandoned: bool = False


class Shelf:
    """Sorts the snapshots of a folder into finished, unfinished and damaged ones."""

    def __init__(self, folder: Folder, record: RunRecord, sessions: Mapping[str, SessionRecord]) -> None:
        self._folder, self._record, self._sessions = folder, record, sessions
        self._layouts: dict[tuple[str, int], Layout] = {}
        averaged = sum(math.prod(parameter.shape) for parameter in record.parameters) * len(record.averages)
        self._bytes = averaged * STORED_BYTES[record.dtype] + raw_bytes(record.copied)

    def sorted(self) -> tuple[list[Snapshot], tuple[str, ...], tuple[Damaged, ...]]:
        """All snapshots, by what they are."""
        finished, unfinished, damaged = [], [], []
        folders = [entry for entry in self._folder.list(names.SNAPSHOTS) if entry.is_folder]
        for name, files, facts in of_each(self._folder, self._look, folders):
            try:
                if facts is None:
                    unfinished.append(name)
                else:
                    finished.append(self._snapshot(name, files, facts()))
            except StoreError as error:
                damaged.append(Damaged(name, error.message, self._known(name, facts)))
        return finished, tuple(unfinished), tuple(damaged)

    def _look(self, entry: Entry) -> tuple[str, Mapping[str, int], Callable[[], SnapshotRecord] | None]:
        """A folder: its name, the lengths of its files, and what gives its record or raises why there is none."""
        name = f"{names.SNAPSHOTS}/{entry.name}"
        files = {file.name: file.size for file in self._folder.list(name)}
        record = names.snapshot_file(name)
        if record.rpartition("/")[2] not in files:
            return name, files, None
        try:
            facts = read_record(SnapshotRecord, self._folder, record)
        except StoreError as error:
            return name, files, partial(_raise, error)
        return name, files, lambda: facts

    def _snapshot(self, name: str, files: Mapping[str, int], facts: SnapshotRecord) -> Snapshot:
        where = f"{self._folder.url}/{name}"
        session = self._check_record(where, name, facts)
        self._check_files(where, facts, files)
        layouts = {name: self._layout(self._sessions[name]) for name in self._needed(session)}
        numbers = [part.frozen for part in facts.parts]
        layers = frozen_layers(self._folder, self._record, self._sessions, layouts, facts.session, numbers)
        return Snapshot(self._folder, name, self._record, facts, layouts[facts.session], layers)

    def _known(self, name: str, facts: Callable[[], SnapshotRecord] | None) -> SnapshotRecord | None:
        """The record of a damaged snapshot, where it is one that belongs there."""
        try:
            found = facts() if facts else None
            if found is not None:
                self._check_record(f"{self._folder.url}/{name}", name, found)
        except StoreError:
            return None
        return found

    def _check_record(self, where: str, name: str, facts: SnapshotRecord) -> SessionRecord:
        """The session of a snapshot, once it is proved that its record belongs there."""
        check_run(where, self._record, facts)
        session = self._sessions.get(facts.session)
        if (
            session is None
            or len(facts.parts) != session.world_size
            or name != names.snapshot_folder(facts.session, facts.snapshot)
        ):
            raise StoreError(
                f"{where}: its record is of snapshot {facts.snapshot} of session {facts.session} with "
                f"{len(facts.parts)} parts, which does not belong there",
                hint="records were swapped or copied; restore the folder or move it away",
            )
        averages = len(self._record.averages)
        norms, gaps = {0, averages}, {0, averages * (averages - 1) // 2}
        if not (0 <= facts.start <= facts.t and len(facts.norms) in norms and len(facts.gaps) in gaps):
            raise StoreError(
                f"{where}: its record is of t={facts.t:g}, averages since {facts.start:g}, {len(facts.norms)} norms "
                f"and {len(facts.gaps)} gaps, which cannot be of {averages} averages",
                hint="the record was edited; restore it from a backup",
            )
        return session

    def _layout(self, session: SessionRecord) -> Layout:
        """What the ranks of a session write; read once for all sessions that are cut alike."""
        key = session.layout, session.world_size
        if key not in self._layouts:
            self._layouts[key] = read_layout(self._folder, self._record, session)
        return self._layouts[key]

    def _needed(self, session: SessionRecord) -> set[str]:
        """The session and those whose frozen tensors it may refer to."""
        needed: set[str] = set()
        while session.session not in needed:
            needed.add(session.session)
            session = self._sessions.get(session.frozen_from, session)
        return needed

    def _check_files(self, where: str, facts: SnapshotRecord, files: Mapping[str, int]) -> None:
        if (stored := sum(part.size for part in facts.parts)) < self._bytes:
            raise StoreError(
                f"{where}: expected at least {self._bytes} bytes of tensors in its files, found {stored}",
                hint="a record was edited or swapped; restore the run folder",
            )
        for rank, part in enumerate(facts.parts):
            file = names.tensors_file(where, rank).rpartition("/")[2]
            if part.size and files.get(file) != part.size:
                found = "nothing" if file not in files else f"{files[file]} bytes"
                raise StoreError(
                    f"{where}/{file}: expected {part.size} bytes, found {found}",
                    hint="the file was cut short or removed; restore it from a backup",
                )


def raw_bytes(tensors: Iterable[RawTensor]) -> int:
    """Bytes of tensors that are stored as they are."""
    return sum(math.prod(tensor.shape) * torch_dtype(tensor.dtype).itemsize for tensor in tensors)


def _raise(error: StoreError) -> SnapshotRecord:
    raise error
