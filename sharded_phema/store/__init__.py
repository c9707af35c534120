"""Snapshots in storage. Only this package knows their files, and only it imports torch.distributed.checkpoint."""

from __future__ import annotations

from sharded_phema.store.boxes import BoxTensor
from sharded_phema.store.claims import Claim, claim_run
from sharded_phema.store.cuts import Here, here, layout_record
from sharded_phema.store.frozen import FrozenLayer, stored_frozen, write_frozen
from sharded_phema.store.names import snapshot_folder
from sharded_phema.store.norms import squared_norms
from sharded_phema.store.reader import Snapshot
from sharded_phema.store.run import Damaged, Run, open_run, run_exists
from sharded_phema.store.stored import Stored
from sharded_phema.store.upkeep import remove_snapshot, remove_unfinished
from sharded_phema.store.writer import commit_snapshot, create_run, start_session, write_part

__all__ = [
    "BoxTensor",
    "Claim",
    "Damaged",
    "FrozenLayer",
    "Here",
    "Run",
    "Snapshot",
    "Stored",
    "claim_run",
    "commit_snapshot",
    "create_run",
    "here",
    "layout_record",
    "open_run",
    "remove_snapshot",
    "remove_unfinished",
    "run_exists",
    "snapshot_folder",
    "squared_norms",
    "start_session",
    "stored_frozen",
    "write_frozen",
    "write_part",
]
