from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import oracles
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.integrate import quad

from sharded_phema import fit as fit_module
from sharded_phema.errors import ForecastError, TargetError
from sharded_phema.fit import fit
from sharded_phema.profile import Checkpoint, Decay, Exponential, Power, Uniform
from sharded_phema.width import gamma_of, step_weight

GOLDEN = json.loads((Path(__file__).parent / "data" / "fit.json").read_text())["cases"]


def stored(times, widths=(0.05, 0.10)):
    return [Power(gamma_of(float(width)), float(t)) for t in times for width in widths]


@st.composite
def profiles(draw, steepest=100.0):
    """Every kind, up to time 1."""
    t = draw(st.floats(0.05, 1.0))
    start = t * draw(st.one_of(st.just(0.0), st.floats(0.01, 0.9)))
    steepness = draw(st.floats(0.01, steepest))
    return draw(
        st.sampled_from(
            [
                Power(steepness, t, start),
                Power(0.0, t),
                Exponential(t / steepness, t, start),
                Exponential(t / steepness, t, start, corrected=True),
                Uniform(start, t),
                Checkpoint(t),
                Decay("cosine", start, t),
                Decay("sqrt", start, t),
            ]
        )
    )


powers = st.builds(
    lambda gamma, t, start: Power(gamma, t, t * start),
    st.one_of(st.just(0.0), st.floats(0.0, 9000.0)),
    st.floats(1.0, 1e6),
    st.one_of(st.just(0.0), st.floats(0.0, 1.0)),
)


@pytest.mark.parametrize("case", GOLDEN, ids=lambda c: f"{len(c['times'])}-snapshots-{c['target_sigma_rel']}")
def test_coefficients_and_forecast_match_60_digits(case):
    sources = stored(case["times"], case["sigma_rels"])
    target = Power(gamma_of(float(case["target_sigma_rel"])), case["target_time"])
    # The solve loses the design's condition number times 1e-16: up to 1e4 for evenly spaced snapshots, but 2e12 where
    # two snapshots are 1501 / 1500 apart (coefficients of 4e7). The residual is a minimum and hardly feels it.
    apart = min(np.diff(case["times"])) > 1
    loss, loss_of_error = (1e-12, 1e-11) if apart else (1e-3, 1e-6)
    for metric, key in (("trajectory", "trajectory"), ("paper", "density_then_divide")):
        golden = case[key]
        (found,) = fit(sources, [target], metric=metric)
        size = np.abs(golden["coefficients"]).max()
        np.testing.assert_allclose(found.coefficients, golden["coefficients"], rtol=0, atol=loss * size)
        assert found.error == pytest.approx(golden["residual"], rel=loss_of_error)
        assert found.rank == len(sources)
        if metric == "trajectory":
            assert found.forecast == pytest.approx(golden["forecast_relative_to_raw"], rel=loss_of_error)


@given(powers, powers)
def test_the_distance_of_two_power_profiles_has_its_closed_form(source, target):
    # Oracle: the closed form in 50 digits. Quadrature is good to 1e-12 of the square, and rounding of F itself (1e-16
    # times the exponent) sets a floor where the two profiles are nearly equal.
    scale = max(source.t, target.t)
    (found,) = fit([source], [target])
    expected = oracles.distance([1.0], [source], target) / math.sqrt(scale)
    assert found.error == pytest.approx(expected, rel=1e-11, abs=1e-11)


@settings(max_examples=60)
@given(profiles(), profiles())
def test_the_distance_of_any_two_profiles_matches_adaptive_quadrature(source, target):
    # Oracle: adaptive quadrature, to 1e-9 of the square between its own cuts.
    (found,) = fit([source], [target])
    expected = oracles.path_distance(source, target) / math.sqrt(max(source.t, target.t))
    assert found.error == pytest.approx(expected, rel=1e-7, abs=1e-7)


@given(st.lists(st.tuples(st.floats(0.5, 10.0), st.floats(0.5, 1.0)), min_size=2, max_size=5, unique=True))
def test_the_distance_of_densities_has_its_closed_form(pairs):
    # Oracle: the published inner product of two densities, as a quadratic form in the coefficients found.
    sources, target = [Power(*pair) for pair in pairs[1:]], Power(*pairs[0])
    scale = max(profile.t for profile in [*sources, target])
    assume(all(abs(a.t - b.t) + abs(a.gamma - b.gamma) > 0.05 for a in sources for b in sources if a != b))
    (found,) = fit(sources, [target], metric="density")
    c = np.append(found.coefficients, -1.0)
    gram = [[oracles.density_product(a, b) * scale for b in [*sources, target]] for a in [*sources, target]]
    size = np.abs(c) @ np.abs(gram) @ np.abs(c)
    assert found.error**2 == pytest.approx(c @ gram @ c, abs=1e-12 * size)


@settings(max_examples=50)
@given(st.lists(profiles(), min_size=1, max_size=8, unique=True), st.lists(profiles(), min_size=1, max_size=4))
def test_coefficients_sum_to_1_and_never_lose_to_the_best_single_source(sources, targets):
    singles = [fit([source], targets) for source in sources]
    for j, found in enumerate(fit(sources, targets)):
        # Rounding of the sum grows with the coefficients.
        assert abs(found.coefficients.sum() - 1.0) <= 1e-12 * found.noise_gain
        assert 1.0 - 1e-12 <= found.noise_gain == np.abs(found.coefficients).sum()
        best = min(single[j].error for single in singles)
        assert found.error <= best * (1 + 1e-9) + 1e-12 * found.noise_gain


@settings(max_examples=30)
@given(st.floats(1e-3, 1e9), st.sampled_from(["trajectory", "density"]))
def test_the_unit_of_time_changes_nothing(factor, metric):
    # Rounding of the scaled times, 1e-16, grows with the condition number, about 1e3 here.
    sources, target = stored([1, 2, 3, 4, 5]), Power(2.0, 5.0)
    longer = [replace(source, t=source.t * factor) for source in sources]
    (found,), (scaled,) = fit(sources, [target], metric=metric), fit(longer, [Power(2.0, 5.0 * factor)], metric=metric)
    np.testing.assert_allclose(scaled.coefficients, found.coefficients, rtol=0, atol=1e-11)
    assert scaled.forecast == pytest.approx(found.forecast, rel=1e-9)


def test_targets_solved_together_are_those_solved_alone():
    # To the condition number times rounding: a target's knots and steepness change the quadrature panels of all.
    sources = stored(range(1, 9))
    targets = [Power(1.0, 8.0), Uniform(6.0, 8.0), Decay("sqrt", 5.0, 7.0), Exponential(0.3, 8.0)]
    for together, target in zip(fit(sources, targets), targets, strict=True):
        (alone,) = fit(sources, [target])
        np.testing.assert_allclose(together.coefficients, alone.coefficients, rtol=0, atol=1e-10)


@pytest.mark.parametrize("metric", ["trajectory", "density"])
def test_a_stored_average_is_answered_by_itself(metric):
    sources = stored(range(1, 65))
    for i, found in zip((0, 77, 127), fit(sources, [sources[i] for i in (0, 77, 127)], metric=metric), strict=True):
        assert np.flatnonzero(found.coefficients).tolist() == [i]
        assert found.coefficients[i] == 1.0
        assert (found.error, found.forecast) == (0.0, 0.0)


def test_the_solve_itself_finds_a_stored_average():
    # Oracle: the same profile under another name, which the short cut for equal profiles does not see.
    sources = [*stored(range(1, 33)), Uniform(20.0, 32.0)]
    (found,) = fit(sources, [Decay("linear", 20.0, 32.0)])
    assert found.coefficients[-1] == pytest.approx(1.0, abs=1e-10)
    assert found.forecast < 1e-9


def test_two_running_means_give_any_window_between_them_exactly():
    # Oracle: b mean(0..b) - a mean(0..a) = (b - a) mean(a..b).
    (found,) = fit([Power(0.0, 30.0), Power(0.0, 50.0)], [Uniform(30.0, 50.0)])
    assert found.coefficients == pytest.approx([-1.5, 2.5], abs=1e-13)
    assert found.forecast < 1e-13


@settings(max_examples=30)
@given(
    st.lists(st.integers(1, 100), min_size=2, max_size=12, unique=True).map(sorted),
    st.sampled_from([Power(3.0, 1.0), Power(0.0, 1.0), Decay("cosine", 0.3, 1.0), Uniform(0.1, 1.0)]),
)
def test_raw_checkpoints_are_weighed_as_points_of_straight_lines(times, shape):
    # Oracle: the best estimate of a random walk between two samples is the straight line, so a coefficient is the
    # integral of the density against the hat function of its checkpoint, constant outside the ends.
    t = float(times[-1])
    target = replace(shape, t=t, start=shape.start * t)
    (found,) = fit([Checkpoint(float(time)) for time in times], [target])
    for i, coefficient in enumerate(found.coefficients):
        hat = np.eye(len(times))[i]

        def weighed(x, hat=hat):
            return float(np.interp(x, times, hat) * target.density(np.array([x]))[0])

        edges = np.unique([0.0, target.start, *times])
        pieces = [quad(weighed, lo, hi)[0] for lo, hi in itertools.pairwise(edges)]
        assert coefficient == pytest.approx(sum(pieces), abs=1e-8)


def test_the_forecast_is_the_error_measured_on_a_random_walk():
    # Oracle: a random walk of 4000 independent numbers, averages tracked step by step. Sampling leaves 1 to 2 % in a
    # norm of 4000 numbers that are independent, and 500 steps of time leave about as much again.
    rng = np.random.default_rng(7)
    widths = [gamma_of(0.05), gamma_of(0.10), gamma_of(0.20)]
    averages, walk, snapshots = np.zeros((3, 4000)), np.zeros(4000), []
    for step in range(1, 501):
        walk = walk + rng.standard_normal(4000)
        for average, gamma in zip(averages, widths, strict=True):
            average += step_weight(gamma, float(step), 1.0) * (walk - average)
        if step % 125 == 0:
            snapshots += list(averages[:2].copy())
    sources = [Power(gamma, float(t)) for t in (125, 250, 375, 500) for gamma in widths[:2]]
    (found,) = fit(sources, [Power(widths[2], 500.0)])
    rebuilt = found.coefficients @ np.array(snapshots)
    measured = np.linalg.norm(rebuilt - averages[2]) / np.linalg.norm(walk - averages[2])
    assert measured == pytest.approx(found.forecast, rel=0.05)


def test_raw_weights_that_are_not_stored_have_no_finite_forecast():
    (found,) = fit(stored([1, 2]), [Checkpoint(2.0)])
    assert found.forecast == math.inf
    assert (fit([Checkpoint(2.0)], [Checkpoint(2.0)])[0]).forecast == 0.0


def test_sources_after_the_target_are_used():
    # Oracle: a fit to more sources is never worse; here later ones hold most of the information.
    target = Power(gamma_of(0.12), 5.0)
    (few,), (more,) = fit(stored(range(1, 5)), [target]), fit(stored(range(1, 9)), [target])
    assert more.forecast < 0.1 * few.forecast


def test_profiles_equal_under_two_names_lower_the_rank_and_share_the_weight():
    (found,) = fit([Power(0.0, 1.0), Uniform(0.0, 1.0), Power(9.0, 1.0)], [Power(2.0, 1.0)])
    assert found.rank == 2
    assert found.coefficients[0] == pytest.approx(found.coefficients[1], abs=1e-12)


@dataclass(frozen=True)
class Broken:
    t: float = 1.0
    knots: tuple[float, ...] = (0.0, 1.0)
    steepness: float = 0.0

    def cumulative(self, tau):
        return np.full(tau.shape, np.nan)

    def density(self, tau):
        return np.full(tau.shape, np.nan)


@pytest.mark.parametrize(
    ("kind", "arguments", "metric", "text"),
    [
        (TargetError, ([], [Power(1, 1)]), "trajectory", "no stored average to rebuild from"),
        (TargetError, ([Power(1, 1)], []), "trajectory", "no target to rebuild"),
        (
            TargetError,
            ([Power(1, 1), Power(1.0, 1.0)], [Power(2, 1)]),
            "trajectory",
            "two sources have the same profile",
        ),
        (TargetError, ([Power(1, 1)], [Power(2, 1)]), "l2", "unknown metric 'l2'"),
        (TargetError, ([Checkpoint(1)], [Power(2, 1)]), "density", "cannot take Checkpoint(t=1): it jumps"),
        (TargetError, ([Power(1, 1)], [Exponential(1.0, 1)]), "density", "it jumps"),
        (TargetError, ([Power(1, 1, 0.5)], [Power(2, 1)]), "density", "it jumps"),
        (TargetError, ([Power(1, 1)], [Decay("sqrt", 0.5, 1)]), "density", "it has a density without a finite square"),
        (ForecastError, ([Uniform(0, 0.5)], [Uniform(0.5, 1)]), "paper", "coefficients that sum to 0"),
        (ForecastError, ([Broken()], [Power(2, 1)]), "trajectory", "a profile is not finite"),
    ],
)
def test_what_cannot_be_fitted_is_refused_with_a_mend(kind, arguments, metric, text):
    with pytest.raises(kind) as caught:
        fit(*arguments, metric=metric)
    assert text in caught.value.message
    assert caught.value.hint


def test_a_corrected_exponential_has_a_density():
    (found,) = fit([Exponential(1.0, 4.0, corrected=True), Power(1.0, 4.0)], [Power(3.0, 4.0)], metric="density")
    assert math.isfinite(found.error)


def test_a_solve_that_is_not_at_its_minimum_is_refused(monkeypatch):
    true_lstsq = fit_module.scipy.linalg.lstsq
    monkeypatch.setattr(
        fit_module.scipy.linalg, "lstsq", lambda a, b, **k: (lambda x, *rest: (x + 1e-6, *rest))(*true_lstsq(a, b, **k))
    )
    with pytest.raises(ForecastError, match="not at its minimum"):
        fit(stored([1, 2]), [Power(1.0, 2.0)])
