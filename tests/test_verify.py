"""Verification: what it says of a run, to people and to machines, and what it counts as no fault."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_cli import run
from torch import nn

from sharded_phema.errors import StoreError
from sharded_phema.posthoc import PostHocEMA
from sharded_phema.seal import sealed
from sharded_phema.store import open_run
from sharded_phema.verify import verify


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A run of two snapshots."""
    with PostHocEMA(nn.Linear(3, 2), tmp_path / "ema", snapshot_every=1) as ema:
        ema.update()
        ema.update()
    return tmp_path / "ema"


def test_a_whole_run_is_said_to_be_as_written_and_exits_0(root: Path) -> None:
    done = run("verify", root)
    size = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
    assert done.returncode == 0 and done.stderr == "", "no bar where nobody looks"
    assert "everything is as it was written: 7 files of 2 snapshots" in done.stdout
    found = json.loads(run("verify", root, "--json").stdout)
    assert (found["intact"], found["files"], found["bytes"], found["damaged"]) == (True, 7, size, {})


def test_what_is_damaged_and_what_is_extra_is_named_and_exits_1(root: Path) -> None:
    name = f"{open_run(root).snapshots[0].name}/rank-00000.safetensors"
    text = bytearray((root / name).read_bytes())
    text[-1] ^= 1
    (root / name).write_bytes(text)
    (root / "notes.txt").write_text("mine")
    done = run("verify", root, "--json")
    found = json.loads(done.stdout)
    assert done.returncode == 1 and list(found["damaged"]) == [name] and found["extra"] == ["notes.txt"]
    table = run("verify", root)
    assert table.returncode == 1 and "2 not as written" in table.stdout and "no record names it" in table.stdout


def test_a_time_that_was_edited_in_a_record_is_told_by_the_tensor_file(root: Path) -> None:
    name = open_run(root).snapshots[0].name
    path = root / name / "snapshot.json"
    data = json.loads(path.read_bytes())
    del data["digest"]
    path.write_bytes(sealed(data | {"t": 1.5}))
    (damaged,) = verify(root).damaged
    assert damaged.name == f"{name}/rank-00000.safetensors"
    assert "'t': '1.5'" in damaged.reason and "'t': '1.0'" in damaged.reason


def test_what_writers_that_were_killed_leave_behind_is_reported_and_no_fault(root: Path) -> None:
    (root / "snapshots/0123-000000").mkdir()
    (root / "snapshots/0123-000000/rank-00000.safetensors").write_bytes(b"half")
    report = verify(root)
    assert report.intact and report.left_over == ("snapshots/0123-000000/rank-00000.safetensors",)
    assert "never finished" in run("verify", root).stdout


def test_a_folder_without_a_run_is_an_error_with_its_mend(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="is no run folder"):
        verify(tmp_path)
    done = run("verify", tmp_path)
    assert done.returncode == 1 and "hint: " in done.stderr
