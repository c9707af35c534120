from __future__ import annotations

import math
import warnings
from dataclasses import replace
from itertools import pairwise

import mpmath
import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import IntegrationWarning

from sharded_phema.errors import TargetError
from sharded_phema.profile import (
    Checkpoint,
    Decay,
    Exponential,
    Mixture,
    Power,
    Ramped,
    Tabulated,
    Uniform,
    tabulate,
)


def running(t, start, gamma, tau, ramp):
    """Every kind that can be tracked, at one time."""
    return [
        Power(gamma, t, start),
        Exponential(tau, t, start),
        Exponential(tau, t, start, corrected=True),
        Ramped(tau, ramp, t, start),
        Uniform(start, t),
    ]


@st.composite
def profiles(draw, steepest=60.0, mixed=True):
    """Every kind, at times from 1 to 1e9, begun anywhere up to 90 % of the way."""
    t = draw(st.floats(1.0, 1e9))
    start = t * draw(st.one_of(st.just(0.0), st.floats(0.01, 0.9)))
    tau = t / draw(st.floats(0.01, steepest))
    gamma = draw(st.one_of(st.just(0.0), st.floats(0.0, steepest)))
    # The oracle's adaptive quadrature does not get past the pole of a sqrt decay that is a part of a sum.
    shape = draw(st.sampled_from(["linear", "cosine", "sqrt"] if mixed else ["linear", "cosine"]))
    kinds = [*running(t, start, gamma, tau, draw(st.floats(0.02, 0.6))), Checkpoint(t), Decay(shape, start, t)]
    if mixed:
        others = draw(st.lists(profiles(steepest, mixed=False), min_size=1, max_size=2))
        shares = draw(st.lists(st.floats(0.0, 1.0), min_size=len(others), max_size=len(others)))
        others.append(draw(st.sampled_from(kinds[:6])))
        kinds.append(Mixture(np.array([*shares, 1.0]) / (sum(shares) + 1.0), others))
        kinds.append(draw(tables(t, start)))
    return draw(st.sampled_from(kinds))


@st.composite
def tables(draw, t, start):
    """Tables that rise in up to six rows, the first row perhaps a jump."""
    rises = draw(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=6))
    values = np.cumsum([*rises, 1.0]) / (sum(rises) + 1.0)
    return Tabulated(np.linspace(start, t, len(values)), values, draw(st.sampled_from(["linear", "step"])))


def stretched(profile, factor):
    if isinstance(profile, Mixture):
        return Mixture(profile.weights, [stretched(one, factor) for one in profile.profiles])
    if isinstance(profile, Tabulated):
        return replace(profile, times=np.array(profile.times) * factor)
    times = {name for name in ("t", "start", "tau") if hasattr(profile, name)}
    return replace(profile, **{name: getattr(profile, name) * factor for name in times})


@given(profiles(steepest=1e4), st.lists(st.floats(-0.5, 1.5), min_size=2, max_size=20))
def test_a_cumulative_rises_from_0_to_1(profile, fractions):
    tau = np.sort(np.array(fractions)) * profile.t
    share = profile.cumulative(tau)
    assert np.all((share >= 0.0) & (share <= 1.0))
    assert np.all(np.diff(share) >= -1e-15)
    assert profile.cumulative(np.array([profile.t])).tolist() == [1.0]
    assert profile.cumulative(np.array([-1e-9])).tolist() == [0.0]
    assert np.all(profile.density(tau) >= 0.0)


@settings(max_examples=30)
@given(profiles())
def test_density_and_jumps_weigh_1(profile):
    # Oracle: adaptive quadrature, whose estimate of its own error is loose beside the pole of the sqrt decay.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", IntegrationWarning)
        assert oracles.mass(profile) == pytest.approx(1.0, abs=1e-7)


@given(profiles(), st.floats(0.05, 0.95))
def test_the_density_is_the_slope_of_the_cumulative(profile, fraction):
    # Oracle: a central difference; its error is the third derivative, steepness cubed, times the step squared.
    span = profile.t - min(profile.knots[0], 0.9 * profile.t)
    tau = profile.t - span * fraction
    step = 1e-5 * span * fraction
    left, right = profile.cumulative(np.array([tau - step, tau + step]))
    if all(abs(knot - tau) > step for knot in profile.knots):
        slope = (right - left) / (2 * step)
        assert profile.density(np.array([tau]))[0] == pytest.approx(slope, rel=1e-4, abs=1e-9 / step)


@given(profiles(), st.floats(1e-6, 1e6), st.floats(0.0, 1.2))
def test_the_unit_of_time_changes_nothing(profile, factor, fraction):
    tau = np.array([profile.t * fraction])
    # Rounding of tau / t, 1e-16, is magnified by the steepness; next to a start, by the root of it (sqrt decay).
    if all(abs(knot - tau[0]) > 1e-6 * profile.t for knot in profile.knots):
        expected = profile.cumulative(tau)
        np.testing.assert_allclose(stretched(profile, factor).cumulative(tau * factor), expected, rtol=1e-9, atol=1e-12)


def test_a_started_power_average_keeps_the_weight_of_its_first_weights():
    profile = Power(1.0, 10.0, start=5.0)
    assert profile.cumulative(np.array([4.999, 5.0, 10.0])).tolist() == [0.0, 0.25, 1.0]


def test_a_bias_corrected_average_has_no_jump():
    # Oracle: the definition, in 50 digits, where the plain difference of exponentials would have lost 12.
    profile = Exponential(1e6, 3.0, start=1.0, corrected=True)
    with mpmath.workdps(50):
        jump = mpmath.exp(-mpmath.mpf(2) / 1000000)
        expected = float((mpmath.exp(-mpmath.mpf(1) / 1000000) - jump) / (1 - jump))
    assert profile.cumulative(np.array([1.0, 2.0])) == pytest.approx([0.0, expected], rel=1e-14)


@given(st.floats(0.0, 0.9), st.lists(st.floats(0.0, 1.0), min_size=1))
def test_a_linear_decay_is_the_uniform_window(start, fractions):
    tau = np.array(fractions)
    decay, window = Decay("linear", start, 1.0), Uniform(start, 1.0)
    assert decay.cumulative(tau).tolist() == window.cumulative(tau).tolist()
    assert decay.density(tau).tolist() == window.density(tau).tolist()


@given(st.sampled_from([("cosine", lambda u: (1 - math.cos(math.pi * u)) / 2), ("sqrt", math.sqrt)]), st.floats(0, 1))
def test_a_decay_is_one_minus_its_learning_rate(shape, u):
    # Oracle: the formula of the schedule.
    name, formula = shape
    assert Decay(name, 0.0, 1.0).cumulative(np.array([u]))[0] == pytest.approx(formula(u), abs=1e-15)


def hazard_of(rule, t, start):
    """F at every step of a plain loop with decays of its own, as the share that the weights up to there keep."""
    times = np.linspace(start, t, 200_001)
    keep = np.cumsum(np.log([1.0, *(rule(late, late - early) for early, late in pairwise(times.tolist()))]))
    return times, np.exp(keep[-1] - keep)


@pytest.mark.parametrize("start", [100.0, 400.0, 3000.0])
def test_a_ramped_average_is_the_published_rule_with_short_steps(start):
    # Oracle: the loop of StyleGAN2-ADA and EDM, half-life min(limit, ramp * now), with steps of 1/20. Decays that are
    # held through a step are off by half a step at either end, relative to the half-life.
    limit, ramp, t = 100.0, 0.05, 10_000.0
    times, shares = hazard_of(lambda now, step: 0.5 ** (step / min(limit, ramp * now)), t, start)
    profile = Ramped(limit / math.log(2.0), ramp, t, start)
    np.testing.assert_allclose(profile.cumulative(times)[1:], shares[1:], rtol=0.1, atol=1e-12)
    np.testing.assert_allclose(profile.cumulative(times), shares, rtol=0, atol=3e-4)


@given(st.floats(1.0, 1e6), st.floats(0.02, 0.6), st.floats(0.01, 0.99), st.floats(0.01, 0.99))
def test_a_ramped_average_is_a_power_average_first_and_exponential_at_the_end(tau, ramp, early, late):
    # Oracle: the two profiles that it is made of, written out.
    top = tau * math.log(2.0) / ramp
    power = Power(math.log(2.0) / ramp - 1.0, early * top)
    at = np.linspace(0.0, early * top, 9)
    np.testing.assert_allclose(Ramped(tau, ramp, early * top).cumulative(at), power.cumulative(at), rtol=1e-12)
    end = top + tau / late
    at = np.linspace(top, end, 9)
    np.testing.assert_allclose(Ramped(tau, ramp, end).cumulative(at), np.exp((at - end) / tau), rtol=1e-12)


@given(st.data(), st.floats(1.0, 1e9), st.floats(0.0, 60.0), st.floats(0.01, 60.0), st.floats(0.02, 0.6))
def test_a_running_average_is_the_one_before_scaled_plus_new_weight(data, t, gamma, rate, ramp):
    # Oracle: the rule F_t(tau) = F_t(last) F_last(tau), and 1 - F in 50 digits, where the plain difference loses some.
    start = t * data.draw(st.one_of(st.just(0.0), st.floats(0.01, 0.5)))
    last = start + (t - start) * data.draw(st.floats(0.001, 0.999))
    tau = np.linspace(0.0, last, 7)
    pairs = zip(running(t, start, gamma, t / rate, ramp), running(last, start, gamma, t / rate, ramp), strict=True)
    for now, before in pairs:
        kept = now.cumulative(np.array([last]))[0]
        np.testing.assert_allclose(now.cumulative(tau), kept * before.cumulative(tau), rtol=1e-9, atol=1e-300)
        assert now.entering(last) == pytest.approx(float(share_after(now, last)), rel=1e-9)


def share_after(profile, last):
    """1 - F(last) from the definitions, in 50 digits."""
    with mpmath.workdps(50):
        t, start, last = mpmath.mpf(profile.t), mpmath.mpf(profile.start), mpmath.mpf(last)
        if isinstance(profile, Uniform):
            return (t - last) / (t - start)
        if isinstance(profile, Power):
            return 1 - (last / t) ** (mpmath.mpf(profile.gamma) + 1)
        rate = 1 / mpmath.mpf(profile.tau)
        if isinstance(profile, Ramped):
            top = mpmath.log(2) / mpmath.mpf(profile.ramp) / rate
            hazard = [min(x, top) / top for x in (last, t)], [max(x, top) * rate for x in (last, t)]
            return 1 - (hazard[0][0] / hazard[0][1]) ** (top * rate) * mpmath.exp(hazard[1][0] - hazard[1][1])
        share = mpmath.exp((last - t) * rate)
        lost = mpmath.exp((start - t) * rate) if profile.corrected else 0
        return 1 - (share - lost) / (1 - lost)


def test_an_average_that_begins_takes_its_first_weights_whole():
    for profile in running(10.0, 5.0, 6.0, 3.0, 0.1):
        assert profile.entering(4.0) == 1.0


@given(st.floats(0.0, 0.9), st.lists(st.floats(-0.5, 1.5), min_size=1))
def test_a_table_of_two_rows_is_the_uniform_window(start, fractions):
    tau = np.array(fractions)
    table, window = Tabulated([start, 1.0], [0.0, 1.0]), Uniform(start, 1.0)
    np.testing.assert_allclose(table.cumulative(tau), window.cumulative(tau), rtol=0, atol=1e-15)
    np.testing.assert_allclose(table.density(tau), window.density(tau), rtol=1e-15)


def test_a_table_in_steps_is_the_average_of_the_weights_at_its_times():
    # Oracle: the same average as a mixture of raw weights.
    times, weights = [10.0, 20.0, 40.0], [0.2, 0.5, 0.3]
    table = Tabulated(times, np.cumsum(weights), "step")
    mixed = Mixture(weights, [Checkpoint(t) for t in times])
    tau = np.array([0.0, 9.9, 10.0, 15.0, 20.0, 39.9, 40.0, 50.0])
    np.testing.assert_allclose(table.cumulative(tau), mixed.cumulative(tau), rtol=1e-15)
    assert table.density(tau).tolist() == [0.0] * len(tau)


def test_a_tabulated_function_is_the_function_to_the_stated_error():
    power = Power(14.0, 2000.0, start=0.0)
    table = tabulate(lambda tau: (tau / 2000.0) ** 15, 2000.0)
    tau = np.linspace(0.0, 2000.0, 10_001)
    assert np.abs(table.cumulative(tau) - power.cumulative(tau)).max() < 14 * 15 / 8 / 512**2
    assert table.t == 2000.0


def test_tables_and_mixtures_of_equal_numbers_are_equal():
    # So that a stored average is recognised; from lists and arrays alike.
    one, other = Tabulated([1, 2], [0.5, 1]), Tabulated(np.array([1.0, 2.0]), np.array([0.5, 1.0]))
    assert (one, hash(one)) == (other, hash(other))
    assert hash(Mixture([0.5, 0.5], [one, Checkpoint(3.0)])) == hash(Mixture((0.5, 0.5), (other, Checkpoint(3.0))))


def test_a_mixture_is_the_weighted_sum_and_ends_with_its_last_part():
    parts = [Power(6.0, 10.0), Exponential(2.0, 30.0, start=1.0)]
    mixture = Mixture([0.25, 0.75], parts)
    tau = np.array([0.5, 1.0, 5.0, 10.0, 20.0, 30.0])
    expected = 0.25 * parts[0].cumulative(tau) + 0.75 * parts[1].cumulative(tau)
    np.testing.assert_allclose(mixture.cumulative(tau), expected, rtol=1e-15)
    assert (mixture.t, mixture.knots) == (30.0, (0.0, 1.0, 10.0, 30.0))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Power(-0.5, 1.0), "power profile: gamma must be a number at least 0, found -0.5"),
        (lambda: Power(1.0, 0.0), "power profile: t must be a number above 0, found 0.0"),
        (lambda: Power(1.0, math.inf), "power profile: t must be a number above 0, found inf"),
        (lambda: Power(1.0, 2.0, 3.0), "power profile: start must be a number at least 0 and at most t=2.0, found 3.0"),
        (lambda: Exponential(0.0, 1.0), "exponential profile: tau must be a number above 0, found 0.0"),
        (lambda: Exponential(1.0, 1.0, 1.0, corrected=True), "start must be a number at least 0 and below t=1.0"),
        (lambda: Uniform(2.0, 2.0), "uniform profile: start must be a number at least 0 and below t=2.0, found 2.0"),
        (lambda: Checkpoint(math.nan), "checkpoint profile: t must be a number above 0, found nan"),
        (lambda: Decay("cubic", 0.0, 1.0), "decay profile: unknown shape 'cubic'"),
        (lambda: Ramped(1.0, 0.7, 1.0), "ramp must be a number above 0 and at most 0.693 (ln 2), found 0.7"),
        (lambda: Ramped(0.0, 0.05, 1.0), "exponential profile: tau must be a number above 0, found 0.0"),
        (lambda: Tabulated([1, 2, 3], [0, 0.5, 0.4]), "tabulated profile: the value falls from 0.5 to 0.4 at t=3.0"),
        (lambda: Tabulated([1, 2], [0, 0.9]), "tabulated profile: the last value must be 1, found 0.9"),
        (lambda: Tabulated([1, 2], [0, 20]), "tabulated profile: the last value must be 1, found 20.0"),
        (lambda: Tabulated([1, 2], [-0.1, 1]), "the first value must be a number at least 0, found -0.1"),
        (lambda: Tabulated([2, 2], [0, 1]), "tabulated profile: time 2.0 at row 1 is not after 2.0"),
        (lambda: Tabulated([-1, 2], [0, 1]), "the first time must be a number at least 0, found -1.0"),
        (lambda: Tabulated([0], [1]), "the last time must be a number above 0, found 0.0"),
        (lambda: Tabulated([1, 2], [1]), "tabulated profile: 2 times and 1 values"),
        (lambda: Tabulated([], []), "tabulated profile: times must be a list of finite numbers, found []"),
        (lambda: Tabulated([1, 2], [math.nan, 1]), "values must be a list of finite numbers, found [nan, 1]"),
        (lambda: Tabulated([1, 2], ["a", 1]), "values must be a list of finite numbers, found ['a', 1]"),
        (lambda: Tabulated([1, 2], [0, 1], "cubic"), "tabulated profile: unknown interpolation 'cubic'"),
        (lambda: tabulate(lambda tau: 1 - tau, 1.0), "tabulated profile: the value falls from 1.0"),
        (lambda: tabulate(lambda tau: tau, 1.0, points=1), "points must be a number at least 2, found 1"),
        (lambda: tabulate(lambda tau: tau, 1.0, start=1.0), "start must be a number at least 0 and below t=1.0"),
        (lambda: Mixture([0.5, 0.4], [Checkpoint(1.0)] * 2), "mixture profile: the weights sum to 0.9, expected 1"),
        (lambda: Mixture([1.5, -0.5], [Checkpoint(1.0)] * 2), "a weight must be a number at least 0, found -0.5"),
        (lambda: Mixture([1.0], []), "mixture profile: 1 weights and 0 profiles"),
        (lambda: Mixture([], []), "mixture profile: 0 weights and 0 profiles"),
    ],
)
def test_an_argument_out_of_range_is_refused(make, text):
    with pytest.raises(TargetError) as caught:
        make()
    assert text in caught.value.message
    assert caught.value.hint
