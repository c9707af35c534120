"""A run folder as it stands: its record, its sessions, and the snapshots of its living timeline."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from sharded_phema.errors import StoreError
from sharded_phema.folder import Folder, open_folder
from sharded_phema.manifest import RunRecord, SessionRecord, SnapshotRecord
from sharded_phema.rounding import STORED_BYTES
from sharded_phema.store import names
from sharded_phema.store.cuts import Layout
from sharded_phema.store.frozen import frozen_layers
from sharded_phema.store.reader import Snapshot
from sharded_phema.store.records import check_run, read_layout, read_record
from sharded_phema.tensorfile import CODES

__all__ = ["Damaged", "Run", "open_run", "run_exists"]


@dataclass(frozen=True, slots=True)
class Damaged:
    """A snapshot that cannot be read, and why."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Run:
    """What a run folder holds.

    Attributes:
        root: The folder.
        record: What the run stores.
        snapshots: Finished snapshots of the living timeline, in order of training time.
        abandoned: Finished snapshots that a later resume from an earlier state left behind.
        unfinished: Names of snapshots without the record that makes them exist.
        damaged: Snapshots whose record, layout or files cannot be what was written.
        head: The last session, which a resumed run continues; empty where nothing was stored.
    """

    root: Folder
    record: RunRecord
    snapshots: tuple[Snapshot, ...]
    abandoned: tuple[Snapshot, ...]
    unfinished: tuple[str, ...]
    damaged: tuple[Damaged, ...]
    head: str

    @property
    def numel(self) -> int:
        """Elements of one average of the whole model."""
        return sum(math.prod(parameter.shape) for parameter in self.record.parameters)

    @property
    def frozen_size(self) -> int:
        """Bytes of the files of frozen tensors."""
        folders = [f"{names.FROZEN}/{entry.name}" for entry in self.root.list(names.FROZEN) if entry.is_folder]
        return sum(entry.size for folder in folders for entry in self.root.list(folder))


def run_exists(root: str | os.PathLike[str] | Folder) -> bool:
    """Whether the folder holds a run's record."""
    return any(entry.name == names.RUN for entry in _opened(root).list(""))


def open_run(root: str | os.PathLike[str] | Folder) -> Run:
    """Look at a run folder. Reads records, no tensors.

    A snapshot that is damaged as far as records and lengths of files tell is set aside; the others are used.

    Args:
        root: Path or URL, or the folder.

    Raises:
        StoreError: There is no run, or its records are damaged or contradict each other.
    """
    folder = _opened(root)
    if not run_exists(folder):
        raise StoreError(
            f"{folder.url} is no run folder: expected {names.RUN} in it, found none",
            hint="give the folder that PostHocEMA was made with",
        )
    record = read_record(RunRecord, folder, names.RUN)
    _check_dtype(folder, STORED_BYTES, record.dtype)
    for tensor in record.raw:
        _check_dtype(folder, CODES, tensor.dtype)
    sessions = _sessions(folder, record)
    cutoffs = _cutoffs(folder, sessions)
    finished, unfinished, damaged = _Shelf(folder, record, sessions).sorted()
    living = [s for s in finished if s.t <= cutoffs[s.facts.session]]
    abandoned = [s for s in finished if s.t > cutoffs[s.facts.session]]
    order = tuple(sorted(living, key=lambda snapshot: snapshot.t))
    return Run(folder, record, order, tuple(abandoned), unfinished, damaged, head=next(iter(cutoffs), ""))


def _opened(root: str | os.PathLike[str] | Folder) -> Folder:
    return open_folder(root) if isinstance(root, str | os.PathLike) else root


def _check_dtype(folder: Folder, known: Iterable[str], dtype: str) -> None:
    if dtype not in known:
        raise StoreError(
            f"{folder.url}/{names.RUN}: expected a dtype of {', '.join(known)}, found {dtype}",
            hint="the record was edited, or a newer version wrote it; restore it or upgrade",
        )


def _sessions(folder: Folder, record: RunRecord) -> dict[str, SessionRecord]:
    found = [f"{names.SESSIONS}/{e.name}" for e in folder.list(names.SESSIONS) if e.name.endswith(".json")]
    sessions = {name: read_record(SessionRecord, folder, name) for name in found}
    for name, session in sessions.items():
        check_run(f"{folder.url}/{name}", record, session)
        if name != names.session_file(session.session):
            raise StoreError(
                f"{folder.url}/{name}: holds the record of session {session.session}",
                hint="records were swapped or copied; restore the run folder",
            )
    return {session.session: session for session in sessions.values()}


def _cutoffs(folder: Folder, sessions: Mapping[str, SessionRecord]) -> dict[str, float]:
    """Last training time of each session that still counts, from the newest session back to the first."""
    parents = {session.parent for session in sessions.values()}
    heads = [name for name in sessions if name not in parents]
    if sessions and len(heads) != 1:
        raise StoreError(
            f"{folder.url}: expected one newest session, found {len(heads)}: two runs were started in this folder at "
            "once",
            hint="keep one run's sessions and snapshots in this folder and move the other's away",
        )
    cutoffs, name, cutoff = {}, heads[0] if heads else "", math.inf
    while name in sessions and name not in cutoffs:
        cutoffs[name] = cutoff
        cutoff = min(cutoff, sessions[name].resumed_at)
        name = sessions[name].parent
    if name in cutoffs or len(cutoffs) != len(sessions):
        raise StoreError(
            f"{folder.url}: its sessions continue each other in a circle, expected one line from the first to the "
            "newest",
            hint="session records were edited or mixed; restore the run folder",
        )
    return cutoffs


class _Shelf:
    """Sorts the snapshots of a folder into finished, unfinished and damaged ones."""

    def __init__(self, folder: Folder, record: RunRecord, sessions: Mapping[str, SessionRecord]) -> None:
        self._folder, self._record, self._sessions = folder, record, sessions
        self._layouts: dict[str, Layout] = {}
        self._numbered: set[tuple[str, int]] = set()

    def sorted(self) -> tuple[list[Snapshot], tuple[str, ...], tuple[Damaged, ...]]:
        """All snapshots, by what they are."""
        finished, unfinished, damaged = [], [], []
        for entry in self._folder.list(names.SNAPSHOTS):
            if not entry.is_folder:
                continue
            name = f"{names.SNAPSHOTS}/{entry.name}"
            files = {file.name: file.size for file in self._folder.list(name)}
            if names.snapshot_file(name).rpartition("/")[2] not in files:
                unfinished.append(name)
                continue
            try:
                finished.append(self._snapshot(name, files))
            except StoreError as error:
                damaged.append(Damaged(name, error.message))
        return finished, tuple(unfinished), tuple(damaged)

    def _snapshot(self, name: str, files: Mapping[str, int]) -> Snapshot:
        where = f"{self._folder.url}/{name}"
        facts = read_record(SnapshotRecord, self._folder, names.snapshot_file(name))
        check_run(where, self._record, facts)
        session = self._sessions.get(facts.session)
        if session is None or len(facts.parts) != session.world_size or name != _name(facts):
            raise StoreError(
                f"{where}: its record is of snapshot {facts.snapshot} of session {facts.session} with "
                f"{len(facts.parts)} parts, which does not belong there",
                hint="records were swapped or copied; restore the folder or move it away",
            )
        self._check_files(where, facts, files)
        for each in self._sessions.values():
            if each.session not in self._layouts and each.session in self._needed(session):
                self._layouts[each.session] = read_layout(self._folder, self._record, each)
        numbers = [part.frozen for part in facts.parts]
        known = (self._folder, self._record, self._sessions, self._layouts)
        layers = frozen_layers(*known, facts.session, numbers)
        return Snapshot(self._folder, name, self._record, facts, self._layouts[facts.session], layers)

    def _needed(self, session: SessionRecord) -> set[str]:
        """The session and those whose frozen tensors it may refer to."""
        needed: set[str] = set()
        while session.session not in needed:
            needed.add(session.session)
            session = self._sessions.get(session.frozen_from, session)
        return needed

    def _check_files(self, where: str, facts: SnapshotRecord, files: Mapping[str, int]) -> None:
        for rank, part in enumerate(facts.parts):
            file = names.tensors_file(where, rank).rpartition("/")[2]
            if part.size and files.get(file) != part.size:
                found = "nothing" if file not in files else f"{files[file]} bytes"
                raise StoreError(
                    f"{where}/{file}: expected {part.size} bytes, found {found}",
                    hint="the file was cut short or removed; restore it from a backup",
                )


def _name(facts: SnapshotRecord) -> str:
    return names.snapshot_folder(facts.session, facts.snapshot)
