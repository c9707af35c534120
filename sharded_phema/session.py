"""Session: one stretch of training in a run folder: what it continues, and where its next snapshot goes."""

from __future__ import annotations

import math
import uuid
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from sharded_phema.errors import OrderError
from sharded_phema.frozen import Found, Frozen, found_in
from sharded_phema.identity import check_same_model, live_shards
from sharded_phema.layout import ShardLayout
from sharded_phema.manifest import FrozenRecord, PartRecord, RunRecord, SessionRecord
from sharded_phema.state import Clock
from sharded_phema.store import (
    Run,
    create_run,
    frozen_layers,
    open_run,
    run_exists,
    start_session,
    write_frozen,
    write_snapshot,
)
from sharded_phema.world import from_first, rank_and_size

__all__ = ["Session"]


class Session:
    """Opens a run folder, or makes it, and stores snapshots there. Made on every rank at once: collective.

    Attributes:
        record: The run's record.
        stored: How many snapshots this session tried to store.

    Args:
        root: Run folder.
        expected: What a run made here would be; a run that exists must be the same but for its identity.
        layout: Pieces of the averaged parameters on this rank.
        copied: Pieces of the copied tensors.
        frozen: Pieces of the frozen tensors.

    Raises:
        ModelMismatch: The folder holds a run of another model, unit, dtype or other averages.
        StoreError: The folder cannot be read or made.
    """

    def __init__(
        self,
        root: Path,
        expected: RunRecord,
        layout: ShardLayout,
        copied: ShardLayout = (),
        frozen: ShardLayout = (),
    ) -> None:
        self._root, self._layout, self._copied, self._kept = root, layout, copied, frozen
        opened = from_first(lambda: (*_opened(root, expected), uuid.uuid4().hex[:12]))
        self.record, self._parent, self._waiting, found, self._name = opened
        self._frozen = Frozen(frozen, found)
        self._resumed_at = 0.0
        self.stored, self._started = 0, False
        self._last = (-math.inf, Path())  # when the last snapshot was taken, and where it lies

    def check_restored(self, act: str) -> None:
        """Prove that the averages of the snapshots in the folder, if any, were restored.

        Raises:
            OrderError: They were not.
        """
        if self._waiting:
            raise OrderError(
                f"{act}: {self._root} holds this run's snapshots up to {self.record.unit} {self._waiting[-1][0]:.17g}, "
                "and their averages were not restored",
                hint="load the state with dcp.load({'ema': ema}, ...) or ema.resume(); a new run needs its own folder",
            )

    def continue_at(self, t: float) -> None:
        """Go on from averages of training time ``t``. Later snapshots belong to an abandoned timeline from now on."""
        self._resumed_at = t
        self._last = next(((time, folder) for time, folder in self._waiting if time == t), self._last)
        self._waiting = ()

    def lacks(self, t: float) -> bool:
        """Whether there is no snapshot of training time ``t`` yet."""
        return self._last[0] < t

    def run(self) -> Run:
        """The run as it stands now, without snapshots that this session, having resumed earlier, left behind.

        Raises:
            StoreError: The folder is damaged.
        """
        run = open_run(self._root)
        if self._started:
            return run
        # What this session left behind is written down with its first snapshot only.
        return replace(run, snapshots=tuple(s for s in run.snapshots if s.t <= self._resumed_at))

    def snapshot(self, clock: Clock, averages: Mapping[str, ShardLayout]) -> Path:
        """Store this rank's part of a snapshot unless there is one of this time. Called by every rank, no collective.

        Returns:
            The snapshot's folder, the same on all ranks.

        Raises:
            StoreError: The part cannot be written; earlier snapshots are intact, and a later one can be tried.
            ModelMismatch: A tensor that is stored as it is has another shape or dtype than when the run began.
        """
        if self.lacks(clock.t):
            self._last = (clock.t, self._write(clock, averages))
        return self._last[1]

    def _write(self, clock: Clock, averages: Mapping[str, ShardLayout]) -> Path:
        part = PartRecord(self.record.run, self._name, self.stored, rank_and_size()[0], clock.t, clock.start, size=0)
        # Counted before it is written: after a failure on one rank, all ranks still agree on the next one's number.
        self.stored += 1
        copied, frozen = live_shards(self._copied, self.record.copied), live_shards(self._kept, self.record.frozen)
        if not self._started:
            self._start(frozen)
            self._started = True
        number = self._frozen.number(frozen, lambda *store: self._store(frozen, *store))
        return write_snapshot(self._root, replace(part, frozen=number), averages, copied, dtype=self.record.dtype)

    def _start(self, frozen: ShardLayout) -> None:
        """Write down what this session continues and what this rank stores in it."""
        found, (rank, size) = self._frozen.found, rank_and_size()
        marks = self._frozen.inherited(
            frozen, lambda: frozen_layers(self._root, self.record, found.session, found.numbers)
        )
        session = SessionRecord(
            self.record.run, self._name, self._parent, self._resumed_at, size, found.session, found.numbers
        )
        start_session(self._root, session, rank, self._layout, self._copied, frozen, marks)

    def _store(self, frozen: ShardLayout, number: int, marks: tuple[int, ...]) -> None:
        record = FrozenRecord(self.record.run, self._name, number, rank_and_size()[0], 0, marks)
        write_frozen(self._root, record, frozen)


def _opened(root: Path, expected: RunRecord) -> tuple[RunRecord, str, tuple[tuple[float, Path], ...], Found]:
    """The run's record, the session to continue, its snapshots (time and folder), and the frozen tensors they have."""
    if not run_exists(root):
        create_run(root, expected)
        return expected, "", (), Found()
    run = open_run(root)
    check_same_model(root, run.record, expected)
    return run.record, run.head, tuple((snapshot.t, snapshot.folder) for snapshot in run.snapshots), found_in(run)
