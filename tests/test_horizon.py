"""What later ends ask of the snapshots up to now: against quadrature and the definition."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import pytest
from builders import examples
from hypothesis import given
from hypothesis import strategies as st
from oracles import path_distance

from sharded_phema.fit import fit
from sharded_phema.horizon import Goal, Past, Wanted, earlier_ends, goals_for, past_of, wanted_later, wanted_now
from sharded_phema.movement import STEADY
from sharded_phema.profile import Checkpoint, Profile
from sharded_phema.target import parse_target, parse_targets

TEXTS = ("0.07", "0.25", "uniform", "exponential:halflife=3", "window:0.4", "decay:cosine:0.5", "decay:sqrt:0.3")
TRACKED = parse_targets(["0.05", "0.10"])


@pytest.mark.parametrize("text", TEXTS)
def test_the_past_of_a_profile_is_what_it_weighs_up_to_then(text):
    # Oracle: the definition, F(min(tau, T)) / F(T); the density by differences.
    whole, now = parse_target(text).profile(10.0), 8.0
    past, tau = Past(whole, now), np.linspace(0.05, 12.0, 300)
    share = whole.cumulative(np.array([now]))
    np.testing.assert_allclose(past.cumulative(tau), whole.cumulative(np.minimum(tau, now)) / share, rtol=1e-14)
    assert past.cumulative(np.array([now]))[0] == 1.0
    assert past.knots == (*(knot for knot in whole.knots if knot < now), now)
    inside = tau[(tau < now - 0.01) & np.all([np.abs(tau - knot) > 0.01 for knot in whole.knots], axis=0)]
    slope = (past.cumulative(inside + 1e-6) - past.cumulative(inside - 1e-6)) / 2e-6
    np.testing.assert_allclose(past.density(inside), slope, rtol=1e-5, atol=1e-8)


@dataclass(frozen=True)
class Since:
    """The part of a profile after a time, scaled to 1."""

    whole: Profile
    begin: float

    @property
    def t(self):
        return self.whole.t

    @property
    def knots(self):
        return (self.begin, *(knot for knot in self.whole.knots if knot > self.begin))

    @property
    def steepness(self):
        return self.whole.steepness

    def cumulative(self, tau):
        share = self.whole.cumulative(np.array([self.begin]))[0]
        return (self.whole.cumulative(np.maximum(tau, self.begin)) - share) / (1.0 - share)

    def density(self, tau):
        raise NotImplementedError


@examples(25)
@given(
    st.sampled_from(TEXTS),
    st.lists(st.integers(1, 19), min_size=1, max_size=5, unique=True).map(sorted),
    st.lists(st.integers(21, 30), min_size=0, max_size=4, unique=True).map(sorted),
)
def test_errors_before_and_after_add_in_squares(text, before, after):
    # The bound of the maths: E^2(T') <= F(T)^2 E_P^2 + E_later^2, each term from a fit of its own.
    target, now, end = parse_target(text), 20.0, 31.0
    whole, early = target.profile(end), [*before, now]
    share = float(whole.cumulative(np.array([now]))[0])
    sources = {t: [label.tracked(float(t), 0.0) for label in TRACKED] for t in (*early, *after, end)}
    (found,) = fit([source for some in sources.values() for source in some], [whole])
    # What was averaged since then: an average at a later time less what it still holds of the one at that time.
    later = [Since(source, now) for t in (*after, end) for source in sources[t]]
    rest = (1.0 - share) * fit(later, [Since(whole, now)])[0].error * math.sqrt(end)
    past = 0.0
    if share > 1e-9:
        (early_fit,) = fit([source for t in early for source in sources[t]], [Past(whole, now)])
        past = share * early_fit.error * math.sqrt(now)
    assert found.error * math.sqrt(end) <= math.hypot(past, rest) * (1 + 1e-6) + 1e-9


def test_what_can_be_tracked_is_its_own_past():
    for text in TEXTS[:4]:
        target = parse_target(text)
        tau = np.linspace(0.0, 7.0, 200)
        past, tracked = Past(target.profile(10.0), 7.0), target.profile(7.0)
        np.testing.assert_allclose(past.cumulative(tau), tracked.cumulative(tau), rtol=1e-12, atol=1e-300)


@pytest.mark.parametrize("text", TEXTS)
def test_the_unit_of_an_error_is_the_distance_to_raw_weights(text):
    # Oracle: adaptive quadrature. Of a past it is larger by the share of the past.
    wanted = Wanted(parse_target(text), 9.0, 1.0)
    (goal,) = goals_for([wanted], STEADY)
    expected = path_distance(wanted.profile, Checkpoint(9.0)) ** 2
    assert goal.unit == pytest.approx(expected, rel=1e-6)
    share = float(wanted.profile.cumulative(np.array([8.0]))[0])
    assert past_of([goal], 8.0) == (Goal(Past(wanted.profile, 8.0), goal.unit / share**2),)
    assert past_of([goal], 9.0) == (goal,)


def test_no_past_is_asked_for_where_there_is_none():
    (goal,) = goals_for([Wanted(parse_target("window:0.2"), 10.0, 0.0)], STEADY)
    assert past_of([goal], 8.0) == ()
    assert len(past_of([goal], 8.1)) == 1


def test_begins_of_windows_are_tried_in_every_gap_that_they_will_pass():
    times = [5.0, 6.0, 7.0, 8.5, 9.0, 10.0]
    goals = wanted_later(parse_targets(["window:0.2"]), times, 0.0, STEADY)
    begins = {round(goal.profile.knots[0], 9) for goal in goals}
    assert {8.75, 9.5} < begins
    assert wanted_later(parse_targets(["0.1", "uniform"]), times, 0.0, STEADY) == ()


def test_targets_are_wanted_at_the_end_or_at_their_own_time():
    targets = parse_targets(["0.1", "0.2@t=4", "0.2@t=12"])
    assert [(w.target.text, w.t) for w in wanted_now(targets, (10.0, 5.0), 0.0)] == [
        ("0.1", 10.0),
        ("0.1", 5.0),
        ("0.2@t=4", 4.0),
    ]


@examples(40)
@given(st.lists(st.floats(0.01, 1e6), min_size=1, max_size=30, unique=True).map(sorted), st.floats(1.3, 9.0))
def test_earlier_ends_are_the_first_snapshots_after_powers_and_never_change(times, ratio):
    ends = earlier_ends(times, ratio)
    assert set(ends) <= set(times[:-1])
    for k in range(1, len(times)):  # as the run went on
        assert set(earlier_ends(times[:k], ratio)) - {times[k - 1]} <= set(ends)
    for a, b in itertools.pairwise(ends):
        assert math.floor(math.log(a) / math.log(ratio) + 1e-9) < math.log(b) / math.log(ratio) + 1e-9
    assert earlier_ends(times, math.inf) == ()
