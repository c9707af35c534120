"""A run folder that may not be written to, by the system's own word: one error that says so, and all is intact."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from builders import Free, listing, tensors_of, unclaimed
from test_dcp_writer import alone
from torch.distributed.checkpoint.api import CheckpointException

from sharded_phema.errors import StoreError
from sharded_phema.posthoc import PostHocEMA
from sharded_phema.rebuild import reconstruct
from sharded_phema.store import open_run
from sharded_phema.store.dcp_writer import SnapshotWriter
from sharded_phema.verify import verify

NOBODY = 65534


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that any user may enter, which those of pytest are not."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@contextmanager
def read_only(root: Path) -> Iterator[None]:
    """Nothing can be made or removed below a folder meanwhile; root, whom no mode stops, is another user."""
    folders = [root, *(path for path in root.rglob("*") if path.is_dir())]
    modes = [folder.stat().st_mode for folder in folders]
    for folder in folders:
        folder.chmod(0o555)
    try:
        with somebody(root):
            with pytest.raises(PermissionError):
                (root / "probe").touch()
            yield
    finally:
        for folder, mode in zip(folders, modes, strict=True):
            folder.chmod(mode)


@contextmanager
def somebody(root: Path) -> Iterator[None]:
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        try:
            os.listdir(root)
        except PermissionError:
            pytest.skip(f"another user cannot enter {root}")
        yield
    finally:
        os.seteuid(0)


def assert_says_why(error: StoreError, root: Path) -> None:
    assert str(root) in error.message and error.message.endswith("cannot be written: Permission denied")
    assert error.message.count("Permission denied") == 1
    assert "give this user the permission" in error.hint and "earlier snapshots are intact" in error.hint


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_folder_that_turns_read_only_costs_the_snapshot_and_nothing_else(place: Path, asynchronous: bool) -> None:
    model, root = Free(w=5), place / "ema"
    with PostHocEMA(model, root, sigma_rels=(0.05,), snapshot_every=100, asynchronous=asynchronous) as ema:
        for t in (1, 2):
            model.set(w=torch.full((5,), float(t)))
            ema.update(t)
            ema.snapshot()
        ema._session.wait()
        before = listing(root)
        with read_only(root):
            ema.update(3)
            with pytest.raises(StoreError) as caught:
                ema.snapshot()
                ema._session.wait()
            assert_says_why(caught.value, root)
            # It is read as ever: opened, verified, rebuilt from.
            assert [s.t for s in open_run(root).snapshots] == [1.0, 2.0] and verify(root).intact
        assert listing(root) == before
        ema.update(4)
        ema.snapshot()
    assert [s.t for s in open_run(root).snapshots] == [1.0, 2.0, 4.0] and verify(root).intact


def test_a_run_in_a_read_only_folder_is_rebuilt_and_not_continued(place: Path) -> None:
    model, root = Free(w=5), place / "ema"
    model.set(w=torch.arange(5.0))
    with PostHocEMA(model, root, sigma_rels=(0.05,)) as ema:
        ema.update(1)
    before, out = listing(root), place / "out"
    out.mkdir()
    out.chmod(0o777)
    with read_only(root):
        with pytest.raises(StoreError) as caught:
            PostHocEMA(model, root, sigma_rels=(0.05,))
        assert_says_why(caught.value, root)
        with alone(), pytest.raises(CheckpointException) as wrapped:
            dcp.save({"0.05": {"w": torch.zeros(5)}}, storage_writer=SnapshotWriter(root, 2, start=1))
        error = wrapped.value.failures[0][0]
        assert isinstance(error, StoreError)
        assert_says_why(error, root)
        reconstruct(root, ["0.05"], out=out / "rebuilt")
    assert listing(root) == before
    assert tensors_of(out / "rebuilt" / "0.05")["w"].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_a_new_run_in_a_read_only_place_is_one_error(place: Path) -> None:
    (place / "there").mkdir()
    with read_only(place / "there"):
        with pytest.raises(StoreError) as caught:
            PostHocEMA(Free(w=5), place / "there" / "ema", sigma_rels=(0.05,))
        assert_says_why(caught.value, place / "there")
    assert not unclaimed(listing(place / "there"))
