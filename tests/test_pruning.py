"""Pruning: a training that keeps only what a wish needs, and a run that is thinned afterwards."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from commands import run
from ranks import run_ranks
from safetensors.torch import load_file
from torch import nn

from sharded_phema import PostHocEMA, pruning, reconstruct
from sharded_phema.errors import TargetError
from sharded_phema.profile import Profile
from sharded_phema.store import open_run
from sharded_phema.target import parse_target

WISH, TOLERANCE, STEPS = "0.05:0.20 tolerance=1e-2", 1e-2, 120
TARGETS = ("0.05", "0.07", "0.10", "0.15", "0.20")


@pytest.fixture(scope="module", autouse=True)
def no_flush() -> Iterator[None]:
    """Leave out fsync: hundreds of snapshots are stored here, and no plug is pulled."""
    with mock.patch.object(os, "fsync", lambda descriptor: None):
        yield


def walk(steps: int = STEPS) -> np.ndarray:
    """Weights after every step, (steps + 1, 600)."""
    rng = np.random.default_rng(7)
    moves = 0.01 * rng.standard_normal((steps, 600))
    return np.cumsum(np.vstack([rng.standard_normal(600), moves]), axis=0)


def train(root: Path, first: int, last: int, **options) -> list[int]:
    """Train along the walk, a snapshot after each step, and give how many snapshots there were after each."""
    model, weights = nn.Linear(20, 30, bias=False), torch.from_numpy(walk()).float()
    ema = PostHocEMA(model, root, snapshot_every=1, **options)
    if first > 1:
        ema.resume()
    counts = []
    for t in range(first, last + 1):
        with torch.no_grad():
            model.weight.copy_(weights[t].view(30, 20))
        ema.update(t)
        counts.append(len(list((root / "snapshots").glob("*"))))  # beside a training it may not be made yet
    ema.close()
    return counts


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    root = tmp_path_factory.mktemp("retained") / "ema"
    return root, train(root, 1, STEPS, retention=WISH)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same training with a snapshot every fourth step, all kept."""
    root = tmp_path_factory.mktemp("whole") / "ema"
    model, weights = nn.Linear(20, 30, bias=False), torch.from_numpy(walk()).float()
    with PostHocEMA(model, root, snapshot_every=4) as ema:
        for t in range(1, STEPS + 1):
            with torch.no_grad():
                model.weight.copy_(weights[t].view(30, 20))
            ema.update(t)
    return root


def error_of(root: Path, target: str, out: Path) -> tuple[float, float]:
    """Forecast and truth of a rebuilt average: its distance from the real one, which float64 knows."""
    plan = reconstruct(root, [target], out=out, tolerance="exact")
    [folder] = out.iterdir()
    rebuilt = load_file(folder / "model.safetensors")["weight"].double().numpy().ravel()
    weights, profile = walk(), parse_target(target).profile(float(STEPS), 1.0)
    real = average(weights, profile)
    return plan.targets[0].fit.forecast, float(np.linalg.norm(rebuilt - real) / np.linalg.norm(weights[STEPS] - real))


def average(weights: np.ndarray, profile: Profile) -> np.ndarray:
    """The average itself; the first step stands for step 0, which is never averaged."""
    share = np.diff(profile.cumulative(np.arange(len(weights), dtype=np.float64)), prepend=0.0)
    return share @ np.vstack([weights[1:2], weights[1:]])


def times(root: Path) -> list[float]:
    return [snapshot.t for snapshot in open_run(root).snapshots]


def test_a_training_that_retains_keeps_few_and_rebuilds_as_well_as_was_asked(trained, tmp_path) -> None:
    root, counts = trained
    assert max(counts) <= 16 and counts[-1] <= 10, counts
    assert times(root)[-1] == STEPS
    for target in TARGETS:
        forecast, error = error_of(root, target, tmp_path / target)
        assert forecast <= TOLERANCE, target
        # What is stored is 0 but for rounding; a walk of 600 numbers is within a few percent of what is expected.
        assert error < 1e-5 if forecast == 0 else forecast / 3 < error < 3 * forecast, (target, forecast, error)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_is_kept_is_the_same_beside_the_training_and_after_a_resume(trained, tmp_path, asynchronous) -> None:
    root = tmp_path / "ema"
    train(root, 1, 70, retention=WISH, asynchronous=asynchronous)
    train(root, 71, STEPS, retention=WISH, asynchronous=asynchronous)
    assert times(root) == times(trained[0])


def deciding_body(folder: str) -> tuple[int, int]:
    real, decided = pruning.plan_kept, []

    def plan_kept(run, wish, *, ongoing):
        decided.append(len(run.snapshots))
        return real(run, wish, ongoing=ongoing)

    with mock.patch.object(pruning, "plan_kept", plan_kept):
        model = nn.Linear(6, 5)
        ema = PostHocEMA(model, f"{folder}/ema", snapshot_every=1, retention="0.05:0.20 count=3", asynchronous=True)
        for _ in range(8):
            ema.update()
        ema.close()
    return dist.get_rank(), len(decided)


def test_rank_0_decides_for_all(tmp_path) -> None:
    assert run_ranks(2, deciding_body, str(tmp_path)) == [(0, 8), (1, 0)]
    run = open_run(tmp_path / "ema")
    assert len(run.snapshots) == 3 and run.snapshots[-1].t == 8.0 and run.unfinished == ()
    for snapshot in run.snapshots:
        snapshot.check()


def test_a_wish_that_is_none_is_refused_before_anything_is_made(tmp_path) -> None:
    with pytest.raises(TargetError):
        PostHocEMA(nn.Linear(2, 2), tmp_path / "ema", retention="0.05:0.20")
    assert not (tmp_path / "ema").exists()


def test_a_wish_that_cannot_be_met_costs_no_snapshot(tmp_path, caplog) -> None:
    with PostHocEMA(nn.Linear(2, 2), tmp_path / "ema", snapshot_every=1, retention="0.1 bytes=3") as ema:
        ema.update()
        ema.update()
    assert times(tmp_path / "ema") == [1.0, 2.0]
    assert "were kept" in caplog.text and "3 bytes are less than the last snapshot takes" in caplog.text


def copied(root: Path, to: Path) -> Path:
    for name, data in listing(root).items():
        path = to / name
        if data is None:
            path.mkdir(parents=True, exist_ok=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    return to


def listing(root: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(root)): p.read_bytes() if p.is_file() else None for p in sorted(root.rglob("*"))}


@pytest.mark.parametrize("limit", [("--tolerance", "1e-2"), ("--count", "6"), ("--bytes", "40kB")])
def test_prune_shows_what_it_would_do_and_does_it_only_when_told(whole, tmp_path, limit) -> None:
    root = copied(whole, tmp_path / "ema")
    before = listing(root)
    shown = run("prune", root, "0.06:0.20", *limit, "--json")
    assert shown.returncode == 0, shown.stderr
    plan = json.loads(shown.stdout)
    assert listing(root) == before and not plan["removed"]
    sizes = {s.where: s.size for s in open_run(root).snapshots}
    assert plan["bytes"] == sum(sizes[row["folder"]] for row in plan["snapshots"]) > 0
    assert plan["kept"] + len(plan["snapshots"]) == len(sizes) == 30
    table = run("prune", root, "0.06:0.20", *limit)
    assert "to free" in table.stdout and "give --yes" in table.stdout and listing(root) == before
    done = run("prune", root, "0.06:0.20", *limit, "--yes", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == plan | {"removed": True}
    kept = {s.where: s.size for s in open_run(root).snapshots}
    assert kept.keys() == sizes.keys() - {row["folder"] for row in plan["snapshots"]}
    for row in plan["targets"]:
        assert row["before"] <= row["after"]
        forecast, error = error_of(root, row["target"], tmp_path / "out" / row["target"])
        assert forecast == pytest.approx(row["after"], rel=1e-6)
        assert error < 3 * forecast
        assert limit[0] != "--tolerance" or forecast <= TOLERANCE
    if limit[0] == "--count":
        assert len(kept) == 6
    if limit[0] == "--bytes":
        assert sum(kept.values()) <= 40_000


def test_prune_without_targets_removes_only_what_was_left_behind(whole, tmp_path) -> None:
    root = copied(whole, tmp_path / "ema")
    again = PostHocEMA(nn.Linear(20, 30, bias=False), root, snapshot_every=4)
    again.resume(112.0)
    again.update(113)
    again.close()
    (root / "snapshots" / "killed-000000").mkdir()
    (root / "snapshots" / "killed-000000" / "rank-00000.safetensors").write_bytes(b"x" * 77)
    before = times(root)
    shown = run("prune", root)
    assert "abandoned" in shown.stdout and "killed-000000" in shown.stdout and "116" in shown.stdout
    done = json.loads(run("prune", root, "--yes", "--json").stdout)
    assert [row["kind"] for row in done["snapshots"]] == ["abandoned"] * 2
    assert done["unfinished"] == ["snapshots/killed-000000"] and done["targets"] == []
    left = open_run(root)
    assert times(root) == before and (left.abandoned, left.unfinished) == ((), ())
    assert not list((root / "claims").iterdir())
    nothing = json.loads(run("prune", root, "--json").stdout)
    assert nothing["bytes"] == 0 and "give --yes" not in run("prune", root).stdout


def test_prune_refuses_while_a_process_may_be_training_and_to_guess_what_is_wanted(whole, tmp_path) -> None:
    root = copied(whole, tmp_path / "ema")
    ema = PostHocEMA(nn.Linear(20, 30, bias=False), root)
    before = listing(root)
    refused = run("prune", root, "0.10", "--count", 3, "--yes")
    assert refused.returncode == 1 and f"process {os.getpid()} on" in refused.stderr
    assert "hint: wait until it closes" in refused.stderr
    shown = run("prune", root, "0.10", "--count", 3)  # looking is allowed
    assert shown.returncode == 0 and listing(root) == before
    for words in (["0.10"], ["--count", 3], ["0.10", "--count", 3, "--tolerance", 0.1], ["0.99", "--count", 3]):
        wrong = run("prune", root, *words, "--yes")
        assert wrong.returncode == 1 and "error:" in wrong.stderr and "hint:" in wrong.stderr, words
    assert run("prune", tmp_path / "nowhere").returncode == 1
    assert run("prune").returncode == 2
    ema.resume()
    ema.close()
    assert listing(root).keys() - before.keys() == set()
    assert run("prune", root, "0.10", "--count", 3, "--yes").returncode == 0
    assert len(times(root)) == 3
