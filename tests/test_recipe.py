"""Plans and what they rebuild: against the average itself, of weights that walk randomly."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from builders import tensors_of
from walks import SHAPES, walk_run

from sharded_phema.errors import ForecastError, StoreError, TargetError
from sharded_phema.per_tensor import parse_outputs
from sharded_phema.rebuild import reconstruct
from sharded_phema.recipe import plan_rebuild

TARGETS = ["0.12", "0.2", "decay:linear:0.2", "0.15@t=155"]


@pytest.fixture(scope="module")
def walk(tmp_path_factory):
    return walk_run(tmp_path_factory.mktemp("walk"))


def planned(walk, targets, **known):
    return plan_rebuild(walk.run, parse_outputs(targets), **known)


def flat(folder):
    tensors = tensors_of(folder)
    return np.concatenate([tensors[name].numpy().ravel() for name in sorted(tensors)]).astype(np.float64)


@pytest.mark.parametrize("tolerance", ["auto", "exact", 5e-2])
def test_the_rebuilt_average_is_as_near_as_forecast(walk, tmp_path, tolerance):
    # Oracle: the average of the walk itself. 1000 numbers scatter by a few per cent, whole steps of time add to a fit
    # that is exact for continuous time: half a step in 200, 5e-3 of what moves.
    plan = reconstruct(walk.run.root, TARGETS, out=tmp_path / "out", tolerance=tolerance)
    for one in plan.targets:
        error = walk.error(flat(tmp_path / "out" / one.target.slug), one.profile)
        assert error <= 2.0 * one.fit.forecast + 1e-2
        if tolerance == 5e-2:
            assert one.fit.forecast <= 5e-2


def test_a_coarser_tolerance_reads_less(walk):
    plans = [planned(walk, TARGETS, tolerance=tolerance) for tolerance in (2e-1, 5e-2, 3e-2, "exact")]
    counts = [len(plan.sources) for plan in plans]
    assert counts == sorted(set(counts))
    assert counts[-1] == 40
    assert [plan.bytes_to_read for plan in plans] == [4 * 1000 * count for count in counts]


def test_a_stored_average_is_read_alone(walk, tmp_path):
    plan = reconstruct(walk.run.root, ["power:gamma=6@t=150"], out=tmp_path / "out")
    ((source,), ((coefficient,),)) = plan.sources, plan.coefficients
    assert (source.snapshot.t, source.average, coefficient) == (150.0, 0, 1.0)
    assert (plan.targets[0].fit.fit_part, plan.targets[0].fit.rounding_part) == (0.0, pytest.approx(0.0, abs=1e-5))
    stored = [walk.run.snapshots[14].read_flat(0, p, 0, math.prod(shape)) for p, shape in enumerate(SHAPES)]
    np.testing.assert_array_equal(flat(tmp_path / "out" / plan.outputs[0].output.slug), np.concatenate(stored))


def test_a_tolerance_that_cannot_be_met_is_refused_and_nothing_is_written(walk, tmp_path):
    with pytest.raises(ForecastError, match=r"0\.01: forecast error .* is above the tolerance 0\.001 with the 20") as e:
        reconstruct(walk.run.root, ["0.2", "0.01"], out=tmp_path / "out", tolerance=1e-3)
    assert "sharded-phema plan" in e.value.hint
    assert not (tmp_path / "out").exists()
    assert planned(walk, ["0.01"], tolerance="auto").targets[0].fit.forecast > 1e-3


@pytest.mark.parametrize("time", ["5", "201"])
def test_a_time_outside_the_snapshots_is_refused(walk, time):
    with pytest.raises(TargetError, match="lies outside the snapshots"):
        planned(walk, [f"0.1@t={time}"])


@pytest.mark.parametrize("bad", [0.0, -1.0, math.inf, math.nan, "most"])
def test_a_tolerance_that_is_none_is_refused(walk, bad):
    with pytest.raises(TargetError, match=r"tolerance: expected auto, exact or a number above 0, found"):
        planned(walk, ["0.1"], tolerance=bad)


def test_a_run_without_snapshots_is_refused(walk, tmp_path):
    from builders import new_run, rows_of

    new_run(tmp_path, rows_of((2,), 2))
    with pytest.raises(StoreError, match="holds no finished snapshot"):
        reconstruct(tmp_path, ["0.1"], out=tmp_path / "out")


@pytest.mark.parametrize("metric", ["density", "paper"])
def test_the_density_metrics_read_all(tmp_path, metric):
    # The averages keep the weights of step 1, a jump of t^-(gamma+1): below 1e-9 from step 25 on, none to speak of.
    plan = planned(walk_run(tmp_path, every=25), ["0.12"], metric=metric)
    assert len(plan.sources) == 16
    assert plan.coefficients.sum() == pytest.approx(1.0, abs=1e-12 * plan.targets[0].fit.noise_gain)


def test_a_learning_rate_changes_the_plan(walk):
    plain = planned(walk, ["0.2"], movement="constant")
    rated = planned(walk, ["0.2"], movement=lambda t: max(0.0, 1.0 - t / 200.0))
    assert plain.targets[0].fit.forecast != rated.targets[0].fit.forecast
    same = planned(walk, ["0.2"], movement=([0.0, 200.0], [3.0, 3.0]))
    np.testing.assert_allclose(same.coefficients, plain.coefficients, atol=1e-9)


def test_tensors_rebuilt_differently_are_those_of_the_whole_rebuilds(walk, tmp_path):
    # Oracle: each target rebuilt for the whole model from the same sources, and tensors picked.
    mapping = {"layer.0.*": "0.08", "layer.1.*": "0.2"}
    with pytest.raises(TargetError, match=r"parameter layer\.2\.weight matches none of the patterns"):
        reconstruct(walk.run.root, mapping, out=tmp_path / "none")
    mapping["*"] = "window:0.3"
    plan = reconstruct(walk.run.root, mapping, out=tmp_path / "mixed", tolerance="exact")
    reconstruct(walk.run.root, ["0.08", "0.2", "window:0.3"], out=tmp_path / "whole", tolerance="exact")
    mixed = tensors_of(tmp_path / "mixed" / "per-tensor")
    for number, slug in enumerate(("0.08", "0.2", "window-0.3")):
        name = f"layer.{number}.weight"
        np.testing.assert_array_equal(mixed[name], tensors_of(tmp_path / "whole" / slug)[name])
    assert plan.bytes_to_read == 4 * 1000 * 40
    recipe = json.loads((tmp_path / "mixed" / "per-tensor" / "phema.json").read_text())
    assert recipe["patterns"] == mapping
    assert [part["target"] for part in recipe["targets"]] == ["0.08", "0.2", "window:0.3"]


def test_tensors_share_sources_and_each_is_read_where_it_counts(walk):
    plan = planned(walk, {"layer.0.*": "power:gamma=6", "*": "0.15"}, tolerance=5e-2)
    used = (plan.coefficients != 0).sum(axis=0)
    assert used[0] == 1
    assert plan.bytes_to_read == 4 * (300 * used[0] + 700 * used[1])
    assert len(plan.sources) == used[1]


def test_the_recipe_tells_the_whole_forecast(walk, tmp_path):
    plan = reconstruct(walk.run.root, ["0.12"], out=tmp_path / "out", tolerance=3e-2)
    recipe, found = json.loads((tmp_path / "out" / "0.12" / "phema.json").read_text()), plan.targets[0].fit
    assert recipe["forecast"] == math.hypot(recipe["fit_part"], recipe["rounding_part"]) == found.forecast
    assert recipe["noise_gain"] == found.noise_gain
    assert len(recipe["sources"]) == len(plan.sources)
    assert sum(source["coefficient"] for source in recipe["sources"]) == pytest.approx(1.0, abs=1e-12)


def test_a_plan_is_the_same_every_time(walk):
    first, second = (planned(walk, TARGETS) for _ in range(2))
    assert first.sources == second.sources
    assert first.coefficients.tobytes() == second.coefficients.tobytes()
