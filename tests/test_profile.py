from __future__ import annotations

import math
import warnings
from dataclasses import replace

import mpmath
import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import IntegrationWarning

from sharded_phema.errors import TargetError
from sharded_phema.profile import Checkpoint, Decay, Exponential, Power, Uniform


@st.composite
def profiles(draw, steepest=60.0):
    """Every kind, at times from 1 to 1e9, begun anywhere up to 90 % of the way."""
    t = draw(st.floats(1.0, 1e9))
    start = t * draw(st.one_of(st.just(0.0), st.floats(0.01, 0.9)))
    tau = t / draw(st.floats(0.01, steepest))
    gamma = draw(st.one_of(st.just(0.0), st.floats(0.0, steepest)))
    shape = draw(st.sampled_from(["linear", "cosine", "sqrt"]))
    kinds = [
        Power(gamma, t, start),
        Exponential(tau, t, start),
        Exponential(tau, t, start, corrected=True),
        Uniform(start, t),
        Checkpoint(t),
        Decay(shape, start, t),
    ]
    return draw(st.sampled_from(kinds))


def stretched(profile, factor):
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


@settings(max_examples=60)
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
    ],
)
def test_an_argument_out_of_range_is_refused(make, text):
    with pytest.raises(TargetError) as caught:
        make()
    assert text in caught.value.message
    assert caught.value.hint
