"""Claims: one process goes on with a run, and whoever else tries is told who that is."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn

from sharded_phema import PostHocEMA, reconstruct
from sharded_phema.errors import OrderError, PhemaError
from sharded_phema.folder import open_folder
from sharded_phema.store import check_unclaimed, claim_run, claims, open_run

FAR = 10**6

OWNER = """
import sys, torch
from sharded_phema import PostHocEMA
ema = PostHocEMA(torch.nn.Linear(3, 2), sys.argv[1], snapshot_every=1)
if len(sys.argv) > 2: ema.resume()
ema.update(float(sys.argv[2]) if len(sys.argv) > 2 else 1.0)
print("stored", flush=True)
sys.stdin.read()
"""


def owner(root: Path, *words: str) -> subprocess.Popen[str]:
    """Another process of this machine that stores a snapshot in the folder and lives on."""
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", OWNER, str(root), *words], stdin=pipe, stdout=pipe, text=True)
    assert process.stdout is not None and process.stdout.readline() == "stored\n"
    return process


def averaging(root: Path, **options) -> PostHocEMA:
    return PostHocEMA(nn.Linear(3, 2), root, snapshot_every=FAR, **options)


def claims_in(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "claims").iterdir())


def listing(root: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(root)): p.read_bytes() if p.is_file() else None for p in sorted(root.rglob("*"))}


def test_a_living_process_is_not_taken_over_until_it_is_killed(tmp_path) -> None:
    root, first = tmp_path / "ema", None
    try:
        first = owner(root)
        before = listing(root)
        with pytest.raises(OrderError) as refused:
            averaging(root)
        assert f"process {first.pid} on {socket.gethostname()} is training into this folder" in refused.value.message
        assert "stop it first" in refused.value.hint
        with pytest.raises(OrderError, match=f"process {first.pid} .* may be training") as unclaimed:
            check_unclaimed(open_folder(root), open_run(root).record)
        assert "claims/" in unclaimed.value.hint
        # Who reads needs no claim, and leaves nothing behind.
        assert [s.t for s in open_run(root).snapshots] == [1.0]
        reconstruct(root, ["0.10"], out=tmp_path / "out")
        assert listing(root) == before
        first.send_signal(signal.SIGKILL)
        first.wait()
        with averaging(root) as ema:
            assert ema.resume() == 1.0
            assert len(claims_in(root)) == 1  # the dead one's is gone
            ema.update()
        assert [s.t for s in open_run(root).snapshots] == [1.0, 2.0] and claims_in(root) == []
    finally:
        if first is not None:
            first.kill()
            first.communicate()


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("closes", [False, True])
def test_a_process_elsewhere_that_was_taken_over_writes_nothing_any_more(tmp_path, asynchronous, closes) -> None:
    root = tmp_path / "ema"
    with mock.patch.object(claims, "place_here", lambda: "0123456789abcdef"):
        elsewhere = averaging(root, asynchronous=asynchronous, on_error="warn")
    elsewhere.update()
    elsewhere.snapshot()
    elsewhere._session.wait()
    here = averaging(root)
    here.resume()
    here.update()
    here.snapshot()
    if closes:
        # Even the next claim of all is not taken for the one that was lost.
        here.close()
        here = averaging(root)
    before = listing(root)
    elsewhere.update(7.0)
    with pytest.raises(OrderError, match="another process goes on with this run since"):
        elsewhere.snapshot()
        elsewhere._session.wait()
    assert listing(root) == before
    assert [s.t for s in open_run(root).snapshots] == [1.0, 2.0]


def test_of_two_objects_in_one_process_the_later_one_goes_on(tmp_path) -> None:
    earlier = averaging(tmp_path)
    earlier.update()
    later = averaging(tmp_path)
    before = listing(tmp_path)
    with pytest.raises(OrderError, match=r"found claim \d+, this process holds claim \d+"):
        earlier.snapshot()
    assert listing(tmp_path) == before
    later.update(3.0)
    later.close()
    assert [s.t for s in open_run(tmp_path).snapshots] == [3.0] and claims_in(tmp_path) == []


def test_claims_that_nobody_released_do_not_pile_up(tmp_path) -> None:
    for number in range(4):
        with mock.patch.object(claims, "place_here", lambda number=number: f"{number:016x}"):
            averaging(tmp_path)
        assert len(claims_in(tmp_path)) == 1


def test_of_two_that_claim_at_the_same_moment_one_is_refused(tmp_path) -> None:
    averaging(tmp_path).close()
    folder, run = open_folder(tmp_path), open_run(tmp_path).record
    child = os.fork()
    if child == 0:
        signal.pause()
    try:
        with mock.patch("os.getpid", lambda: child), mock.patch.object(claims.secrets, "randbelow", lambda n: 6):
            claim_run(folder, run)
        with (
            mock.patch.object(claims.secrets, "randbelow", lambda n: 6),
            mock.patch.object(claims, "_numbers", lambda folder: []),  # it looked just before
            pytest.raises(OrderError, match=f"process {child} .* is training into this folder"),
        ):
            claim_run(folder, run)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert claims_in(tmp_path) == ["000007.json"]


def test_a_claim_that_cannot_be_read_keeps_nobody_out(tmp_path) -> None:
    ema = averaging(tmp_path)
    [name] = claims_in(tmp_path)
    path = tmp_path / "claims" / name
    path.write_bytes(path.read_bytes()[:-9])
    check_unclaimed(open_folder(tmp_path), open_run(tmp_path).record)
    assert isinstance(averaging(tmp_path), PostHocEMA)
    ema.update()
    with pytest.raises(PhemaError):
        ema.snapshot()


def test_a_model_that_does_not_match_leaves_the_claim_of_the_one_that_does(tmp_path) -> None:
    ema = averaging(tmp_path)
    before = listing(tmp_path)
    with pytest.raises(PhemaError):
        PostHocEMA(nn.Linear(4, 2), tmp_path)
    assert listing(tmp_path) == before
    with torch.no_grad():
        ema.update()
    ema.close()
    assert [s.t for s in open_run(tmp_path).snapshots] == [1.0]
