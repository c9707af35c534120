"""Snapshots in storage. Only this package knows their files, and only it imports torch.distributed.checkpoint.

What writes does that on first use: reading needs none of it, and starts half a second earlier.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sharded_phema.store.audit import check_claim, check_frozen, check_layout, check_session
from sharded_phema.store.claims import Claim, check_unclaimed, claim_run
from sharded_phema.store.cuts import Here, Layout, here, layout_record
from sharded_phema.store.frozen import FrozenLayer, stored_frozen, write_frozen
from sharded_phema.store.names import snapshot_folder
from sharded_phema.store.norms import squared_norms
from sharded_phema.store.reader import Elsewhere, Snapshot
from sharded_phema.store.records import layout_id
from sharded_phema.store.run import Run, open_run, open_whole, run_exists, sessions_of
from sharded_phema.store.shelf import Damaged
from sharded_phema.store.spans import Piece, Span, Spans
from sharded_phema.store.stored import Stored
from sharded_phema.store.upkeep import (
    Waste,
    discard_part,
    remove_snapshot,
    remove_unfinished,
    remove_waste,
    waste_of,
)

if TYPE_CHECKING:
    from sharded_phema.store.boxes import BoxTensor, pieces_in
    from sharded_phema.store.writer import commit_snapshot, create_run, start_session, write_part

__all__ = [
    "BoxTensor",
    "Claim",
    "Damaged",
    "Elsewhere",
    "FrozenLayer",
    "Here",
    "Layout",
    "Piece",
    "Run",
    "Snapshot",
    "Span",
    "Spans",
    "Stored",
    "Waste",
    "check_claim",
    "check_frozen",
    "check_layout",
    "check_session",
    "check_unclaimed",
    "claim_run",
    "commit_snapshot",
    "create_run",
    "discard_part",
    "here",
    "layout_id",
    "layout_record",
    "open_run",
    "open_whole",
    "pieces_in",
    "remove_snapshot",
    "remove_unfinished",
    "remove_waste",
    "run_exists",
    "sessions_of",
    "snapshot_folder",
    "squared_norms",
    "start_session",
    "stored_frozen",
    "waste_of",
    "write_frozen",
    "write_part",
]

_HOME = {
    "BoxTensor": "boxes",
    "commit_snapshot": "writer",
    "create_run": "writer",
    "pieces_in": "boxes",
    "start_session": "writer",
    "write_part": "writer",
}

# Hidden from type checkers, as in the package above.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        globals()[name] = value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
        return value
