"""What is told before training: forecasts by number of snapshots, and what to track and store."""

from __future__ import annotations

import itertools

import pytest

from sharded_phema.errors import ForecastError, TargetError
from sharded_phema.fit import fit
from sharded_phema.forecast import outlook
from sharded_phema.profile import Power
from sharded_phema.recommend import Request, recommend, spread_widths
from sharded_phema.rounding import STORED_BYTES, rounding_noise
from sharded_phema.target import parse_targets
from sharded_phema.width import gamma_of

WIDTHS = ["0.03", "0.06", "0.15", "0.25"]


def request(texts, tolerance, length=1000.0, **known):
    return Request(parse_targets(texts), length, 1e6, tolerance, **known)


def test_an_outlook_is_the_fit_to_evenly_spaced_snapshots():
    tracked, wanted = parse_targets(["0.05", "0.10"]), parse_targets(["0.15", "window:0.2"])
    plan = outlook(tracked, wanted, 4, length=1000.0, parameters=1e6)
    sources = [target.profile(t) for t in (250.0, 500.0, 750.0, 1000.0) for target in tracked]
    expected = fit(sources, [target.profile(1000.0) for target in wanted])
    assert plan.forecasts == tuple(found.forecast for found in expected)
    assert plan.size == 4 * 1_000_000 * 4 * 2


@pytest.mark.parametrize(("tolerance", "texts"), [(1e-2, WIDTHS), (1e-3, ["0.1", "0.2"]), (3e-2, ["decay:linear:0.2"])])
def test_what_is_recommended_meets_the_tolerance_by_its_own_forecast(tolerance, texts):
    # Oracle: the fit with the recommended sources and noise, and its disk from first principles.
    plans = recommend(request(texts, tolerance))
    assert [plan.size for plan in plans] == sorted(plan.size for plan in plans)
    for plan in plans:
        times = [plan.snapshot_every * (i + 1) for i in range(plan.snapshots)]
        sources = [Power(gamma_of(width), t) for t in times for width in plan.widths]
        noise = rounding_noise(plan.dtype, 10.0) * 1000.0
        found = fit(sources, [target.profile(1000.0) for target in parse_targets(texts)], noise=noise)
        assert plan.forecasts == pytest.approx([one.forecast for one in found], rel=1e-6)
        assert max(plan.forecasts) <= tolerance
        assert plan.size == STORED_BYTES[plan.dtype] * 1_000_000 * len(sources)


def test_no_two_widths_of_the_grid_do_with_much_less_disk():
    # Oracle: all pairs of the widths with fewer snapshots. The search looks at 8 snapshots first, so allow it 1.5.
    best = min(plan.size for plan in recommend(request(WIDTHS, 1e-2)) if plan.dtype == "float32")
    targets = [target.profile(1.0) for target in parse_targets(WIDTHS)]
    for count, pair in itertools.product((4, 5, 6, 8), itertools.combinations((0.02, 0.03, 0.05, 0.1, 0.2), 2)):
        if 4e6 * 2 * count < best / 1.5:
            sources = [Power(gamma_of(width), (i + 1) / count) for i in range(count) for width in pair]
            assert max(found.forecast for found in fit(sources, targets)) > 1e-2


def test_weights_that_move_little_need_wider_numbers():
    # Rounding counts against what the weights walk: the more they stand still, the more it does.
    restless = {plan.dtype for plan in recommend(request(WIDTHS, 1e-2, stillness=1e-2))}
    still = {plan.dtype for plan in recommend(request(WIDTHS, 1e-2, stillness=1e5))}
    assert restless == {"float32", "float16", "bfloat16"}
    assert still == {"float32"}


def test_the_length_of_the_run_changes_only_the_times():
    short, long = recommend(request(WIDTHS, 1e-2)), recommend(request(WIDTHS, 1e-2, length=1e6))
    assert [(p.widths, p.snapshots, p.dtype) for p in short] == [(p.widths, p.snapshots, p.dtype) for p in long]
    assert long[0].snapshot_every == pytest.approx(1000.0 * short[0].snapshot_every)


def test_what_cannot_be_met_is_said_with_what_could_be():
    with pytest.raises(
        ForecastError, match=r"rebuilds all targets to 1e-06: the best reaches .* for decay:sqrt:0.1"
    ) as e:
        recommend(request(["decay:sqrt:0.1", "0.05"], 1e-6))
    assert "ask for --tolerance" in e.value.hint
    mend = float(e.value.hint.split("--tolerance ")[1].split(",")[0])
    assert recommend(request(["decay:sqrt:0.1", "0.05"], mend))


def test_a_range_is_nine_widths():
    widths = spread_widths("0.03:0.25")
    assert len(widths) == 9
    assert (widths[0], widths[-1]) == ("0.03", "0.25")
    assert spread_widths("decay:linear:0.2") == ("decay:linear:0.2",)
    assert spread_widths("0.12") == ("0.12",)
    with pytest.raises(TargetError, match=r"range of widths 0\.2:0\.1"):
        spread_widths("0.2:0.1")


@pytest.mark.parametrize("known", [{"tolerance": 0.0}, {"length": -1.0}, {"stillness": 0.0}, {"parameters": 0.0}])
def test_numbers_out_of_range_are_refused(known):
    arguments = {"length": 10.0, "parameters": 1.0, "tolerance": 0.1} | known
    with pytest.raises(TargetError, match="must be a number above 0"):
        Request(parse_targets(["0.1"]), **arguments)


def test_a_target_with_a_time_cannot_be_planned():
    with pytest.raises(TargetError, match="the target has a time of its own"):
        request(["0.1@t=5"], 0.1)
    with pytest.raises(TargetError, match="the target has a time of its own"):
        outlook(parse_targets(["0.1"]), parse_targets(["0.1@t=5"]), 4, length=10.0, parameters=1.0)
