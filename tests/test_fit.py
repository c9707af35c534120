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
from sharded_phema.movement import STEADY, movement_of
from sharded_phema.profile import Checkpoint, Decay, Exponential, Mixture, Power, Ramped, Tabulated, Uniform
from sharded_phema.width import gamma_of, step_weight

DATA = Path(__file__).parent / "data"
GOLDEN = json.loads((DATA / "fit.json").read_text())["cases"]
LARGE = json.loads((DATA / "fit_256.json").read_text())


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
                Ramped(t / steepness, 0.1, t, start),
                Tabulated((start, 0.5 * (start + t), t), (0.1, draw(st.floats(0.1, 1.0)), 1.0)),
                Mixture((0.25, 0.75), (Power(steepness, t, start), Uniform(start, t))),
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


@pytest.mark.parametrize("case", LARGE["cases"], ids=lambda c: c["target_sigma_rel"])
def test_256_sources_match_100_digits(case):
    # The loss in the coefficients is the design's condition number, 1e4 here, times 1e-16; the error, down to 2e-7, is
    # a residual with rounding of 1e-17.
    sources = stored([i / 128 for i in range(1, 129)], LARGE["sigma_rels"])
    (found,) = fit(sources, [Power(gamma_of(float(case["target_sigma_rel"])), 1.0)])
    np.testing.assert_allclose(found.coefficients, case["coefficients"], rtol=0, atol=1e-11)
    assert found.error == pytest.approx(case["error"], rel=1e-9)
    assert found.forecast == pytest.approx(case["forecast"], rel=1e-9)
    assert found.coefficients.sum() == pytest.approx(1.0, abs=1e-12)
    assert found.rank == 256


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
@given(st.floats(1e-3, 1e9), st.sampled_from(["trajectory", "density", "paper"]))
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


@pytest.mark.parametrize("metric", ["trajectory", "density", "paper"])
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


@settings(max_examples=60)
@given(
    st.lists(profiles(), min_size=1, max_size=8, unique=True),
    profiles(),
    st.sampled_from([0.0, 1e-12, 1e-6, 1e-2]),
)
def test_coefficients_sum_to_one(sources, target, noise):
    (found,) = fit(sources, [target], noise=noise)
    assert found.coefficients.sum() == pytest.approx(1.0, abs=1e-12 * found.noise_gain)


@pytest.mark.parametrize("width", [0.03, 0.12, 0.25])
def test_the_density_metric_sums_to_one_by_constraint_and_the_paper_by_division(width):
    # Oracle: the free minimum is no larger than the constrained one, which is no larger than any other of sum 1.
    sources, target = stored([1, 2, 3, 4, 5]), Power(gamma_of(width), 5.0)
    (found,), (paper,) = fit(sources, [target], metric="density"), fit(sources, [target], metric="paper")
    for one in (found, paper):
        assert one.coefficients.sum() == pytest.approx(1.0, abs=1e-12 * one.noise_gain)
    assert found.error <= paper.error * (1 + 1e-9)
    c = np.append(found.coefficients, -1.0)
    everything = [*sources, target]
    gram = np.array([[oracles.density_product(a, b) * 5.0 for b in everything] for a in everything])
    gradient = (gram @ c)[:-1]
    np.testing.assert_allclose(gradient, gradient.mean(), rtol=0, atol=1e-9 * np.abs(gram).max())


@settings(max_examples=30)
@given(st.lists(st.floats(0.05, 1.0), min_size=2, max_size=4), st.sampled_from([1e-8, 1e-3, 0.1]))
def test_noise_makes_the_expected_error_smallest_and_is_told_apart(scales, noise):
    # Oracle: the normal equations of  integral + sum of noise c^2, in closed form, with the constraint bordered.
    sources, target = stored([1, 2, 3, 4])[: 2 * len(scales)], Power(gamma_of(0.15), 4.0)
    shares = [noise * scale for scale in scales for _ in range(2)]
    (found,) = fit(sources, [target], noise=shares)
    gram = np.array([[float(oracles.overlap(a, b)) for b in sources] for a in sources]) + np.diag(shares)
    right = np.array([float(oracles.overlap(a, target)) for a in sources])
    n = len(sources)
    system = np.block([[gram, np.ones((n, 1))], [np.ones((1, n)), np.zeros((1, 1))]])
    expected = np.linalg.solve(system, np.append(right, 1.0))[:n]
    np.testing.assert_allclose(found.coefficients, expected, rtol=0, atol=1e-6 * np.abs(expected).max())
    raw = math.sqrt(float(4.0 / (2 * target.gamma + 3)))
    assert found.fit_part == pytest.approx(oracles.distance(found.coefficients, sources, target) / raw, rel=1e-6)
    assert found.rounding_part == pytest.approx(math.sqrt(np.dot(shares, found.coefficients**2)) / raw, rel=1e-9)
    assert found.forecast == pytest.approx(math.hypot(found.fit_part, found.rounding_part))


def test_a_noisy_source_is_avoided():
    sources, target = stored([3, 4, 5, 6, 7, 8]), Power(gamma_of(0.03), 8.0)
    (free,) = fit(sources, [target])
    (quiet,) = fit(sources, [target], noise=1e-3)
    assert quiet.noise_gain < 0.7 * free.noise_gain
    assert quiet.fit_part > free.fit_part
    assert quiet.forecast < fit_with(free.coefficients, sources, target, 1e-3)


def fit_with(coefficients, sources, target, noise):
    raw = math.sqrt(float(target.t / (2 * target.gamma + 3)))
    error = oracles.distance(coefficients, sources, target)
    return math.sqrt(error**2 + noise * np.square(coefficients).sum()) / raw


@settings(max_examples=30)
@given(st.floats(0.1, 3.0), st.sampled_from([0.05, 0.12, 0.22]))
def test_movement_is_a_change_of_clock(power, width):
    # Oracle: with s(tau)^2 dtau = du the problem is the constant one in the clock u. A rate ~ tau^p runs the clock as
    # tau^(2 p + 1), and a power profile in tau is one in u.
    clock = 2.0 * power + 1.0
    movement = movement_of(lambda t: t**power, 4.0)
    sources, target = stored([1, 2, 3, 4]), Power(gamma_of(width), 4.0)
    (found,) = fit(sources, [target], movement=movement)
    turned = [Power((p.gamma + 1) / clock - 1, p.t**clock) for p in [*sources, target] if p.gamma + 1 >= clock]
    assume(len(turned) == len(sources) + 1)
    (expected,) = fit(turned[:-1], turned[-1:])
    # The rate is followed by straight lines to 1e-3.
    np.testing.assert_allclose(found.coefficients, expected.coefficients, rtol=0, atol=0.02 * expected.noise_gain)
    assert found.forecast == pytest.approx(expected.forecast, rel=0.05)


def test_a_constant_rate_changes_nothing():
    sources, target = stored([1, 2, 3, 4]), Power(gamma_of(0.15), 4.0)
    (plain,) = fit(sources, [target])
    for rate in (lambda t: 3e-4, ([1.0], [5.0]), ([0.0, 4.0], [0.1, 0.1])):
        (found,) = fit(sources, [target], movement=movement_of(rate, 4.0))
        np.testing.assert_allclose(found.coefficients, plain.coefficients, rtol=0, atol=1e-10)
        assert found.forecast == pytest.approx(plain.forecast, rel=1e-9)


def test_the_forecast_knows_the_movement_of_a_random_walk_that_slows_down():
    # Oracle: as below, with steps that shrink as a cosine decay, averages tracked step by step.
    rng = np.random.default_rng(3)
    rate = [0.5 * (1 + math.cos(math.pi * step / 500)) for step in range(501)]
    widths = [gamma_of(0.05), gamma_of(0.10), gamma_of(0.20)]
    averages, walk, snapshots = np.zeros((3, 4000)), np.zeros(4000), []
    for step in range(1, 501):
        walk = walk + rate[step - 1] * rng.standard_normal(4000)
        for average, gamma in zip(averages, widths, strict=True):
            average += step_weight(gamma, float(step), 1.0) * (walk - average)
        if step % 125 == 0:
            snapshots += list(averages[:2].copy())
    sources = [Power(gamma, float(t)) for t in (125, 250, 375, 500) for gamma in widths[:2]]
    errors = []
    for movement in (movement_of((list(range(501)), rate), 500.0), STEADY):
        (found,) = fit(sources, [Power(widths[2], 500.0)], movement=movement)
        rebuilt = found.coefficients @ np.array(snapshots)
        errors.append(np.linalg.norm(rebuilt - averages[2]) / np.linalg.norm(walk - averages[2]))
        if movement is not STEADY:
            assert errors[0] == pytest.approx(found.forecast, rel=0.05)
    assert errors[0] < 0.9 * errors[1]


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
