"""Session: one stretch of training in a run folder: what it continues, and where its next snapshot goes."""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from sharded_phema.background import Jobs
from sharded_phema.commit import Commits
from sharded_phema.errors import OrderError, PhemaError
from sharded_phema.folder import Folder
from sharded_phema.frozen import Found, Frozen, Marks, found_in
from sharded_phema.identity import check_same_model, live_shards
from sharded_phema.layout import ShardLayout
from sharded_phema.manifest import FrozenRecord, RunRecord, SessionRecord, SnapshotRecord
from sharded_phema.secretary import Report, Secretary
from sharded_phema.state import Clock
from sharded_phema.store import (
    Claim,
    FrozenLayer,
    Run,
    claim_run,
    create_run,
    discard_part,
    here,
    open_run,
    remove_unfinished,
    run_exists,
    snapshot_folder,
    squared_norms,
    write_frozen,
    write_part,
)
from sharded_phema.world import from_first, gather_to_first, rank_and_size

__all__ = ["Session", "StoredLayouts"]

StoredLayouts = tuple[ShardLayout, ShardLayout, ShardLayout]
"""Live shards of what is averaged, copied and stored once."""

Norms = tuple[tuple[float, ...], tuple[float, ...]]
"""As ``squared_norms`` gives them."""

T = TypeVar("T")


def _nothing() -> None:
    pass


@dataclass(frozen=True, slots=True)
class _Opened:
    """What rank 0 found in the folder, for all ranks."""

    record: RunRecord
    parent: str
    snapshots: tuple[tuple[float, str], ...]
    frozen: Found
    claim: Claim
    name: str


@dataclass(frozen=True, slots=True)
class _Ready:
    """What is to be written of a snapshot on this rank, what gives its norms, and the rest of its report."""

    averages: Mapping[str, ShardLayout]
    copied: ShardLayout
    norms: Callable[[], Norms]
    frozen: int
    marks: Marks


class Session:
    """Opens a run folder, or makes it, and stores snapshots there. Made on every rank at once: collective.

    Attributes:
        record: The run's record.
        stored: How many snapshots this session tried to store.

    Args:
        folder: Run folder.
        expected: What a run made here would be; a run that exists must be the same but for its identity.
        live: Pieces of the model on this rank.
        jobs: Who writes: at once, or beside the training.
        stage: Gives what is written of some layouts: the live tensors themselves, or copies of them.
        timeout_s: Longest wait for another rank's part of a snapshot, in seconds.
        retain: Called with the folder, on rank 0, after each snapshot that was stored, to remove what is not needed.

    Raises:
        ModelMismatch: The folder holds a run of another model, unit, dtype or other averages.
        OrderError: Another process is training into the folder.
        StoreError: The folder cannot be read or made.
    """

    def __init__(
        self,
        folder: Folder,
        expected: RunRecord,
        live: StoredLayouts,
        *,
        jobs: Jobs,
        stage: Callable[[tuple[ShardLayout, ...]], tuple[ShardLayout, ...]],
        timeout_s: float,
        retain: Callable[[Folder], object],
    ) -> None:
        self._folder, self._live, self._jobs, self._stage = folder, live, jobs, stage
        opened = from_first(lambda: _open(folder, expected))
        self.record, self._waiting, self._resumed_at = opened.record, opened.snapshots, 0.0
        self._frozen = Frozen(live[2], opened.frozen)
        self._told: Marks = ()
        self._commits = Commits(timeout_s)
        self._name = opened.name
        ranks, run, found = gather_to_first(here(live)), self.record.run, opened.frozen
        draft = SessionRecord(
            run, opened.name, opened.parent, 0.0, rank_and_size()[1], "", found.session, found.numbers
        )
        self._secretaries = [Secretary(folder, self.record, draft, ranks, opened.claim, retain)] if ranks else []
        self.stored = 0
        self._last = (-math.inf, "")  # when the last snapshot was taken, and where it lies

    def check_restored(self, act: str) -> None:
        """Prove that the averages of the snapshots in the folder, if any, were restored.

        Raises:
            OrderError: They were not.
        """
        if self._waiting:
            raise OrderError(
                f"{act}: {self._folder.url} holds this run's snapshots up to {self.record.unit} "
                f"{self._waiting[-1][0]:.17g}, and their averages were not restored",
                hint="load the state with dcp.load({'ema': ema}, ...) or ema.resume(); a new run needs its own folder",
            )

    def continue_at(self, t: float) -> None:
        """Go on from averages of training time ``t``. Later snapshots belong to an abandoned timeline from now on."""
        self._resumed_at = t
        self._last = next(((time, where) for time, where in self._waiting if time == t), self._last)
        self._waiting = ()

    def lacks(self, t: float) -> bool:
        """Whether there is no snapshot of training time ``t`` yet, nor one on its way."""
        return self._last[0] < t

    @property
    def latest(self) -> str:
        """Where the last snapshot lies, or will."""
        return self._last[1]

    def run(self) -> Run:
        """The run as it stands now, without snapshots that this session, having resumed earlier, left behind.

        Raises:
            StoreError: The folder is damaged.
        """
        run = open_run(self._folder)
        # What this session left behind is written down with its first snapshot only.
        own = [s for s in run.snapshots if s.facts.session == self._name or s.t <= self._resumed_at]
        return replace(run, snapshots=tuple(own))

    def snapshot(
        self, clock: Clock, averages: Mapping[str, ShardLayout], *, check: Callable[[], object] = _nothing
    ) -> None:
        """Store a snapshot unless there is one of this time. Called by every rank, no collective.

        Args:
            clock: When.
            averages: What.
            check: Called before anything is read; its failure on one rank is raised on all.

        Raises:
            StoreError: A part cannot be written, on whichever rank, or a rank does not answer; earlier snapshots are
                intact, and a later one can be tried. Of a snapshot that is written beside the training, the next call
                tells, and the next one is on its way nevertheless.
            ModelMismatch: A tensor that is stored as it is has another shape or dtype than when the run began.
            OrderError: Another process goes on with the run.
        """
        # A failure reaches some ranks at their last update and others here. All take this snapshot: they stay in step.
        earlier = _attempted(self._jobs.wait)
        if self.lacks(clock.t):
            before = self._last
            record = SnapshotRecord(self.record.run, self._name, self.stored, clock.t, clock.start, ())
            # Counted before it is written: after a failure on one rank, all ranks still agree on the next one's number.
            self.stored += 1
            ready = _attempted(lambda: self._prepared(averages, check))
            self._last = (clock.t, f"{self._folder.url}/{snapshot_folder(record.session, record.snapshot)}")
            self._jobs.submit(partial(self._store, record, ready, before))
        earlier()

    def check(self) -> None:
        """Raise the failure of a snapshot that was written beside the training; never waits."""
        self._jobs.check()

    def wait(self) -> None:
        """Return when no snapshot is on its way; raise the failure of the last."""
        self._jobs.close()

    def settled(self) -> Callable[[], None]:
        """Wait until no snapshot is on its way; what is returned raises the failure of the last."""
        return _attempted(self._jobs.close)

    def close(self) -> None:
        """Give the folder up. Called once no snapshot is on its way."""
        self._commits.close()
        for secretary in self._secretaries:
            secretary.close()

    def _prepared(self, averages: Mapping[str, ShardLayout], check: Callable[[], object]) -> _Ready:
        """All that is read of live tensors."""
        check()
        copied, frozen = live_shards(self._live[1], self.record.copied), live_shards(self._live[2], self.record.frozen)
        self._frozen.recognise(frozen, self._found_layers)
        number = self._frozen.number(frozen, lambda number: self._store_frozen(frozen, number))
        *staged, copied = self._stage((*averages.values(), copied))
        norms = _norms_of(tuple(averages.values()), tuple(staged))
        marks = () if self._frozen.marks == self._told else self._frozen.marks
        return _Ready(dict(zip(averages, staged, strict=True)), copied, norms, number, marks)

    def _store(self, record: SnapshotRecord, ready: Callable[[], _Ready], before: tuple[float, str]) -> None:
        """Write this rank's part, and have rank 0 commit the snapshot once all did."""
        try:
            reports = self._collected(record, ready)
            self._told = self._frozen.marks
            self._commits.agree(lambda: self._commit(record, reports))
        except BaseException:
            self._last = before
            raise

    def _collected(self, record: SnapshotRecord, ready: Callable[[], _Ready]) -> list[Report]:
        """What each rank wrote, on rank 0. Where one failed nobody's part stays: a full disk would stay full."""
        try:
            return self._commits.collect(lambda: self._written(record, ready()))
        except PhemaError:
            # Where the ranks lost each other, rank 0 may have all reports, and commit.
            if not self._commits.lost:
                discard_part(self._folder, record, rank_and_size()[0])
            raise

    def _commit(self, record: SnapshotRecord, reports: list[Report]) -> None:
        for secretary in self._secretaries:
            secretary.commit(record, reports, self._resumed_at)

    def _written(self, record: SnapshotRecord, ready: _Ready) -> Report:
        rank, dtype = rank_and_size()[0], self.record.dtype
        for secretary in self._secretaries:
            secretary.check()
        part = write_part(self._folder, record, rank, ready.averages, ready.copied, dtype=dtype)
        return Report(replace(part, frozen=ready.frozen), *ready.norms(), ready.marks)

    def _store_frozen(self, frozen: ShardLayout, number: int) -> None:
        record = FrozenRecord(self.record.run, self._name, number, rank_and_size()[0])
        write_frozen(self._folder, record, frozen)

    def _found_layers(self) -> tuple[FrozenLayer, ...]:
        """Where the frozen tensors lie that were found stored."""
        return next(s.frozen for s in reversed(open_run(self._folder).snapshots) if s.frozen)


def _norms_of(live: tuple[ShardLayout, ...], staged: tuple[ShardLayout, ...]) -> Callable[[], Norms]:
    """Norms of averages: a device adds them up in no time; on the host it is done where they are asked for."""
    if all(shard.local.device.type == "cpu" for layout in live for shard in layout):
        return partial(squared_norms, staged)
    found = squared_norms(live)
    return lambda: found


def _attempted(act: Callable[[], T]) -> Callable[[], T]:
    """Do something now; its result, or its failure, is told when it is asked for."""
    try:
        value = act()
    except Exception as error:
        failure = error

        def fail() -> T:
            raise failure

        return fail
    return lambda: value


def _open(folder: Folder, expected: RunRecord) -> _Opened:
    """Open a run, or make it, and claim it for this process."""
    name = uuid.uuid4().hex[:12]
    if not run_exists(folder):
        create_run(folder, expected)
        return _Opened(expected, "", (), Found(), claim_run(folder, expected), name)
    run = open_run(folder)
    check_same_model(folder.url, run.record, expected)
    claim = claim_run(folder, run.record)
    remove_unfinished(folder, run.unfinished)
    snapshots = tuple((snapshot.t, snapshot.where) for snapshot in run.snapshots)
    return _Opened(run.record, run.head, snapshots, found_in(run), claim, name)
