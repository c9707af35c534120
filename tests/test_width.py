"""Width: golden values, round trips, and steps that telescope to the profile."""

from __future__ import annotations

import itertools
import math

import mpmath
import numpy as np
import oracles
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharded_phema.errors import TargetError
from sharded_phema.profile import Power
from sharded_phema.width import MAX_SIGMA_REL, gamma_of, sigma_rel_of, step_weight


def test_widths_of_the_paper_have_their_golden_exponents():
    # Oracle: the values of the paper's published code; it finds a polynomial's roots, hence some units of rounding.
    assert gamma_of(0.05) == pytest.approx(16.972198602303447, rel=1e-15)
    assert gamma_of(0.10) == pytest.approx(6.937203937601809, rel=1e-15)
    assert gamma_of(0.07) == pytest.approx(11.244939447857924, rel=1e-15)


@given(st.one_of(st.floats(1e-4, 0.2886), st.floats(0.288, 0.2886)))
def test_a_width_survives_the_round_trip_through_its_exponent(sigma_rel):
    assert sigma_rel_of(gamma_of(sigma_rel)) == pytest.approx(sigma_rel, rel=1e-14)


def test_the_running_mean_has_the_largest_width():
    # Oracle: the standard deviation of a uniform distribution on [0, 1].
    assert sigma_rel_of(0.0) == pytest.approx(MAX_SIGMA_REL, rel=1e-15)
    assert gamma_of(math.nextafter(MAX_SIGMA_REL, 0.0)) >= 0.0


@given(st.floats(0.0, 60.0))
def test_the_width_is_the_standard_deviation_of_the_density(gamma):
    # Oracle: adaptive quadrature of the first two moments; it promises 1e-9, the variance cancels some 3 digits.
    mean, square = (oracles.moment(Power(gamma, 500.0), k) for k in (1, 2))
    assert mean == pytest.approx((gamma + 1) / (gamma + 2), rel=1e-8)
    assert math.sqrt(square - mean**2) == pytest.approx(sigma_rel_of(gamma), rel=1e-4)


@given(
    st.one_of(st.just(0.0), st.floats(0.0, 100.0)),
    st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=40),
)
def test_weights_of_steps_of_any_length_telescope_to_the_profile(gamma, lengths):
    # Oracle: the profile's own increments. Each of 40 factors adds some units of rounding, magnified by the exponent.
    times = list(itertools.accumulate(lengths))
    kept = np.zeros(len(times))
    for k, t in enumerate(times):
        dt = t - (times[k - 1] if k else 0.0)
        weight = step_weight(gamma, t, dt)
        kept[:k] *= 1.0 - weight
        kept[k] = weight
    expected = np.diff(Power(gamma, times[-1]).cumulative(np.array([0.0, *times])))
    np.testing.assert_allclose(kept, expected, rtol=0, atol=1e-12)


def test_the_step_of_the_paper_has_its_golden_beta():
    assert 1.0 - step_weight(gamma_of(0.05), 10.0, 1.0) == pytest.approx(0.15053493247717484, rel=1e-14)
    assert 1.0 - step_weight(gamma_of(0.10), 10.0, 1.0) == pytest.approx(0.4333247206821348, rel=1e-14)


def test_the_first_step_takes_all_and_a_late_step_keeps_its_digits():
    assert step_weight(6.94, 3.0, 3.0) == 1.0
    # Oracle: 50 digits. Forming 1 - beta from a rounded beta is wrong in the 8th digit here.
    with mpmath.workdps(50):
        expected = float(1 - (1 - mpmath.mpf(1) / 10**9) ** (mpmath.mpf(6.94) + 1))
    assert step_weight(6.94, 1e9, 1.0) == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: gamma_of(0.3), "sigma_rel must be a number above 0 and below 0.2886, found 0.3"),
        (lambda: gamma_of(0.0), "sigma_rel must be a number above 0 and below 0.2886, found 0.0"),
        (lambda: sigma_rel_of(-1.0), "gamma must be a number at least 0, found -1.0"),
        (lambda: step_weight(1.0, 2.0, 2.5), "dt must be a number above 0 and at most t=2.0, found 2.5"),
        (lambda: step_weight(1.0, 2.0, 0.0), "dt must be a number above 0 and at most t=2.0, found 0.0"),
        (lambda: step_weight(1.0, 0.0, 0.0), "t must be a number above 0, found 0.0"),
    ],
)
def test_an_argument_out_of_range_is_refused(make, text):
    with pytest.raises(TargetError) as caught:
        make()
    assert text in caught.value.message
    assert caught.value.hint
