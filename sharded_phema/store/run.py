"""A run folder as it stands: its record, its sessions, and the snapshots of its living timeline."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sharded_phema.errors import StoreError
from sharded_phema.manifest import LayoutRecord, PartRecord, R, RunRecord, SessionRecord, decode
from sharded_phema.rounding import STORED_BYTES
from sharded_phema.store import names
from sharded_phema.store.reader import Snapshot

__all__ = ["Run", "open_run", "run_exists"]


@dataclass(frozen=True, slots=True)
class Run:
    """What a run folder holds.

    Attributes:
        root: The folder.
        record: What the run averages.
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
    record = _read(RunRecord, names.run_path(root))
    if record.dtype not in STORED_BYTES:
        raise StoreError(
            f"{names.run_path(root)}: expected a dtype of {', '.join(STORED_BYTES)}, found {record.dtype}",
            hint="the record was edited, or a newer version wrote it; restore it or upgrade",
        )
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


def _sessions(root: Path, record: RunRecord) -> dict[str, SessionRecord]:
    sessions = [_read(SessionRecord, path) for path in names.session_paths(root)]
    for session in sessions:
        _check_run(root, record, session)
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
    parts = tuple(_read(PartRecord, path) for path in names.part_paths(folder))
    if not parts or parts[0].session not in sessions:
        return None
    for part in parts:
        _check_run(folder, record, part)
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
        layouts[session.session] = _layouts(root, record, session)
    return Snapshot(folder, record, parts, layouts[session.session])


def _layouts(root: Path, record: RunRecord, session: SessionRecord) -> tuple[LayoutRecord, ...]:
    paths = (names.layout_path(root, session.session, rank) for rank in range(session.world_size))
    layouts = tuple(_read(LayoutRecord, path) for path in paths)
    for rank, layout in enumerate(layouts):
        _check_run(root, record, layout)
        expected = (session.session, rank, len(record.parameters))
        if (layout.session, layout.rank, len(layout.boxes)) != expected:
            raise StoreError(
                f"{names.layout_path(root, session.session, rank)}: expected session, rank and parameters {expected}, "
                f"found {(layout.session, layout.rank, len(layout.boxes))}",
                hint="the layout was swapped with another's; restore the run folder",
            )
    return layouts


def _check_run(where: Path, run: RunRecord, record: SessionRecord | LayoutRecord | PartRecord) -> None:
    if record.run != run.run:
        raise StoreError(
            f"{where}: holds a {type(record).__name__} of run {record.run}, the folder is of run {run.run}",
            hint="files of two runs were mixed; move the foreign ones away",
        )


def _read(kind: type[R], path: Path) -> R:
    try:
        text = path.read_bytes()
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error}", hint="restore the run folder from a backup") from error
    return decode(kind, text, path)
