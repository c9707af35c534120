"""A snapshot as something that ``torch.distributed.checkpoint.load`` reads, in a user's own code."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from sharded_phema.errors import StoreError
from sharded_phema.layout import Box
from sharded_phema.store import names
from sharded_phema.store.reader import Snapshot

__all__ = ["SnapshotReader"]


class SnapshotReader(StorageReader):
    """Reads one snapshot: ``dcp.load({label: {name: tensor}}, storage_reader=SnapshotReader(snapshot))``.

    Tensors may be plain, DTensors or anything else that DCP can load into; each rank reads
    only the boxes that it asks for. Labels are those of ``Run.record.averages``. Values come as float32, whatever
    dtype the run stores.

    Args:
        snapshot: A finished snapshot, from ``open_run(root).snapshots``.
    """

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        record = snapshot.record
        self._index = {
            names.tensor_name(label, parameter.name): (a, p)
            for a, label in enumerate(record.averages)
            for p, parameter in enumerate(record.parameters)
        }

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Refuse to be pointed elsewhere: a reader is of one snapshot."""
        if checkpoint_id is not None:
            raise StoreError(
                f"a reader of {self._snapshot.where} cannot read {checkpoint_id}", hint="leave checkpoint_id out"
            )

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Every average's tensors, each as the boxes that all ranks stored."""
        return Metadata({name: self._describe(parameter) for name, (_, parameter) in self._index.items()})

    def _describe(self, parameter: int) -> TensorStorageMetadata:
        boxes = [box for _, held in self._snapshot.layout.averaged(parameter) for box in held]
        chunks = [ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes)) for box in boxes]
        shape = torch.Size(self._snapshot.record.parameters[parameter].shape)
        return TensorStorageMetadata(TensorProperties(dtype=torch.float32), shape, chunks)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing is shared between ranks."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """The plan as it is: every read is of a box, whoever stored it."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """The plans as they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill each requested piece in place."""
        for item in plan.items:
            self._fill(item, planner)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _fill(self, item: ReadItem, planner: LoadPlanner) -> None:
        if item.type != LoadItemType.TENSOR:
            raise StoreError(f"{item.storage_index.fqn} is no tensor", hint="snapshots hold averages only")
        average, parameter = self._index[item.storage_index.fqn]
        stored = item.storage_index.offset or torch.Size()
        offsets = tuple(o + inner for o, inner in zip(stored, item.storage_offsets, strict=True))
        values = self._snapshot.read_box(average, parameter, Box(offsets, tuple(item.lengths)))
        target = planner.resolve_tensor(item).detach()
        target.copy_(torch.from_numpy(values))
        planner.commit_tensor(item, target)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Never chosen by path: a snapshot is picked from its run."""
        return False
