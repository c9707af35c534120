"""A run folder as it stands: its record, its sessions, and the snapshots of its living timeline."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from sharded_phema.errors import StoreError
from sharded_phema.folder import Folder, is_there, of_each, open_folder
from sharded_phema.manifest import RunRecord, SessionRecord
from sharded_phema.rounding import STORED_BYTES
from sharded_phema.store import names
from sharded_phema.store.reader import Snapshot
from sharded_phema.store.records import check_run, read_record
from sharded_phema.store.shelf import Damaged, Shelf, raw_bytes
from sharded_phema.tensorfile import CODES

__all__ = ["Run", "open_run", "open_whole", "run_exists", "sessions_of"]


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

    def without(self, broken: Mapping[str, str]) -> Run:
        """The run without some snapshots, given why by name, which turned out to be damaged."""
        kept = tuple(s for s in self.snapshots if s.name not in broken)
        left = [Damaged(s.name, broken[s.name], s.facts) for s in self.snapshots if s.name in broken]
        return replace(self, snapshots=kept, damaged=(*self.damaged, *left))

    @property
    def numel(self) -> int:
        """Elements of one average of the whole model."""
        return sum(math.prod(parameter.shape) for parameter in self.record.parameters)

    def check_frozen(self) -> None:
        """Prove that the files of frozen tensors are long enough for them, before memory is made for these.

        Raises:
            StoreError: They are not.
        """
        if (found := self.frozen_size) < (expected := raw_bytes(self.record.frozen)):
            message = f"{self.root.url}/{names.FROZEN}: expected at least {expected} bytes of tensors, found {found}"
            raise StoreError(message, hint="files were removed, or the run's record was edited; restore the run folder")

    @property
    def frozen_size(self) -> int:
        """Bytes of the files of frozen tensors."""
        folders = [f"{names.FROZEN}/{entry.name}" for entry in self.root.list(names.FROZEN) if entry.is_folder]
        files = [entry for folder in folders for entry in self.root.list(folder)]
        return sum(entry.size for entry in files if entry.name.endswith(".safetensors"))


def run_exists(root: str | os.PathLike[str] | Folder) -> bool:
    """Whether the folder holds a run's record."""
    return is_there(_opened(root), names.RUN)


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
    finished, unfinished, damaged = Shelf(folder, record, sessions).sorted()
    living = [s for s in finished if s.t <= cutoffs[s.facts.session]]
    abandoned = [s for s in finished if s.t > cutoffs[s.facts.session]]
    order = tuple(sorted(living, key=lambda snapshot: snapshot.t))
    damaged = tuple(replace(d, abandoned=d.facts.t > cutoffs[d.facts.session]) if d.facts else d for d in damaged)
    return Run(folder, record, order, tuple(abandoned), unfinished, damaged, head=next(iter(cutoffs), ""))


def open_whole(root: str | os.PathLike[str] | Folder | Run) -> Run:
    """The same, for a reader of all of the model: ``check_frozen`` too. A run that is open is taken as it is."""
    if isinstance(root, Run):
        return root
    run = open_run(root)
    run.check_frozen()
    return run


def sessions_of(run: Run) -> tuple[SessionRecord, ...]:
    """Sessions of a run, from the first to the newest, each of which continued the one before it.

    Raises:
        StoreError: A record is damaged.
    """
    sessions = _sessions(run.root, run.record)
    return tuple(sessions[name] for name in reversed(_cutoffs(run.root, sessions)))


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
    records = of_each(folder, lambda name: read_record(SessionRecord, folder, name), found)
    sessions = dict(zip(found, records, strict=True))
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
