"""Kills and failing storage: earlier snapshots stay whole, no half one is seen, and the run goes on."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import faults
import numpy as np
import pytest
import torch
from builders import no_flush
from ranks import run_ranks
from torch import nn
from torch.distributed.fsdp import fully_shard

from sharded_phema import blocks
from sharded_phema.errors import PhemaError, StoreError
from sharded_phema.layout import whole
from sharded_phema.manifest import LayoutRecord, RunRecord, SessionRecord, SnapshotRecord
from sharded_phema.posthoc import PostHocEMA
from sharded_phema.store import (
    commit_snapshot,
    create_run,
    here,
    layout_id,
    layout_record,
    open_run,
    start_session,
    write_part,
)
from sharded_phema.verify import verify


@pytest.fixture(autouse=True, scope="module")
def quick_disk():
    with no_flush():
        yield


def model() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def tracked(root: Path | str, **options: object) -> PostHocEMA:
    return PostHocEMA(model(), root, snapshot_every=1000, **options)  # type: ignore[arg-type]


def begun(root: Path) -> None:
    """A run of two snapshots."""
    with tracked(root) as ema:
        for _ in range(2):
            ema.update()
            ema.snapshot()


def bytes_below(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def store_next(root: Path) -> None:
    """A process that goes on with the run and stores one snapshot."""
    ema = tracked(root)
    ema.resume()
    ema.update()
    ema.close()


def goes_on(root: Path, before: dict[str, bytes]) -> None:
    """What was there is there, nothing half is seen, and the next process resumes, cleans up, and stores."""
    now = bytes_below(root)
    kept = {name: text for name, text in before.items() if not name.startswith("claims/")}
    assert kept.items() <= now.items(), "an earlier file changed"
    blocks._kept.clear()
    run = open_run(root)
    assert not run.damaged and len(run.snapshots) in (2, 3)
    for snapshot in run.snapshots:
        snapshot.check()
    assert verify(root).intact or (root / "mine").exists()
    count = len(run.snapshots)
    store_next(root)
    run = open_run(root)
    assert len(run.snapshots) == count + 1 and not run.unfinished and not run.damaged
    assert kept.items() <= bytes_below(root).items()
    assert not [path for path in root.rglob("*.tmp")]


def test_a_process_killed_anywhere_in_a_snapshot_harms_none_and_the_next_goes_on(tmp_path: Path) -> None:
    """Every system call of opening, claiming, writing, committing and closing, and the middle of every write."""
    root, used = tmp_path / "run", tmp_path / "used"
    begun(root)
    (root / "mine").write_text("not ours")
    before = bytes_below(root)
    shutil.copytree(root, used)
    points = faults.kill_points(lambda: store_next(used))
    for k in range(points):
        shutil.rmtree(used)
        shutil.copytree(root, used)
        assert faults.killed_at(lambda: store_next(used), k), k
        goes_on(used, before)
    assert points >= 100


class TwoRanks:
    """The writes of two ranks and of the commit, one after another, as each rank makes them."""

    def __init__(self, root: Path) -> None:
        from builders import averages_of, rows_of

        self.root = root
        self.division = rows_of((4, 3), 1, 3)
        self.run = RunRecord("run", "steps", ("power:gamma=5", "power:gamma=9"), self.division.parameters)
        self.values = [list(arrays) for arrays in averages_of(self.division, 1).values()]
        ranks = [here([self.division.layout(rank, self.values[0])]) for rank in range(2)]
        self.layout: LayoutRecord = layout_record(self.run, ranks)

    def store(self, session: str, parent: str, t: float) -> None:
        from sharded_phema.folder import open_folder

        folder = open_folder(self.root)
        record = SnapshotRecord("run", session, 0, t, 1.0, ())
        parts = []
        for rank in range(2):
            layouts = {
                label: self.division.layout(rank, values)
                for label, values in zip(self.run.averages, self.values, strict=True)
            }
            parts.append(write_part(folder, record, rank, layouts))
        start_session(folder, SessionRecord("run", session, parent, t - 1, 2, layout_id(self.layout)), self.layout)
        commit_snapshot(folder, SnapshotRecord("run", session, 0, t, 1.0, tuple(parts)))

    def begin(self) -> None:
        from sharded_phema.folder import open_folder

        create_run(open_folder(self.root), self.run)
        self.store("a", "", 10.0)


@pytest.mark.filterwarnings("ignore:.*single process")
def test_two_ranks_killed_at_any_system_call_leave_no_half_snapshot_and_the_earlier_one_whole(tmp_path: Path) -> None:
    root, used = tmp_path / "run", tmp_path / "used"
    TwoRanks(root).begin()
    before = bytes_below(root)
    shutil.copytree(root, used)
    points = faults.kill_points(lambda: TwoRanks(used).store("b", "a", 20.0))
    for k in range(points):
        shutil.rmtree(used)
        shutil.copytree(root, used)
        assert faults.killed_at(lambda: TwoRanks(used).store("b", "a", 20.0), k), k
        assert before.items() <= bytes_below(used).items()
        blocks._kept.clear()
        run = open_run(used)
        assert not run.damaged and verify(used).intact
        for snapshot in run.snapshots:
            snapshot.check()
        if len(run.snapshots) == 1:
            # A process that dies is followed by one of another session.
            TwoRanks(used).store("c", run.head, 20.0)
        assert [snapshot.t for snapshot in open_run(used).snapshots] == [10.0, 20.0]
        values = open_run(used).snapshots[1].read_box(0, 0, whole((4, 3)))
        np.testing.assert_array_equal(values, TwoRanks(used).values[0][0])
    assert points >= 60


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EFBIG, errno.EIO, errno.EMFILE])
def test_storage_that_fails_at_any_call_is_one_error_and_the_next_snapshot_is_stored(tmp_path, number: int) -> None:
    root, used = tmp_path / "run", tmp_path / "used"
    begun(root)
    before = bytes_below(root)
    for k in range(0, 400, 3):
        if used.exists():
            shutil.rmtree(used)
        shutil.copytree(root, used)
        ema = tracked(used)
        ema.resume()
        ema.update()
        try:
            failed = faults.failing_at(ema.snapshot, k, number)
        except PhemaError as error:
            assert isinstance(error, StoreError), error
            assert str(used) in error.message and error.hint
            failed = "yes"
        kept = {name: text for name, text in before.items() if not name.startswith("claims/")}
        assert kept.items() <= bytes_below(used).items()
        ema.update()
        ema.snapshot()
        ema.close()
        blocks._kept.clear()
        run = open_run(used)
        assert not run.damaged and run.snapshots[-1].t == 4.0
        if not failed:
            break
    else:
        pytest.fail("a snapshot makes fewer calls than that")


def sharded(root: str, timeout_s: float) -> PostHocEMA:
    layers = model()
    fully_shard(layers)
    return PostHocEMA(layers, root, snapshot_every=1000, timeout_s=timeout_s)


def failure(act: Callable[[], object]) -> str:
    try:
        act()
    except PhemaError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def one_full_disk_then_a_slow_rank(root: str) -> list[str]:
    """What each rank is told: rank 1's disk is full at the second snapshot, rank 1 is slow at the fourth."""
    told, rank = [], torch.distributed.get_rank()
    with sharded(root, 1.5) as ema:
        for act in ("", "full", "", "slow", ""):
            ema.update()
            if act == "full" and rank == 1:
                told.append(failure(lambda: faults.failing_at(ema.snapshot, 6, errno.ENOSPC)))
                continue
            if act == "slow" and rank == 1:
                time.sleep(2.5)
            began = time.monotonic()
            told.append(failure(ema.snapshot))
            assert time.monotonic() - began < 6
    return told


def test_a_full_disk_and_a_slow_rank_are_the_same_error_on_every_rank_and_training_goes_on(tmp_path: Path) -> None:
    one, two = run_ranks(2, one_full_disk_then_a_slow_rank, str(tmp_path / "run"))
    assert one == two
    good, full, again, slow, last = one
    assert (good, again, last) == ("", "", "")
    assert full.startswith("StoreError: rank 1: ") and "No space left" in full and "free space" in full
    assert slow.startswith("StoreError: rank 1 of 2 did not answer within 1.5 s")
    run = open_run(tmp_path / "run")
    assert [snapshot.t for snapshot in run.snapshots] == [1.0, 3.0, 5.0] and not run.damaged
    assert verify(tmp_path / "run").intact


def killed_rank(root: str, k: int) -> tuple[str, float]:
    """Rank 1 is killed at its k-th call of the second snapshot; what rank 0 is told, and how long it waited."""
    ema = sharded(root, 2.0)
    ema.update()
    ema.snapshot()
    ema.update()
    count = 0

    def before(name: str, args: tuple) -> None:
        nonlocal count
        if count == k and torch.distributed.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1

    began = time.monotonic()
    with faults.counted(before):
        told = failure(ema.snapshot)
    torch.distributed.barrier = lambda: None  # nobody is left to meet
    torch.distributed.destroy_process_group = lambda: None
    return told, time.monotonic() - began


@pytest.mark.parametrize("k", [0, 3, 5, 7, 9, 12])
def test_a_rank_killed_in_the_middle_is_named_in_time_and_earlier_snapshots_stay(tmp_path: Path, k: int) -> None:
    root = tmp_path / "run"
    (told, waited), lost = run_ranks(2, killed_rank, str(root), k, dying=[1])
    assert lost is None and "rank 1 of 2 did not answer within 2 s" in told and waited < 8
    run = open_run(root)
    assert [snapshot.t for snapshot in run.snapshots] == [1.0] and not run.damaged
    run.snapshots[0].check()
    assert verify(root).intact
