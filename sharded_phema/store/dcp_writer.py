"""A snapshot as something that ``torch.distributed.checkpoint.save`` writes, in a user's own code."""

from __future__ import annotations

import math
import os
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from sharded_phema.errors import OrderError, StoreError, check_number
from sharded_phema.folder import Folder, open_folder
from sharded_phema.identity import check_same_model, run_record
from sharded_phema.layout import ParamShard
from sharded_phema.manifest import LayoutRecord, Part, RunRecord, SessionRecord, SnapshotRecord
from sharded_phema.rounding import check_dtype
from sharded_phema.store import names
from sharded_phema.store.claims import Claim, claim_run
from sharded_phema.store.cuts import here, layout_record
from sharded_phema.store.norms import squared_norms
from sharded_phema.store.records import layout_id
from sharded_phema.store.run import Run, open_run, run_exists
from sharded_phema.store.shares import Piece, Shares, pieces_of_plan, share_out
from sharded_phema.store.tensors import write_tensors
from sharded_phema.store.upkeep import remove_unfinished
from sharded_phema.store.writer import commit_snapshot, create_run, start_session
from sharded_phema.tracked import tracked_set

__all__ = ["SnapshotWriter"]


@dataclass(frozen=True, slots=True)
class _Task:
    """What a rank is to write.

    Attributes:
        record: The snapshot's, without its parts.
        rank: Who writes.
        dtype: What is stored.
        averages: Labels of the run, in order.
        places: Average, parameter, its shape, and number of the box, of each item of the plan.
    """

    record: SnapshotRecord
    rank: int
    dtype: str
    averages: tuple[str, ...]
    places: tuple[tuple[str, str, tuple[int, ...], int], ...]


@dataclass(frozen=True, slots=True)
class _Told:
    """What a rank wrote, with the norms of its part, as ``squared_norms`` gives them."""

    part: Part
    norms: tuple[float, ...]
    gaps: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class _Draft:
    """What rank 0 writes down once all parts are in storage."""

    folder: Folder
    claim: Claim
    session: SessionRecord
    layout: LayoutRecord
    record: SnapshotRecord


class SnapshotWriter(StorageWriter):
    """Writes one snapshot: ``dcp.save({label: {name: tensor}}, storage_writer=SnapshotWriter("run/ema", t, start=1))``.

    For averages that a training keeps itself. Tensors may be plain, DTensors or anything else that DCP saves; each rank
    writes what it alone holds, and what several hold is written once. Labels say what the averages follow, as
    ``PostHocEMA`` takes it: ``"0.05"``, ``"power:gamma=6.94"``, ``"exponential:decay=0.9999"``. A run folder is made,
    or continued, in a session of its own. It then holds an ordinary snapshot: ``reconstruct``, ``SnapshotReader`` and
    the command line read it. A run that copies other tensors into its snapshots is refused, for it would not be whole.

    What is wrong is raised by ``dcp.save`` as its CheckpointException, whose ``failures`` hold errors of this package.
    What can be known before is refused before anything is written.

    Args:
        root: Path or URL of the run folder, on storage that all ranks share.
        t: Training time of the averages, in ``unit``.
        start: Training time of the first weights that entered them.
        unit: What training time counts.
        dtype: What the run stores: float32, float16 or bfloat16.
        resumed_at: Training time of the state that the training went back to, with the first snapshot after that:
            snapshots later than it belong to an abandoned timeline from then on. Left out, the last one is continued.

    Raises:
        TargetError: A time or the dtype is impossible.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        t: float,
        *,
        start: float,
        unit: str = "steps",
        dtype: str = "float32",
        resumed_at: float | None = None,
    ) -> None:
        check_dtype(dtype)
        check_number(t, "t", "of at least 0", lambda t: t >= 0, "give the training time of the averages")
        check_number(start, "start", f"from 0 to t={t:g}", lambda s: 0 <= s <= t, "give the time of the first update")
        if resumed_at is not None:
            check_number(resumed_at, "resumed_at", f"from 0 to t={t:g}", lambda r: 0 <= r <= t, "or leave it out")
        self._root, self._unit, self._dtype = root, unit, dtype
        self._t, self._start, self._resumed_at = float(t), float(start), resumed_at
        self._draft: _Draft | None = None

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Refuse to be pointed elsewhere: the folder and the time are the writer's."""
        if checkpoint_id is not None:
            raise StoreError(
                f"a writer into {self._root} cannot save {checkpoint_id}",
                hint="leave checkpoint_id out; a snapshot is told by its training time",
            )

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Refuse ranks that do not tell each other what they write."""
        if not kwargs.get("use_collectives", True):
            raise StoreError("a snapshot of ranks that know nothing of each other", hint="leave use_collectives=True")

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """The plan with all that this rank holds, which a planner's own choice between replicas may leave out."""
        return replace(plan, storage_data=pieces_of_plan(plan))

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Open the run, or make it, and tell each rank what it writes. Called on one rank."""
        shares = share_out([plan.storage_data for plan in plans])
        labels = dict(zip(shares.averages, tracked_set(shares.averages, 0.0).labels, strict=True))
        folder = open_folder(self._root)
        run = open_run(folder) if run_exists(folder) else None
        record = self._run_record(run, shares, labels)
        resumed_at = 0.0 if run is None else self._check_model_and_time(run, record)
        draft = self._draft = self._drafted(folder, run, record, shares, resumed_at)
        tasks = [
            _Task(draft.record, rank, record.dtype, record.averages, _places(pieces, labels))
            for rank, pieces in enumerate(shares.ranks)
        ]
        items = [[piece.item for piece in pieces] for pieces in shares.ranks]
        return [replace(plan, items=i, storage_data=task) for plan, i, task in zip(plans, items, tasks, strict=True)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Store this rank's part."""
        try:
            tensors = [_resolved(planner.resolve_data(item)) for item in plan.items]
            told = self._written(plan.storage_data, tensors) if tensors else None
        except BaseException:
            # Of another rank's failure nothing tells this one: the claim stays then, for this process alone to renew.
            self._give_up()
            raise
        future: Future[list[WriteResult]] = Future()
        future.set_result(
            [WriteResult(item.index, x.numel() * x.itemsize, told) for item, x in zip(plan.items, tensors, strict=True)]
        )
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Make the snapshot exist. Called on one rank, once all parts are in storage."""
        draft = self._draft
        assert draft is not None, "the plan was made on this rank"
        told = [rank[0].storage_data for rank in results if rank]
        parts = tuple(rank[0].storage_data.part if rank else Part() for rank in results)
        norms, gaps = _added([one.norms for one in told]), _added([one.gaps for one in told])
        try:
            draft.claim.check()
            start_session(draft.folder, draft.session, draft.layout)
            commit_snapshot(draft.folder, replace(draft.record, parts=parts, norms=norms, gaps=gaps))
        finally:
            self._give_up()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Never chosen by path: a snapshot needs a time."""
        return False

    def _give_up(self) -> None:
        if self._draft is not None:
            self._draft.claim.release()
            self._draft = None

    def _run_record(self, run: Run | None, shares: Shares, labels: Mapping[str, str]) -> RunRecord:
        """The record that a run of these averages must have; in the order of the run that is there."""
        found = RunRecord("", "", (), ()) if run is None else run.record
        averages = sorted(labels.values(), key=_places_in(found.averages))
        order = _places_in([parameter.name for parameter in found.parameters])
        record = run_record(found.run or uuid.uuid4().hex, self._unit, averages, (), dtype=self._dtype)
        return replace(record, parameters=tuple(sorted(shares.parameters, key=lambda each: order(each.name))))

    def _check_model_and_time(self, run: Run, record: RunRecord) -> float:
        """Training time that this snapshot's session continues from."""
        check_same_model(run.root.url, run.record, record)
        times = [snapshot.t for snapshot in run.snapshots]
        resumed_at = (times[-1] if times else 0.0) if self._resumed_at is None else float(self._resumed_at)
        last = max((t for t in times if t <= resumed_at), default=-math.inf)
        if self._t <= last:
            raise OrderError(
                f"{run.root.url}: a snapshot at {self._unit} {self._t:.17g}, and the run holds one at {last:.17g}",
                hint="snapshots are never overwritten: give a later t, or resumed_at to leave later ones behind",
            )
        return resumed_at if run.head else 0.0

    def _drafted(self, folder: Folder, run: Run | None, record: RunRecord, shares: Shares, resumed_at: float) -> _Draft:
        """All that is known before the parts are written. From here on the run is this process's."""
        layout = _layout(record, shares)
        name = uuid.uuid4().hex[:12]
        head = "" if run is None else run.head
        session = SessionRecord(record.run, name, head, resumed_at, len(shares.ranks), layout_id(layout))
        if run is None:
            create_run(folder, record)
        claim = claim_run(folder, record)
        if run is not None and run.unfinished:
            remove_unfinished(folder, run.unfinished)
        return _Draft(folder, claim, session, layout, SnapshotRecord(record.run, name, 0, self._t, self._start, ()))

    def _written(self, task: _Task, tensors: Sequence[Tensor]) -> _Told:
        averages: dict[str, list[ParamShard]] = {label: [] for label in task.averages}
        keyed = {}
        for (label, name, shape, number), tensor in zip(task.places, tensors, strict=True):
            keyed[names.box_key(names.tensor_name(label, name), number)] = tensor
            averages[label].append(_shard(name, shape, (), tensor))
        file = names.tensors_file(names.snapshot_folder(task.record.session, task.record.snapshot), task.rank)
        dtypes = dict.fromkeys(keyed, task.dtype)
        written = write_tensors(open_folder(self._root), file, keyed, dtypes, task.record.identity(task.rank))
        return _Told(Part(*written), *squared_norms([tuple(shards) for shards in averages.values()]))


def _layout(run: RunRecord, shares: Shares) -> LayoutRecord:
    nothing, ranks = torch.empty(0), []
    for rank in range(len(shares.ranks)):
        boxes = shares.boxes(rank)
        ranks.append(here([tuple(_shard(p.name, p.shape, boxes.get(p.name, ()), nothing) for p in run.parameters)]))
    return layout_record(run, ranks)


def _shard(name: str, shape: tuple[int, ...], boxes: tuple[Any, ...], local: Tensor) -> ParamShard:
    return ParamShard(name, shape, boxes, local, lambda: local)


def _places(pieces: Sequence[Piece], labels: Mapping[str, str]) -> tuple[tuple[str, str, tuple[int, ...], int], ...]:
    """Of each piece its average, parameter and shape, and its number among the rank's boxes of that parameter."""
    seen: Counter[tuple[str, str]] = Counter()
    places = []
    for piece in pieces:
        key = labels[piece.average], piece.name
        places.append((*key, piece.shape, seen[key]))
        seen[key] += 1
    return tuple(places)


def _places_in(known: Sequence[str]) -> Any:
    """Sorts as a list does; what is not in it comes last, in its own order."""
    places = {name: place for place, name in enumerate(known)}
    return lambda name: places.get(name, len(places))


def _resolved(data: object) -> Tensor:
    assert isinstance(data, Tensor), "only pieces of tensors are planned"
    return data.detach()


def _added(ranks: Sequence[tuple[float, ...]]) -> tuple[float, ...]:
    """Sums over ranks; empty where a rank has none."""
    return tuple(math.fsum(values) for values in zip(*ranks, strict=True)) if all(ranks) else ()
