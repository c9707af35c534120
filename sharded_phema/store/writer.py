"""Writing: a run's record, a session's layout, each rank's part of a snapshot, and the record that commits it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from sharded_phema.errors import StoreError
from sharded_phema.folder import Folder
from sharded_phema.layout import ShardLayout
from sharded_phema.manifest import LayoutRecord, Part, RunRecord, SessionRecord, SnapshotRecord
from sharded_phema.store import names
from sharded_phema.store.boxes import BoxTensor, pieces_of
from sharded_phema.store.records import write_record
from sharded_phema.store.tensors import write_tensors
from sharded_phema.tensorfile import dtype_name, torch_dtype

__all__ = ["commit_snapshot", "create_run", "start_session", "write_part"]


def create_run(folder: Folder, record: RunRecord) -> None:
    """Make the folder of a new run. Called by one rank."""
    write_record(folder, names.RUN, record)


def start_session(folder: Folder, record: SessionRecord, layout: LayoutRecord) -> None:
    """Record a session and what its ranks write; a layout that is there already is kept. Called by one rank."""
    write_record(folder, names.layout_file(record.layout), layout)
    write_record(folder, names.session_file(record.session), record)


def commit_snapshot(folder: Folder, record: SnapshotRecord) -> None:
    """Make a snapshot exist, once all ranks' parts are in storage. Called by one rank."""
    write_record(folder, names.snapshot_file(names.snapshot_folder(record.session, record.snapshot)), record)


def write_part(
    folder: Folder,
    record: SnapshotRecord,
    rank: int,
    averages: Mapping[str, ShardLayout],
    copied: ShardLayout = (),
    *,
    dtype: str = "float32",
) -> Part:
    """Store this rank's boxes of every average and of the copied tensors. Called by every rank, no collective.

    Args:
        folder: The run folder.
        record: Of which snapshot; its parts are not looked at.
        rank: Who writes.
        averages: For each label of the run's record the average's shards; only first replicas are stored.
        copied: Shards of the copied tensors, which are stored in the dtype that they have.
        dtype: What averages are rounded to: the dtype of the run's record.

    Returns:
        What was written; nothing where this rank holds nothing.

    Raises:
        StoreError: A file exists already or cannot be written, or a number is too large for the dtype.
    """
    state = {
        names.tensor_name(label, shard.name): BoxTensor.of(shard)
        for label, layout in averages.items()
        for shard in layout
        if shard.replica == 0
    }
    dtypes = dict.fromkeys(state, dtype)
    for shard in copied:
        if shard.replica == 0:
            name = names.copied_name(shard.name)
            state[name] = BoxTensor(shard.global_shape, pieces_of(shard), shard.local)
            dtypes[name] = dtype_name(shard.local.dtype)
    file = names.tensors_file(names.snapshot_folder(record.session, record.snapshot), rank)
    writer = _PartWriter(folder, file, record.identity(rank), dtypes)
    with warnings.catch_warnings():
        # Each rank saves for itself on purpose: what the ranks hold was agreed when the averages were made.
        warnings.filterwarnings("ignore", message=".*single process.*")
        planner = DefaultSavePlanner(flatten_state_dict=False)
        try:
            save(state, storage_writer=writer, planner=planner, no_dist=True)
        except CheckpointException as wrapped:
            # It derives from BaseException, which no caller would catch.
            raise next(iter(wrapped.failures.values()))[0] from None
    return writer.written[0]


@dataclass
class _PartWriter(StorageWriter):
    """Stores one rank's plan as a safetensors file."""

    folder: Folder
    file: str
    identity: Mapping[str, str]
    dtypes: Mapping[str, str]
    written: list[Part] = field(default_factory=list)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        if checkpoint_id is not None:
            raise StoreError(f"{self.file} cannot be saved as {checkpoint_id}", hint="leave checkpoint_id out")

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass  # nothing is shared between ranks

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        items, keys = plan.items, _keys(plan.items)
        tensors = {key: _resolved(planner, item) for key, item in zip(keys, items, strict=True)}
        dtypes = {key: self.dtypes[item.index.fqn] for key, item in zip(keys, items, strict=True)}
        if tensors:
            self.written.append(Part(*write_tensors(self.folder, self.file, tensors, dtypes, self.identity)))
        else:
            self.written.append(Part())
        sizes = [torch_dtype(dtypes[key]).itemsize * tensors[key].numel() for key in keys]
        results = [WriteResult(item.index, size, None) for item, size in zip(items, sizes, strict=True)]
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        pass  # the snapshot's record is the commit

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return False


def _resolved(planner: SavePlanner, item: WriteItem) -> Tensor:
    data = planner.resolve_data(item)
    assert isinstance(data, Tensor), "only boxes of tensors are planned"
    return data.detach()


def _keys(items: list[WriteItem]) -> list[str]:
    """Key of each item in the tensor file; the boxes of one tensor are counted in the order of its layout."""
    seen: dict[str, int] = {}
    keys = []
    for item in items:
        if item.type != WriteItemType.SHARD:
            raise StoreError(f"{item.index.fqn} is no sharded tensor", hint="snapshots hold tensors only")
        keys.append(names.box_key(item.index.fqn, seen.setdefault(item.index.fqn, 0)))
        seen[item.index.fqn] += 1
    return keys
