from __future__ import annotations

import numpy as np
import pytest
from builders import examples
from hypothesis import given
from hypothesis import strategies as st

from sharded_phema.errors import TargetError
from sharded_phema.movement import STEADY, movement_of


@examples(30)
@given(st.lists(st.floats(0.0, 1.0), min_size=2, max_size=9), st.floats(1e-6, 1e3))
def test_a_short_table_is_followed_to_a_thousandth_of_its_peak(rates, size):
    peak = max(rates)
    if peak < 1e-3:
        return
    times = np.linspace(0.0, 50.0, len(rates))
    movement = movement_of((times, np.array(rates) * size), 50.0)
    tau = np.linspace(-5.0, 60.0, 999)
    np.testing.assert_allclose(movement.at(tau), np.interp(tau, times, rates) / peak, rtol=0, atol=1.01e-3)


@pytest.mark.parametrize("rate", [lambda t: 1 + np.cos(np.pi * t / 1e5), lambda t: min(1.0, t / 2e3), lambda t: 7.0])
def test_a_schedule_needs_few_lines(rate):
    movement = movement_of(rate, 1e5)
    tau = np.linspace(0, 1e5, 4097)
    values = np.array([rate(t) for t in tau])
    np.testing.assert_allclose(movement.at(tau), values / values.max(), rtol=0, atol=1.01e-3)
    assert len(movement.times) < 60


def test_a_long_table_is_thinned():
    times = np.arange(100_000.0)
    movement = movement_of((times, np.sqrt(times)), times[-1])
    np.testing.assert_allclose(movement.at(times[1000:]), np.sqrt(times[1000:] / times[-1]), rtol=0, atol=2e-3)
    assert len(movement.times) <= 256


def test_steady_is_constant():
    tau = np.linspace(0, 9, 7)
    assert movement_of(lambda t: 3e-4, 9.0).at(tau).tolist() == STEADY.at(tau).tolist() == [1.0] * 7


@pytest.mark.parametrize(
    ("rate", "text"),
    [
        (([1.0, 1.0], [1.0, 2.0]), "expected increasing times"),
        (([2.0, 1.0], [1.0, 2.0]), "expected increasing times"),
        (([1.0, 2.0], [1.0]), "a rate for each"),
        (([], []), "a rate for each"),
        (([0.0, 1.0], [0.0, 0.0]), "not all 0"),
        (([0.0, 1.0], [1.0, -1.0]), "found -1 to 1"),
        (lambda t: float("nan"), "rates must be finite"),
        (lambda t: -1.0, "at least 0"),
    ],
)
def test_what_is_no_rate_is_refused(rate, text):
    with pytest.raises(TargetError, match=text) as caught:
        movement_of(rate, 10.0)
    assert caught.value.hint
