"""Upkeep: what a run folder holds that nothing needs, and removing it so that no reader ever sees half a snapshot."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from faults import kill_points, killed_at
from torch import nn

from sharded_phema import PostHocEMA
from sharded_phema.errors import StoreError
from sharded_phema.folder import open_folder
from sharded_phema.folder.temporary import place_here
from sharded_phema.store import open_run, remove_snapshot, remove_unfinished, remove_waste, waste_of

FAR = 10**6


def listing(root: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(root)): p.read_bytes() if p.is_file() else None for p in sorted(root.rglob("*"))}


def model_of() -> nn.Module:
    """One that has a parameter that is stored once."""
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    model[1].bias.requires_grad_(False)
    return model


def train(root: Path, times: list[float], *, resume: float | None = None, thaw: bool = False) -> nn.Module:
    torch.manual_seed(1)
    model = model_of()
    ema = PostHocEMA(model, root, snapshot_every=FAR)
    if resume is not None:
        ema.resume(resume)
    for t in times:
        with torch.no_grad():
            model[0].weight += 0.1
            model[1].bias += thaw
        ema.update(t)
        ema.snapshot()
    ema.close()
    return model


def files(root: Path, folder: str) -> list[str]:
    return sorted(str(p.relative_to(root)) for p in (root / folder).rglob("*") if p.is_file())


def dead_pid() -> int:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    return child


def test_killed_at_any_moment_of_a_removal_no_half_snapshot_is_seen_and_the_next_removal_ends_it(tmp_path) -> None:
    def begin(k: int) -> Path:
        train(tmp_path / str(k), [1.0, 2.0])
        return tmp_path / str(k)

    root = begin(0)
    moments = kill_points(lambda: remove_snapshot(open_run(root).snapshots[0]))
    seen = set()
    for k in range(1, moments + 1):
        root = begin(k)
        first, second = open_run(root).snapshots
        assert killed_at(lambda root=root: remove_snapshot(open_run(root).snapshots[0]), k - 1)
        run = open_run(root)
        assert run.damaged == ()
        for snapshot in run.snapshots:
            snapshot.check()
        seen.add((len(run.snapshots), len(run.unfinished)))
        assert [s.name for s in run.snapshots][-1] == second.name
        if run.unfinished:
            assert run.unfinished == (first.name,)
            assert remove_unfinished(run.root, run.unfinished) == (first.name,)
            assert not (root / first.name).exists()
    # Whole, without its record, and gone.
    assert {(2, 0), (1, 1)} <= seen and moments > 5


def test_what_nothing_needs_is_found_and_removed_and_everything_else_stays(tmp_path) -> None:
    root = tmp_path / "ema"
    train(root, [1.0, 2.0, 3.0])
    train(root, [2.5, 4.0], resume=2.0, thaw=True)  # 3 is abandoned; the frozen bias is stored twice more
    lost = root / "snapshots" / "lost-000007"
    lost.mkdir()
    (lost / "rank-00000.safetensors").write_bytes(b"x" * 100)
    killed = root / "sessions" / f".a.json.{place_here()}-{dead_pid()}-{'0' * 16}.tmp"
    killed.write_bytes(b"y" * 10)
    living = root / "sessions" / f".a.json.{place_here()}-{os.getpid()}-{'0' * 16}.tmp"
    living.write_bytes(b"z")
    run = open_run(root)
    assert [s.t for s in run.snapshots] == [1.0, 2.0, 2.5, 4.0] and len(files(root, "frozen")) == 6
    needed = waste_of(run, run.snapshots)
    assert [s.t for s in needed.abandoned] == [3.0] and needed.frozen == ()
    assert needed.unfinished == ("snapshots/lost-000007",)
    assert needed.temporary == (str(killed.relative_to(root)),)
    # Without 1, 2 and 2.5 the last snapshot alone decides: it refers to its own store, and, as a record, to the first.
    waste = waste_of(run, run.snapshots[-1:])
    assert len(waste.frozen) == 2 and waste.frozen[0].endswith(".json")
    held = sum(p.stat().st_size for p in root.rglob("*") if p.is_file())
    for snapshot in run.snapshots[:-1]:
        remove_snapshot(snapshot)
    before = {name: data for name, data in listing(root).items() if not name.startswith("snapshots/")}
    remove_waste(run, waste)
    after = open_run(root)
    assert [s.t for s in after.snapshots] == [4.0] and (after.abandoned, after.unfinished) == ((), ())
    after.snapshots[0].check()
    assert after.snapshots[0].read_raw(len(run.record.copied), 0, 2).shape == (2,)
    gone = set(before) - set(listing(root))
    assert gone == {*waste.frozen, *waste.temporary, waste.frozen[0].rpartition("/")[0]}
    assert living.exists()
    freed = held - sum(p.stat().st_size for p in root.rglob("*") if p.is_file())
    dropped = sum(s.size for s in run.snapshots[:-1])
    # Records of snapshots are not counted: a few kB.
    assert 0 <= freed - dropped - waste.nbytes < 4 * 2000


def test_frozen_tensors_stay_while_a_damaged_snapshot_may_be_mended(tmp_path) -> None:
    root = tmp_path / "ema"
    train(root, [1.0, 2.0], thaw=True)
    run = open_run(root)
    assert len(waste_of(run, run.snapshots[1:]).frozen) == 2
    path = Path(run.snapshots[0].where) / "rank-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    run = open_run(root)
    assert len(run.damaged) == 1 and waste_of(run, run.snapshots).frozen == ()


def test_a_folder_that_holds_anything_foreign_is_left_alone(tmp_path) -> None:
    root = tmp_path / "ema"
    train(root, [1.0])
    for name, file in (("mine-000000", "notes.txt"), ("mine-000001", "rank-00000.safetensors.bak")):
        (root / "snapshots" / name).mkdir()
        (root / "snapshots" / name / file).write_bytes(b"")
    run = open_run(root)
    before = listing(root)
    assert len(run.unfinished) == 2
    assert remove_unfinished(run.root, run.unfinished) == ()
    remove_waste(run, waste_of(run, run.snapshots))
    assert listing(root) == before


def test_a_snapshot_that_cannot_be_removed_says_so_and_is_not_seen_any_more(tmp_path, monkeypatch) -> None:
    root = tmp_path / "ema"
    train(root, [1.0, 2.0])
    run = open_run(root)
    real = type(run.root).remove

    def remove(self, name: str) -> None:
        if name.endswith(".safetensors"):
            raise StoreError(f"{name}: cannot be removed", hint="mend the disk")
        real(self, name)

    monkeypatch.setattr(type(run.root), "remove", remove)
    with pytest.raises(StoreError, match="cannot be removed"):
        remove_snapshot(run.snapshots[0])
    monkeypatch.undo()
    run = open_run(open_folder(root))
    assert [s.t for s in run.snapshots] == [2.0] and len(run.unfinished) == 1
