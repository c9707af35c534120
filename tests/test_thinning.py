"""Groups of averages that go: against refits without each in turn."""

from __future__ import annotations

import math

import numpy as np
import pytest
from builders import examples
from hypothesis import given
from hypothesis import strategies as st

from sharded_phema.fit import fit
from sharded_phema.horizon import Wanted, goals_for
from sharded_phema.movement import STEADY
from sharded_phema.target import parse_targets
from sharded_phema.thinning import Limit, thinned

NOISE = 1e-9


def run_of(times, labels):
    return [[label.tracked(float(t), 0.0) for label in parse_targets(labels)] for t in times]


def squared(groups, goals):
    """Squared forecasts of a refit."""
    sources = [source for group in groups for source in group]
    return np.square([found.forecast for found in fit(sources, [g.profile for g in goals], noise=NOISE)])


@examples(30)
@given(
    st.lists(st.integers(2, 40), min_size=3, max_size=7, unique=True).map(sorted),
    st.lists(st.sampled_from(["0.07", "0.2", "window:0.3", "decay:cosine:0.5"]), min_size=1, max_size=3, unique=True),
    st.sampled_from([("0.05", "0.10"), ("0.03", "0.08", "0.20"), ("uniform",), ("exponential:halflife=5", "0.1")]),
)
def test_each_group_that_goes_is_the_one_that_brute_force_would_take(times, texts, labels):
    groups, last = run_of(times, labels), len(times) - 1
    goals = goals_for([Wanted(target, float(times[-1]), 0.0) for target in parse_targets(texts)], STEADY)
    left = list(range(len(times)))
    for size in range(len(times) - 1, 0, -1):
        limit = Limit(math.inf, 0.0, float(size))
        known = {"fixed": [last], "movement": STEADY, "noise": [NOISE] * len(times) * len(labels)}
        done = thinned(groups, [1.0] * len(times), goals, limit, **known)
        now = squared([groups[i] for i in left], goals)
        rises = {i: max(squared([groups[k] for k in left if k != i], goals) - now) for i in left[:-1]}
        (gone,) = set(left) - set(done.kept)
        assert rises[gone] <= min(rises.values()) * (1 + 1e-4) + 1e-10
        left = list(done.kept)
        assert [f.forecast for f in done.after] == pytest.approx(np.sqrt(squared([groups[i] for i in left], goals)))


def test_groups_whose_averages_are_one_are_told_apart_from_none():
    # At the first update all averages are the same weights.
    first = [[label.tracked(4.0, 4.0) for label in parse_targets(["0.05", "0.10"])]]
    groups = first + [[label.tracked(float(t), 4.0) for label in parse_targets(["0.05", "0.10"])] for t in range(5, 15)]
    goals = goals_for([Wanted(target, 14.0, 4.0) for target in parse_targets(["0.07", "0.2"])], STEADY)
    known = {"fixed": [10], "movement": STEADY, "noise": [NOISE] * 22}
    done = thinned(groups, [1.0] * 11, goals, Limit(2e-2, 0.0, 0.0), **known)
    assert max(found.forecast for found in done.after) <= 2e-2
    assert len(done.kept) < 8
