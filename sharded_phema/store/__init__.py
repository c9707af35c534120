"""Snapshots on disk. Only this package knows their files, and only it imports torch.distributed.checkpoint."""

from __future__ import annotations

from sharded_phema.store.boxes import BoxTensor
from sharded_phema.store.frozen import FrozenLayer, frozen_layers, marks_of, stored_frozen, write_frozen
from sharded_phema.store.reader import Snapshot
from sharded_phema.store.run import Run, open_run, run_exists
from sharded_phema.store.stored import Stored
from sharded_phema.store.writer import create_run, start_session, write_snapshot

__all__ = [
    "BoxTensor",
    "FrozenLayer",
    "Run",
    "Snapshot",
    "Stored",
    "create_run",
    "frozen_layers",
    "marks_of",
    "open_run",
    "run_exists",
    "start_session",
    "stored_frozen",
    "write_frozen",
    "write_snapshot",
]
