"""Kinds that only importers store: raw weights as sources, and averages that took no notice of their interval."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from builders import tensors_of
from commands import run
from torch import nn
from walks import walk_run

from sharded_phema.errors import TargetError
from sharded_phema.fit import fit
from sharded_phema.posthoc import PostHocEMA
from sharded_phema.profile import Checkpoint, Power, Unaware
from sharded_phema.rebuild import reconstruct
from sharded_phema.target import parse_target
from sharded_phema.width import gamma_of

TARGETS = ["window:0.35", "0.12", "decay:cosine:0.4", "exponential:tau=60"]


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("checkpoint", "checkpoint"),
        ("checkpoint@t=5e3", "checkpoint@t=5000"),
        ("power:gamma=6.0,every=10", "power:gamma=6,every=10"),
        ("power:gamma=6,every=10@t=50", "power:gamma=6,every=10@t=50"),
    ],
)
def test_the_kinds_have_one_spelling_and_cannot_be_tracked(text, canonical, tmp_path) -> None:
    target = parse_target(text)
    assert target.text == canonical and parse_target(canonical) == target
    with pytest.raises(TargetError, match="cannot be tracked"):
        PostHocEMA(nn.Linear(2, 2), tmp_path / "run", profiles=[text])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("checkpoint:3", "a checkpoint has no number, found '3'"),
        ("power:gamma=3,every=0.5", "every needs a number of at least 1, found '0.5'"),
        ("power:gamma=3,every=x", "every needs a number of at least 1, found 'x'"),
        ("exponential:tau=3,every=5", "'every=5' is no option"),
    ],
)
def test_a_bad_spelling_is_refused(text, message) -> None:
    with pytest.raises(TargetError, match="hint: ") as caught:
        parse_target(text)
    assert message in caught.value.message


def test_a_checkpoint_is_all_of_its_weight_on_one_time() -> None:
    assert parse_target("checkpoint").profile(800.0, start=100.0) == Checkpoint(800.0)
    assert parse_target("checkpoint@t=500").profile(800.0) == Checkpoint(500.0)


@pytest.mark.parametrize("target", [*TARGETS, "power:gamma=30"])
def test_checkpoints_are_weighed_as_the_closed_form_says(target) -> None:
    # Sums of steps are step functions, so that the best levels are the means of the profile between checkpoints:
    # c_i = s_i - s_(i-1), and what is missed is its scatter around them, and all of it before the first.
    times = np.array([20.0, 35.0, 60.0, 90.0, 100.0])
    wanted = parse_target(target).profile(100.0)
    (found,) = fit([Checkpoint(t) for t in times.tolist()], [wanted])
    tau = (np.arange(200_000) + 0.5) / 2000.0
    path = wanted.cumulative(tau)
    place = np.searchsorted(times, tau, side="right")
    levels = [0.0, *(path[place == i].mean() for i in range(1, 5)), 1.0]
    np.testing.assert_allclose(found.coefficients, np.diff(levels), atol=2e-5)
    missed = np.sqrt(np.mean((path - np.array(levels)[place]) ** 2))
    assert found.error == pytest.approx(missed, rel=1e-4)
    assert found.forecast == pytest.approx(missed / np.sqrt(np.mean(path**2)), rel=1e-4)


def test_the_density_metrics_refuse_checkpoints_and_say_which_metric_takes_them() -> None:
    for metric in ("density", "paper"):
        with pytest.raises(TargetError, match="it jumps") as caught:
            fit([Checkpoint(50.0), Checkpoint(100.0)], [Power(3.0, 100.0)], metric=metric)
        assert 'metric="trajectory"' in caught.value.hint


def flat(folder) -> np.ndarray:
    tensors = tensors_of(folder)
    return np.concatenate([tensors[name].numpy().ravel() for name in sorted(tensors)]).astype(np.float64)


def test_checkpoints_of_a_random_walk_rebuild_averages_as_forecast_and_better_than_plain_means(tmp_path) -> None:
    # Oracle: the average of the walk, step by step. 1000 numbers scatter by a few per cent.
    walk = walk_run(tmp_path / "run", labels=("checkpoint",))
    plan = reconstruct(tmp_path / "run", [*TARGETS, "checkpoint@t=150"], out=tmp_path / "out", tolerance="exact")
    for one in plan.targets[:-1]:
        error = walk.error(flat(tmp_path / "out" / one.target.slug), one.profile)
        assert error == pytest.approx(one.fit.forecast, rel=0.2, abs=0.01)
    inside = walk.weights[130:201:10].mean(axis=0)  # the last 35 % of 200 steps
    assert plan.targets[0].fit.forecast < 0.8 * walk.error(inside, plan.targets[0].profile)
    assert np.array_equal(flat(tmp_path / "out" / "checkpoint-t-150"), walk.weights[150].astype(np.float32))
    done = json.loads(run("prune", tmp_path / "run", "window:0.35", "checkpoint", "--count", 5, "--json").stdout)
    assert done["kept"] == 5 and {cost["target"] for cost in done["targets"]} == {"window:0.35", "checkpoint"}
    assert "the weights themselves" in run("info", tmp_path / "run").stdout
    pytest.importorskip("matplotlib")
    assert run("plot", "profiles", tmp_path / "run", "0.1", "--out", tmp_path / "x.png").returncode == 0
    assert run("plot", "forecast", tmp_path / "run", "--out", tmp_path / "y.png").returncode == 0


def realised(gamma: float, every: int, calls: int) -> np.ndarray:
    """Weight of each call, 1 to ``calls``, by the packages' own rule: every n-th call, as if all had updated."""
    weights = np.zeros(calls + 1)
    for call in range(1, calls + 1):
        if (call - 1) % every == 0:
            keep = (call / (call + 1.0)) ** (gamma + 1.0) if call > 1 else 0.0
            weights *= keep
            weights[call] = 1.0 - keep
    return weights


@pytest.mark.parametrize("every", [1, 3, 10, 100])
@pytest.mark.parametrize(("gamma", "start"), [(16.97, 1.0), (6.94, 40.0), (0.5, 1.0)])
def test_an_unaware_average_is_what_the_rule_realises(every, gamma, start) -> None:
    # Oracle: every call by hand. Between updates nothing is added.
    profile = Unaware(gamma, float(every), start + 699.0, start)
    share = np.cumsum(realised(gamma, every, 700))[1:]
    calls = np.arange(700.0) + start
    np.testing.assert_allclose(profile.cumulative(calls), share, atol=1e-9)
    np.testing.assert_allclose(profile.cumulative(calls[:-1] + 0.9), share[:-1], atol=1e-9)
    assert set(profile.knots) >= {start + every, profile.t} and profile.cumulative(np.array([start - 0.1])) == 0.0


@pytest.mark.parametrize("every", [1, 2])
def test_many_updates_are_a_curve_through_the_middle_of_their_jumps(every) -> None:
    # Half a jump above or below: both have the mean of the stretch between two updates.
    profile = Unaware(6.94, float(every), 10_000.0, 1.0)
    share, calls = np.cumsum(realised(6.94, every, 10_000))[1:], np.arange(1.0, 10_001.0)
    jump = np.max(np.diff(share))
    assert len(profile.knots) == 2
    assert np.abs(profile.cumulative(calls) - share).max() <= 0.51 * jump
    means = [profile.cumulative(calls + x).mean() for x in (np.arange(10) + 0.5) / 10 - 0.5]
    assert np.mean(means) == pytest.approx(share.mean(), abs=2e-4)
    step = profile.cumulative(calls[1:]) - profile.cumulative(calls[:-1])
    # An update at the very end is a jump by half of it.
    slope = profile.density(calls[:-1] + 0.5)
    np.testing.assert_allclose(slope[100:-1], step[100:-1], rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize(("every", "mean", "width"), [(10, 0.642, 0.246), (100, 0.150, 0.241)])
def test_what_is_asked_for_as_a_twentieth_is_really_much_wider(every, mean, width) -> None:
    # Figures measured on the package itself: asked for 0.05, of which the mean is 0.947.
    calls = 20_000
    profile = Unaware(gamma_of(0.05), float(every), float(calls), 1.0)
    weights = np.diff(profile.cumulative(np.arange(calls + 1.0)), prepend=0.0)
    times = np.arange(calls + 1.0) / calls
    assert weights @ times == pytest.approx(mean, abs=3e-3)
    assert np.sqrt(weights @ times**2 - (weights @ times) ** 2) == pytest.approx(width, abs=3e-3)


def test_stored_unaware_averages_rebuild_others(tmp_path) -> None:
    # Oracle: the average of the walk. The second kind of average makes up for what the first forgot too slowly.
    labels = ("power:gamma=16.97,every=4", "power:gamma=3.5,every=4")
    walk = walk_run(tmp_path / "run", labels=labels)
    plan = reconstruct(tmp_path / "run", ["0.15", "0.2"], out=tmp_path / "out")
    for one in plan.targets:
        assert walk.error(flat(tmp_path / "out" / one.target.slug), one.profile) <= 2.0 * one.fit.forecast + 1e-2
    assert "as updated rarely" in run("info", tmp_path / "run").stdout
    assert torch.isfinite(next(iter(tensors_of(tmp_path / "out" / "0.2").values()))).all()
