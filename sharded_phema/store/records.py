"""Records as they lie in a run folder: read, and proved to belong to the run."""

from __future__ import annotations

from pathlib import Path

from sharded_phema.errors import StoreError
from sharded_phema.manifest import FrozenRecord, LayoutRecord, PartRecord, R, RunRecord, SessionRecord, decode
from sharded_phema.store import names

__all__ = ["check_run", "read_layouts", "read_record"]


def read_record(kind: type[R], path: Path) -> R:
    """The record in a file.

    Raises:
        StoreError: It cannot be read, or is no such record.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error}", hint="restore the run folder from a backup") from error
    return decode(kind, text, path)


def check_run(where: Path, run: RunRecord, record: SessionRecord | LayoutRecord | PartRecord | FrozenRecord) -> None:
    """Prove that a record is of the run in whose folder it lies.

    Raises:
        StoreError: It is not.
    """
    if record.run != run.run:
        raise StoreError(
            f"{where}: holds a {type(record).__name__} of run {record.run}, the folder is of run {run.run}",
            hint="files of two runs were mixed; move the foreign ones away",
        )


def read_layouts(root: Path, record: RunRecord, session: SessionRecord) -> tuple[LayoutRecord, ...]:
    """What each rank of a session stores.

    Raises:
        StoreError: A layout is missing, damaged, or another's.
    """
    paths = [names.layout_path(root, session.session, rank) for rank in range(session.world_size)]
    layouts = tuple(read_record(LayoutRecord, path) for path in paths)
    for rank, (path, layout) in enumerate(zip(paths, layouts, strict=True)):
        check_run(root, record, layout)
        expected = (session.session, rank, len(record.parameters), len(record.copied), len(record.frozen))
        found = (layout.session, layout.rank, len(layout.boxes), len(layout.copied), len(layout.frozen))
        if found != expected:
            raise StoreError(
                f"{path}: expected session, rank and numbers of tensors {expected}, found {found}",
                hint="the layout was swapped with another's; restore the run folder",
            )
    return layouts
