"""Writing: a run's record, a session's layout, and each rank's own part of every snapshot."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
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
from sharded_phema.layout import ShardLayout
from sharded_phema.manifest import LayoutRecord, PartRecord, RunRecord, SessionRecord, encode
from sharded_phema.store import names
from sharded_phema.store.boxes import BoxTensor, pieces_of
from sharded_phema.store.files import place, write_text
from sharded_phema.store.norms import squared_norms
from sharded_phema.store.tensors import write_tensors
from sharded_phema.tensorfile import dtype_name, torch_dtype

__all__ = ["create_run", "start_session", "write_snapshot"]


def create_run(root: Path, record: RunRecord) -> None:
    """Make the folder of a new run. Called by one rank."""
    write_text(names.run_path(root), encode(record))


def start_session(
    root: Path,
    record: SessionRecord,
    rank: int,
    layout: ShardLayout,
    copied: ShardLayout = (),
    frozen: ShardLayout = (),
    marks: tuple[int, ...] = (),
) -> None:
    """Record which boxes this rank will store; rank 0 records the session too. Called by every rank, no collective.

    What an earlier attempt of this session left, equal to the last byte, is kept.

    Args:
        root: Run folder.
        record: The session.
        rank: This rank.
        layout: The averaged parameters.
        copied: The copied tensors.
        frozen: The frozen tensors.
        marks: Fingerprints of the rank's boxes of those that the session found stored; see the record.
    """
    boxes, raw, once = (
        tuple(shard.boxes if shard.replica == 0 else () for shard in part) for part in (layout, copied, frozen)
    )
    layout_record = LayoutRecord(record.run, record.session, rank, boxes, raw, once, marks)
    texts = {names.layout_path(root, record.session, rank): encode(layout_record)}
    if rank == 0:
        texts[names.session_path(root, record.session)] = encode(record)
    for path, text in texts.items():
        if not (path.is_file() and path.read_text() == text):
            write_text(path, text)


def write_snapshot(
    root: Path,
    part: PartRecord,
    averages: Mapping[str, ShardLayout],
    copied: ShardLayout = (),
    *,
    dtype: str = "float32",
) -> Path:
    """Store this rank's boxes of every average and of the copied tensors. Called by every rank, no collective.

    The snapshot exists for readers once the last rank's part is on disk.

    Args:
        root: Run folder.
        part: Who writes what, and when; its size and norms are found here.
        averages: For each label of the run's record the average's shards; only first replicas are stored.
        copied: Shards of the copied tensors, which are stored in the dtype that they have.
        dtype: What averages are rounded to: the dtype of the run's record.

    Returns:
        The snapshot's folder, the same on all ranks.

    Raises:
        StoreError: A file exists already or cannot be written, or a number is too large for the dtype.
    """
    folder = names.snapshot_folder(root, part.session, part.snapshot)
    norms, gaps = squared_norms(tuple(averages.values()))
    part = replace(part, norms=norms, gaps=gaps)
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
    with warnings.catch_warnings():
        # Each rank saves for itself on purpose: what the ranks hold was agreed when the averages were made.
        warnings.filterwarnings("ignore", message=".*single process.*")
        planner = DefaultSavePlanner(flatten_state_dict=False)
        try:
            save(state, storage_writer=_PartWriter(folder, part, dtypes), planner=planner, no_dist=True)
        except CheckpointException as wrapped:
            # It derives from BaseException, which no caller would catch.
            raise next(iter(wrapped.failures.values()))[0] from None
    return folder


class _PartWriter(StorageWriter):
    """Stores one rank's plan as a safetensors file and then, as its commit, the part's record."""

    def __init__(self, folder: Path, part: PartRecord, dtypes: Mapping[str, str]) -> None:
        self._folder, self._part, self._dtypes = folder, part, dtypes

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        if checkpoint_id is not None:
            raise StoreError(
                f"a part of {self._folder} cannot be saved as {checkpoint_id}", hint="leave checkpoint_id out"
            )

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass  # nothing is shared between ranks

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        items, keys = plan.items, _keys(plan.items)
        tensors = {key: _resolved(planner, item) for key, item in zip(keys, items, strict=True)}
        dtypes = {key: self._dtypes[item.index.fqn] for key, item in zip(keys, items, strict=True)}
        path = names.tensors_path(self._folder, self._part.rank)
        place(path, lambda temporary: write_tensors(temporary, tensors, dtypes, self._part.identity))
        part = replace(self._part, size=path.stat().st_size)
        write_text(names.part_path(self._folder, part.rank), encode(part))
        sizes = [torch_dtype(dtypes[key]).itemsize * tensors[key].numel() for key in keys]
        written = [WriteResult(item.index, size, None) for item, size in zip(items, sizes, strict=True)]
        future: Future[list[WriteResult]] = Future()
        future.set_result(written)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        pass  # the part's record is the commit

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
