"""Snapshots beside the training: of one moment on all ranks, equal to those of a training that waits, and in step."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import nn

from sharded_phema import PostHocEMA, secretary, session
from sharded_phema.errors import OrderError, PhemaError, StoreError
from sharded_phema.store import open_run

LONG_S = 30.0  # a job that waits longer for its gate hangs
FAR = 10**6  # no snapshot is due before that


def model_of(size: int = 40) -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(size, size), nn.BatchNorm1d(size))


def step_of(model: nn.Module, t: int) -> None:
    """Move the weights as all ranks do, without a gradient."""
    noise = torch.Generator().manual_seed(t)
    with torch.no_grad():
        for param in model.parameters():
            param += 0.1 * torch.randn(param.shape, generator=noise)
        model[1].running_mean += t


@contextmanager
def written_by(act: Callable[[float], object]) -> Iterator[None]:
    """Have ``act`` called with the time of a snapshot before this process writes its part."""
    real = session.write_part

    def write(folder, record, *args, **kwargs):
        act(record.t)
        return real(folder, record, *args, **kwargs)

    with mock.patch.object(session, "write_part", write):
        yield


def contents(root: str | Path) -> dict[str, tuple[Any, bytes]]:
    """Of each tensor file of each snapshot its header and its numbers; only identities are left out."""
    found = {}
    for snapshot in open_run(root).snapshots:
        for path in sorted(Path(snapshot.where).glob("*.safetensors")):
            data = path.read_bytes()
            end = 8 + int.from_bytes(data[:8], "little")
            header = json.loads(data[8:end])
            del header["__metadata__"]
            found[f"{snapshot.t} {path.name}"] = (header, data[end:])
        found[f"{snapshot.t}"] = ((snapshot.norms, snapshot.gaps, snapshot.start), b"")
    return found


def busy_body(folder: str) -> tuple[list[str], float]:
    """Two equal trainings that communicate all the time; ranks write at different speeds."""
    rank, waited = dist.get_rank(), 0.0
    for asynchronous in (False, True):
        model = model_of()
        with written_by(lambda t: time.sleep(0.05 + 0.1 * rank)):
            ema = PostHocEMA(model, f"{folder}/{asynchronous}", snapshot_every=4, asynchronous=asynchronous)
            for t in range(1, 15):
                step_of(model, t)
                began = time.monotonic()
                ema.update()
                waited += (time.monotonic() - began) * (asynchronous and t == 4)
                total = torch.ones(3)
                for _ in range(20):
                    dist.all_reduce(total)
            ema.close()
    return [str(thread.name) for thread in threading.enumerate()], waited


def test_what_is_stored_beside_a_training_full_of_collectives_is_what_one_that_waits_stores(tmp_path) -> None:
    ranks = run_ranks(2, busy_body, str(tmp_path))
    waiting, beside = contents(tmp_path / "False"), contents(tmp_path / "True")
    assert len(waiting) == 4 * 3  # t = 4, 8, 12, 14: two files and a record each
    assert beside == waiting
    assert all(waited < 0.15 for _, waited in ranks), "training was held while a part was written"
    assert not [name for names, _ in ranks for name in names if "snapshot" in name]


PHASES = ("prepare on rank 1", "write on rank 0", "write on rank 1", "session on rank 0", "record on rank 0")


def disk_full() -> None:
    raise StoreError("disk full", hint="make room")


@contextmanager
def fault(phase: str, times: dict[float, int]) -> Iterator[None]:
    """Fail in a phase of the snapshots of some times, so many times each."""
    what, rank = phase.split(" on rank ")
    mine = dist.get_rank() == int(rank)
    now, writing = [0.0], [0.0]

    def hit(t: float) -> None:
        if mine and times.get(t, 0) > 0:
            times[t] -= 1
            disk_full()

    def write(t: float) -> None:
        writing[0] = t
        hit(t if what == "write" else 0.0)

    def prepare(self, clock, averages, *, check):
        now[0] = clock.t
        return real_snapshot(self, clock, averages, check=check)

    def live(layout, tensors):
        hit(now[0] if what == "prepare" else 0.0)
        return real_live(layout, tensors)

    def start(folder, record, layout):
        hit(writing[0] if what == "session" else 0.0)
        return real_start(folder, record, layout)

    def commit(folder, record):
        hit(record.t if what == "record" else 0.0)
        return real_commit(folder, record)

    real_snapshot, real_live = session.Session.snapshot, session.live_shards
    real_start, real_commit = secretary.start_session, secretary.commit_snapshot
    with (
        mock.patch.object(session.Session, "snapshot", prepare),
        mock.patch.object(session, "live_shards", live),
        mock.patch.object(secretary, "start_session", start),
        mock.patch.object(secretary, "commit_snapshot", commit),
        written_by(write),
    ):
        yield


def failures_of(*acts: Callable[[], object]) -> list[str]:
    told = []
    for act in acts:
        try:
            act()
        except PhemaError as error:
            told.append(error.message)
    return told


def failing_body(folder: str) -> dict[str, Any]:
    """Each phase fails at the first snapshot, at one in the middle, and at the last, which ``close`` takes."""
    found = {}
    logging.getLogger("sharded_phema").setLevel(logging.ERROR)
    for asynchronous, phase in product((False, True), PHASES):
        model, name = model_of(6), f"{phase} {asynchronous}"
        model[0].bias.requires_grad_(False)  # stored once: what ranks tell of it must survive a failure
        ema = PostHocEMA(model, f"{folder}/{name}", snapshot_every=FAR, asynchronous=asynchronous, timeout_s=20)
        told = []
        with fault(phase, {1.0: 1, 3.0: 1, 4.0: 2}):
            for t in range(1, 5):
                step_of(model, t)
                told += failures_of(ema.update, ema.snapshot)
                time.sleep(0.05 * dist.get_rank())  # a job is over on one rank, and runs on another
            told += failures_of(ema.close, ema.close, ema.close)
        found[name] = (told, ema._session.stored, ema._session._commits._number)
    return found


def test_a_failure_of_one_rank_in_any_phase_is_told_to_all_once_and_the_ranks_stay_in_step(tmp_path) -> None:
    ranks = run_ranks(2, failing_body, str(tmp_path))
    for asynchronous, phase in product((False, True), PHASES):
        name = f"{phase} {asynchronous}"
        failing = phase[-1]
        # The session's record is written once: only the first snapshot can fail there.
        (told, stored, exchanges), (told1, stored1, exchanges1) = (found[name] for found in ranks)
        assert (stored, exchanges) == (stored1, exchanges1), name
        assert told == told1 == [f"rank {failing}: disk full"] * len(told), name
        run = open_run(tmp_path / name)
        if phase.startswith("session"):
            assert [s.t for s in run.snapshots] == [2.0, 3.0, 4.0] and len(told) == 1, name
        else:
            # Where 4 is taken beside the training, close tells of both its failures at once.
            assert [s.t for s in run.snapshots] == [2.0, 4.0] and len(told) == 4 - asynchronous, name
        # Parts of a snapshot that cannot exist are gone, but for one that only its record was missing of.
        assert bool(run.unfinished) == (phase[:6] in ("sessio", "record")), name
        for snapshot in run.snapshots:
            snapshot.check()
        assert not list((tmp_path / name / "claims").iterdir())


@contextmanager
def gated(gate: threading.Event, t: float) -> Iterator[list[float]]:
    """Writing of the snapshot at a time begins when the gate opens."""
    begun: list[float] = []

    def wait(at: float) -> None:
        if threading.current_thread() is not threading.main_thread():
            begun.append(at)
            assert at != t or gate.wait(LONG_S)

    with written_by(wait):
        yield begun


def test_one_snapshot_is_in_flight_and_the_next_waits_and_says_so_once(tmp_path, caplog) -> None:
    model, gate = model_of(), threading.Event()
    ema = PostHocEMA(model, tmp_path / "ema", snapshot_every=1, asynchronous=True)
    with gated(gate, 1.0) as begun:
        ema.update()
        timer = threading.Timer(0.3, gate.set)
        timer.start()
        step_of(model, 2)
        ema.update()
        assert begun[0] == 1.0 and gate.is_set()
        ema.close()
    assert [s.t for s in open_run(tmp_path / "ema").snapshots] == [1.0, 2.0]
    [message] = [record.getMessage() for record in caplog.records]
    assert message.startswith("training waited 0.")


def test_waits_too_short_to_matter_are_not_spoken_of(tmp_path, caplog) -> None:
    model = model_of(4)
    with PostHocEMA(model, tmp_path / "ema", snapshot_every=1, asynchronous=True) as ema:
        for t in range(1, 6):
            step_of(model, t)
            with written_by(lambda t: None):
                ema.update()
    assert "training waited 0.0" not in caplog.text


def test_state_swap_and_a_second_snapshot_are_right_while_one_is_in_flight(tmp_path) -> None:
    model, still, gate = model_of(), model_of(), threading.Event()
    ema = PostHocEMA(model, tmp_path / "ema", snapshot_every=2, asynchronous=True)
    waiting = PostHocEMA(still, tmp_path / "waiting", snapshot_every=2)
    with gated(gate, 8.0) as begun:
        for t in range(1, 9):
            step_of(model, t)
            step_of(still, t)
            ema.update()
            waiting.update()
        while 8.0 not in begun:
            time.sleep(0.001)
        # The state is live: nothing waits for the gate.
        mine, its = ema.state_dict(), waiting.state_dict()
        for label in ema._session.record.averages:
            for name, value in its[label].items():
                assert torch.equal(mine[label][name], value)
        threading.Timer(0.2, gate.set).start()
        with ema.swapped("window:0.5"), waiting.swapped("window:0.5"):  # rebuilt, also from the snapshot in flight
            for one, other in zip(model.parameters(), still.parameters(), strict=True):
                assert torch.equal(one, other)
        assert ema.snapshot().endswith("000003")
        ema.close()
        waiting.close()
    assert contents(tmp_path / "ema") == contents(tmp_path / "waiting")


def test_a_failed_snapshot_that_close_stores_again_is_told_once_all_is_stored(tmp_path) -> None:
    failed: list[float] = []

    def fail_once(t: float) -> None:
        if not failed:
            failed.append(t)
            time.sleep(0.1)
            disk_full()

    ema = PostHocEMA(model_of(), tmp_path / "ema", snapshot_every=FAR, asynchronous=True)
    with written_by(fail_once):
        ema.update()
        ema.snapshot()
        with pytest.raises(StoreError, match="disk full"):
            ema.close()
        ema.close()
    run = open_run(tmp_path / "ema")
    assert [s.t for s in run.snapshots] == [1.0] and run.unfinished == ()
    assert failed == [1.0] and not list((tmp_path / "ema" / "claims").iterdir())


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_run_whose_first_snapshot_after_a_resume_failed_still_leaves_out_what_it_left_behind(
    tmp_path, asynchronous
) -> None:
    model = model_of()
    with PostHocEMA(model, tmp_path / "ema", snapshot_every=1) as ema:
        for t in range(1, 5):
            step_of(model, t)
            ema.update()
    again = PostHocEMA(model, tmp_path / "ema", snapshot_every=FAR, asynchronous=asynchronous)
    again.resume(2.0)
    with written_by(lambda t: disk_full()):
        again.update(2.5)
        assert failures_of(again.snapshot, again._session.wait) == ["rank 0: disk full"]
    assert [s.t for s in again._session.run().snapshots] == [1.0, 2.0]
    again.snapshot()
    again.close()
    assert [s.t for s in open_run(tmp_path / "ema").snapshots] == [1.0, 2.0, 2.5]


def lenient_body(folder: str) -> dict[str, Any]:
    rank, found = dist.get_rank(), {}
    for asynchronous in (False, True):
        model, name = model_of(), f"lenient {asynchronous}"
        ema = PostHocEMA(model, f"{folder}/{name}", snapshot_every=2, asynchronous=asynchronous, on_error="warn")
        with written_by(lambda t: disk_full() if rank == 1 and t in (2.0, 6.0) else None):
            for t in range(1, 7):
                step_of(model, t)
                ema.update()
                dist.barrier()
            # At the end, too.
            ema.close()
        found[name] = (ema._session.stored, ema._busy)
        lost = PostHocEMA(model_of(), f"{folder}/lost {asynchronous}", snapshot_every=FAR, on_error="warn")
        lost.update()
        if rank == 0:  # as a process does that goes on with the run, and ends
            for path in (Path(folder) / f"lost {asynchronous}" / "claims").iterdir():
                path.unlink()
        dist.barrier()
        found[f"lost {asynchronous}"] = failures_of(lost.snapshot)
    return found


def test_where_the_user_asks_for_it_training_goes_on_without_a_snapshot_but_not_in_anothers_run(tmp_path) -> None:
    ranks = run_ranks(2, lenient_body, str(tmp_path))
    for asynchronous in (False, True):
        for found in ranks:
            # 2 and 6 fail; close takes 6 again, which fails again.
            assert found[f"lenient {asynchronous}"] == (4, "closed")
            [message] = found[f"lost {asynchronous}"]
            assert "another process goes on with this run" in message
        run = open_run(tmp_path / f"lenient {asynchronous}")
        assert [s.t for s in run.snapshots] == [4.0] and run.unfinished == ()
        assert not [p for p in (tmp_path / f"lost {asynchronous}").rglob("*") if p.suffix == ".safetensors"]


def test_an_impossible_wish_for_errors_is_refused(tmp_path) -> None:
    with pytest.raises(
        PhemaError, match='on_error: expected "raise" or "warn", found "ignore"'.replace('"ignore"', "'ignore'")
    ):
        PostHocEMA(model_of(), tmp_path / "ema", on_error="ignore")
    assert not (tmp_path / "ema").exists()


def test_replaced_weights_of_one_rank_are_told_to_all(tmp_path) -> None:
    told = run_ranks(2, replaced_body, str(tmp_path))
    assert all("rank 1: 0.weight: the model's storage was replaced" in message for [message] in told)


def replaced_body(folder: str) -> list[str]:
    model = model_of()
    ema = PostHocEMA(model, f"{folder}/ema", snapshot_every=FAR, timeout_s=20)
    ema.update()
    if dist.get_rank() == 1:
        model[0].weight.data = model[0].weight.data.clone()
    told = failures_of(ema.snapshot)
    with pytest.raises(OrderError):
        ema.snapshot()
    return told
