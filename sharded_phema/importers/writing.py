"""Writing: foreign checkpoints streamed into a run folder, which is a run only once all of them are there."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from sharded_phema.errors import OutputError
from sharded_phema.folder import Folder, is_there
from sharded_phema.importers.agreement import Model, check_open, identity_of
from sharded_phema.importers.contract import Foreign, Tensors
from sharded_phema.importers.portions import Portion, empty_shards, portions, shards_of
from sharded_phema.manifest import Part, RunRecord, SessionRecord, SnapshotRecord
from sharded_phema.store import (
    claim_run,
    commit_snapshot,
    create_run,
    here,
    layout_id,
    layout_record,
    remove_unfinished,
    run_exists,
    snapshot_folder,
    squared_norms,
    start_session,
    write_part,
)
from sharded_phema.store.names import snapshot_file

__all__ = ["NOTE", "Progress", "write_run"]

NOTE = "importing.json"
"""Says what is being imported, as long as the folder is no run yet."""

Progress = Callable[[Sequence[float], Iterable[int]], Iterable[int]]
"""Is given the bytes that each step moves, and the steps; gives the steps on, one by one."""

# Share of the budget that a part may take: its numbers lie in memory twice where they are put together from pieces.
_SHARE = 0.4


@dataclass(frozen=True, slots=True)
class _Import:
    """What is written where."""

    folder: Folder
    model: Model
    run: RunRecord
    session: str
    parts: tuple[Portion, ...]


def write_run(
    folder: Folder, checkpoints: Sequence[Foreign], model: Model, unit: str, memory: int, progress: Progress
) -> None:
    """Write a run of the checkpoints. At most ``memory`` bytes of tensors are held at a time.

    The run's own record is written last: until then no reader takes the folder for a run. An import that was
    interrupted goes on with the next checkpoint when it is started again alike.

    Args:
        folder: Where the run is made; nothing may lie there, but what the same import left behind.
        checkpoints: In order of time.
        model: What they have in common.
        unit: What training time counts.
        memory: Bytes.
        progress: Is given what each step moves.

    Raises:
        OutputError: Something else lies there.
        OrderError: Another process imports into the folder.
        StoreError: A checkpoint cannot be read, or the folder cannot be written.
    """
    parts = portions(model, max(int(_SHARE * memory), 1))
    identity = identity_of(checkpoints, model, unit, ranges=[part.ranges for part in parts])
    raw = {"dtype": model.dtype, "copied": model.copied}
    run = RunRecord(identity, unit, model.averages, model.parameters, **raw)  # type: ignore[arg-type]
    task = _Import(folder, model, run, identity[:12], parts)
    _prepare(folder, identity)
    claim = claim_run(folder, run)
    try:
        layout = layout_record(run, [here(empty_shards(model, part)) for part in parts])
        start_session(folder, SessionRecord(identity, task.session, "", 0.0, len(parts), layout_id(layout)), layout)
        _write_all(task, checkpoints, progress)
        create_run(folder, run)
        folder.remove(NOTE)
    finally:
        claim.release()


def _write_all(task: _Import, checkpoints: Sequence[Foreign], progress: Progress) -> None:
    steps = [(number, rank) for number in range(len(checkpoints)) for rank in range(len(task.parts))]
    sizes = [float(task.parts[rank].nbytes) for _, rank in steps]
    tensors, where = next(iter(checkpoints[0].open().values())), checkpoints[0].where
    writer: list[_Snapshot] = []
    for step in progress(sizes, range(len(steps))):
        number, rank = steps[step]
        if rank == 0:
            writer = [_Snapshot(task, number, checkpoints[number])]
            # Once more: files may have changed since they were compared.
            writer[0].open(lambda: check_open(task.model, tensors, where, checkpoints[number]))  # noqa: B023
        writer[0].write(rank)


class _Snapshot:
    """One checkpoint as it is written, part after part; the last part commits it."""

    def __init__(self, task: _Import, number: int, checkpoint: Foreign) -> None:
        self._task = task
        self._averages: Mapping[str, Tensors] = {}
        self._record = SnapshotRecord(task.run.run, task.session, number, checkpoint.t, checkpoint.start, ())
        self._parts: list[Part] = []
        self._sums: list[tuple[tuple[float, ...], tuple[float, ...]]] = []
        name = snapshot_folder(task.session, number)
        self._done = is_there(task.folder, snapshot_file(name))
        if not self._done:
            remove_unfinished(task.folder, (name,))

    def open(self, act: Callable[[], Mapping[str, Tensors]]) -> None:
        """Read the checkpoint's headers, unless it is stored already."""
        if not self._done:
            self._averages = act()

    def write(self, rank: int) -> None:
        """Store a part; with the last, the snapshot."""
        if self._done:
            return
        task, part = self._task, self._task.parts[rank]
        held = {label: shards_of(task.model, part, tensors) for label, tensors in self._averages.items()}
        copied = shards_of(task.model, part, next(iter(self._averages.values())), copied=True)
        self._parts.append(write_part(task.folder, self._record, rank, held, copied, dtype=task.model.dtype))
        self._sums.append(squared_norms(tuple(held.values())))
        if len(self._parts) == len(task.parts):
            norms, gaps = (_added(sums) for sums in zip(*self._sums, strict=True))
            commit_snapshot(task.folder, replace(self._record, parts=tuple(self._parts), norms=norms, gaps=gaps))


def _added(sums: Sequence[tuple[float, ...]]) -> tuple[float, ...]:
    """Sums over the parts; none where a part holds numbers that are not finite."""
    return tuple(map(math.fsum, zip(*sums, strict=True))) if all(sums) else ()


def _prepare(folder: Folder, identity: str) -> None:
    """Prove that nothing else lies in the folder, and leave the note there.

    Raises:
        OutputError: Something does.
    """
    if run_exists(folder):
        raise OutputError(
            f"{folder.url}: a run lies there already; an import makes its own",
            hint="give another folder with -o, or remove this one",
        )
    text = json.dumps({"importing": identity}).encode()
    if is_there(folder, NOTE):
        if folder.read(NOTE, 1 << 16) != text:
            raise OutputError(
                f"{folder.url}: an import of other files, or with other options, was interrupted there",
                hint="start that one again to finish it, or remove the folder",
            )
        return
    if folder.list(""):
        raise OutputError(f"{folder.url}: is not empty", hint="give a folder of its own with -o")
    folder.write(NOTE, [text])
