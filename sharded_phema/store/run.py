"""A run folder as it stands: its record, its sessions, and the snapshots of its living timeline."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from sharded_phema.errors import StoreError
from sharded_phema.manifest import LayoutRecord, PartRecord, RunRecord, SessionRecord
from sharded_phema.rounding import STORED_BYTES
from sharded_phema.store import names
from sharded_phema.store.reader import Snapshot
from sharded_phema.store.records import check_run, read_layouts, read_record
from sharded_phema.tensorfile import CODES

__all__ = ["Run", "open_run", "run_exists"]


@dataclass(frozen=True, slots=True)
class Run:
    """What a run folder holds.

    Attributes:
        root: The folder.
        record: What the run stores.
        snapshots: Finished snapshots of the living timeline, in order of training time.
        abandoned: How many finished snapshots a later resume from an earlier state left behind.
        unfinished: How many snapshots miss the part of some rank.
        head: The last session, which a resumed run continues; empty where nothing was stored.
    """

    root: Path
    record: RunRecord
    snapshots: tuple[Snapshot, ...]
    abandoned: int
    unfinished: int
    head: str

    @property
    def numel(self) -> int:
        """Elements of one average of the whole model."""
        return sum(math.prod(parameter.shape) for parameter in self.record.parameters)

    @property
    def frozen_size(self) -> int:
        """Bytes of the files of frozen tensors."""
        return sum(path.stat().st_size for path in names.frozen_files(self.root))


def run_exists(root: str | Path) -> bool:
    """Whether the folder holds a run's record."""
    return names.run_path(Path(root)).is_file()


def open_run(root: str | Path) -> Run:
    """Look at a run folder. Reads records, no tensors.

    Raises:
        StoreError: There is no run, or its records are damaged or contradict each other.
    """
    root = Path(root)
    if not run_exists(root):
        raise StoreError(
            f"{root} is no run folder: expected {names.run_path(root).name} in it, found none",
            hint="give the folder that PostHocEMA was made with",
        )
    record = read_record(RunRecord, names.run_path(root))
    _check_dtype(root, STORED_BYTES, record.dtype)
    for tensor in record.raw:
        _check_dtype(root, CODES, tensor.dtype)
    sessions = _sessions(root, record)
    cutoffs = _cutoffs(root, sessions)
    layouts: dict[str, tuple[LayoutRecord, ...]] = {}
    found = [_snapshot(root, folder, record, sessions, layouts) for folder in names.snapshot_folders(root)]
    finished = [snapshot for snapshot in found if snapshot is not None]
    living = [s for s in finished if s.t <= cutoffs[s.parts[0].session]]
    return Run(
        root,
        record,
        tuple(sorted(living, key=lambda snapshot: snapshot.t)),
        abandoned=len(finished) - len(living),
        unfinished=len(found) - len(finished),
        head=next(iter(cutoffs), ""),
    )


def _check_dtype(root: Path, known: Iterable[str], dtype: str) -> None:
    if dtype not in known:
        raise StoreError(
            f"{names.run_path(root)}: expected a dtype of {', '.join(known)}, found {dtype}",
            hint="the record was edited, or a newer version wrote it; restore it or upgrade",
        )


def _sessions(root: Path, record: RunRecord) -> dict[str, SessionRecord]:
    sessions = [read_record(SessionRecord, path) for path in names.session_paths(root)]
    for session in sessions:
        check_run(root, record, session)
    return {session.session: session for session in sessions}


def _cutoffs(root: Path, sessions: Mapping[str, SessionRecord]) -> dict[str, float]:
    """Last training time of each session that still counts, from the newest session back to the first."""
    parents = {session.parent for session in sessions.values()}
    heads = [name for name in sessions if name not in parents]
    if sessions and len(heads) != 1:
        raise StoreError(
            f"{root}: expected one newest session, found {len(heads)}: two runs were started in this folder at once",
            hint="keep one run's sessions and snapshots in this folder and move the other's away",
        )
    cutoffs, name, cutoff = {}, heads[0] if heads else "", math.inf
    while name in sessions and name not in cutoffs:
        cutoffs[name] = cutoff
        cutoff = min(cutoff, sessions[name].resumed_at)
        name = sessions[name].parent
    if name in cutoffs or len(cutoffs) != len(sessions):
        raise StoreError(
            f"{root}: its sessions continue each other in a circle, expected one line from the first to the newest",
            hint="session records were edited or mixed; restore the run folder",
        )
    return cutoffs


def _snapshot(
    root: Path,
    folder: Path,
    record: RunRecord,
    sessions: Mapping[str, SessionRecord],
    layouts: dict[str, tuple[LayoutRecord, ...]],
) -> Snapshot | None:
    """The snapshot in a folder, or None while the part of some rank is missing."""
    parts = tuple(read_record(PartRecord, path) for path in names.part_paths(folder))
    if not parts or parts[0].session not in sessions:
        return None
    for part in parts:
        check_run(folder, record, part)
    session = sessions[parts[0].session]
    moments = {(part.session, part.snapshot, part.t, part.start) for part in parts}
    if len(moments) != 1 or [part.rank for part in parts] != list(range(session.world_size)):
        if len(moments) == 1 and len(parts) < session.world_size:
            return None
        raise StoreError(
            f"{folder}: its parts are of different snapshots or ranks: {sorted(moments)}",
            hint="parts were swapped or copied between snapshots; restore the folder or move it away",
        )
    if session.session not in layouts:
        layouts[session.session] = read_layouts(root, record, session)
    return Snapshot(folder, record, parts, layouts[session.session])
