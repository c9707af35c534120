"""Snapshots on disk. Only this package knows their files, and only it imports torch.distributed.checkpoint."""

from __future__ import annotations

from sharded_phema.store.boxes import BoxTensor
from sharded_phema.store.reader import Snapshot
from sharded_phema.store.run import Run, open_run, run_exists
from sharded_phema.store.writer import create_run, start_session, write_snapshot

__all__ = [
    "BoxTensor",
    "Run",
    "Snapshot",
    "create_run",
    "open_run",
    "run_exists",
    "start_session",
    "write_snapshot",
]
