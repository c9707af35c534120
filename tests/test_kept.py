"""What is kept: against brute force, against refits, and over runs that go on."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from builders import examples
from hypothesis import given
from hypothesis import strategies as st

from sharded_phema.errors import TargetError
from sharded_phema.fit import fit
from sharded_phema.kept import Moment, keep
from sharded_phema.movement import STEADY, movement_of
from sharded_phema.profile import Checkpoint
from sharded_phema.retention import Retention, parse_retention
from sharded_phema.rounding import rounding_noise
from sharded_phema.target import parse_targets

TRACKED = parse_targets(["0.05", "0.10"])
FLOAT32 = rounding_noise("float32", 10.0)
WIDTHS = "0.05:0.20 tolerance=1e-2"


def moments(times, *, start=0.0, size=100):
    return [Moment(float(t), start, size) for t in times]


def largest_forecast(held, targets, t, *, tracked=TRACKED, noise=FLOAT32, movement=STEADY):
    """Oracle: refit from the held snapshots alone."""
    start = held[-1].start
    sources = [label.tracked(moment.t, moment.start) for moment in held for label in tracked]
    profiles = [target.profile(t, start) for target in targets]
    return max(found.forecast for found in fit(sources, profiles, noise=noise, movement=movement))


def grown(length, wish, *, tracked=TRACKED, start=0.0, begin=1, step=1.0):
    """A run, step by step: the snapshots held after each, what is wanted of all, and of those that are held."""
    held, everything = [], []
    for n in range(begin, length + 1):
        moment = Moment(n * step, start, 100)
        held, everything = [*held, moment], [*everything, moment]
        done = keep(held, tracked, wish, noise=FLOAT32 * step, ongoing=True)
        held = [held[i] for i in done.kept]
        yield n, held, everything, done


times_of = st.lists(st.integers(3, 60), min_size=3, max_size=8, unique=True).map(sorted)
wishes = st.lists(
    st.sampled_from(["0.07", "0.15", "0.2", "0.03:0.25", "window:0.3", "uniform", "exponential:halflife=6"]),
    min_size=1,
    max_size=3,
    unique=True,
)


@examples(30)
@given(times_of, wishes, st.sampled_from([3e-1, 1e-1, 3e-2]))
def test_no_choice_is_smaller_by_more_than_one(times, texts, tolerance):
    # Oracle: all subsets with the last snapshot.
    held, wish = moments(times), Retention(tuple(texts), tolerance=tolerance)
    if largest_forecast(held, wish.wanted, times[-1]) > tolerance:
        return
    done = keep(held, TRACKED, wish, noise=FLOAT32)
    assert done.reached <= tolerance * (1 + 1e-6)
    for size in range(1, len(done.kept)):
        subsets = ([*some, held[-1]] for some in itertools.combinations(held[:-1], size - 1))
        if any(largest_forecast(some, wish.wanted, times[-1]) <= tolerance for some in subsets):
            assert len(done.kept) <= size + 1
            return


@examples(30)
@given(times_of, wishes, st.sampled_from([1e-1, 1e-2, 1e-3]), st.booleans())
def test_forecasts_are_those_of_a_refit_and_the_last_snapshot_stays(times, texts, tolerance, ongoing):
    held, wish = moments(times), Retention(tuple(texts), tolerance=tolerance)
    done = keep(held, TRACKED, wish, noise=FLOAT32, ongoing=ongoing)
    assert sorted((*done.kept, *done.dropped)) == list(range(len(held)))
    assert done.kept[-1] == len(held) - 1
    left = [held[i] for i in done.kept]
    assert done.freed == 100 * len(done.dropped)
    for cost in done.costs:
        assert cost.before == pytest.approx(largest_forecast(held, [cost.target], cost.t), rel=1e-5, abs=1e-9)
        assert cost.after == pytest.approx(largest_forecast(left, [cost.target], cost.t), rel=1e-5, abs=1e-9)
        # What is out of reach gets no worse than half the tolerance in quadrature.
        assert cost.after <= max(tolerance, math.hypot(cost.before, tolerance / 2)) * (1 + 1e-6)


@pytest.mark.parametrize("wide", ["0.07", "0.2", "0.05:0.20", "window:0.3"])
def test_the_best_few_are_nearly_the_best_subset(wide):
    # Oracle: all subsets of that size. Greedy: at most twice the least error.
    held = moments(range(1, 9))
    for count in (2, 3, 5):
        wish = Retention((wide,), count=count)
        done = keep(held, TRACKED, wish, noise=FLOAT32)
        assert len(done.kept) == count
        subsets = ([*some, held[-1]] for some in itertools.combinations(held[:-1], count - 1))
        best = min(largest_forecast(some, wish.wanted, 8.0) for some in subsets)
        assert done.reached <= 2 * best


@pytest.mark.parametrize(
    ("text", "length"),
    [(WIDTHS, 50), ("0.03 0.25 tolerance=3e-2", 40), ("window:0.2 decay:sqrt:0.3 tolerance=3e-2", 50)],
)
def test_every_end_of_a_run_is_within_the_tolerance(text, length):
    # Oracle: refits. Where all snapshots of the run together reach the tolerance, so do those that are left.
    wish, reached = parse_retention(text), 0
    for n, held, everything, _ in grown(length, wish):
        if largest_forecast(held, wish.wanted, float(n)) <= wish.tolerance * (1 + 1e-6):
            reached += 1
        else:
            assert largest_forecast(everything, wish.wanted, float(n)) > wish.tolerance, n
    assert reached > 20
    assert len(held) < 12


@examples(5)
@given(st.floats(0.0, 30.0), st.integers(0, 30), st.sampled_from(["0.05,0.10", "exponential:halflife=8,uniform"]))
def test_so_it_is_for_runs_that_begin_late(start, later, labels):
    wish = parse_retention("0.07 0.2 tolerance=5e-2")
    tracked, begin = parse_targets(labels.split(",")), math.ceil(start) + later % 5
    for n, held, everything, _ in grown(begin + 25, wish, tracked=tracked, start=start, begin=begin + 1):
        if largest_forecast(held, wish.wanted, float(n), tracked=tracked) > wish.tolerance * (1 + 1e-6):
            assert largest_forecast(everything, wish.wanted, float(n), tracked=tracked) > wish.tolerance, n


def test_a_run_ten_times_as_long_keeps_no_more():
    # The bound of the maths: targets look at a share of the run, however long it is.
    wish = parse_retention("0.07 0.15 tolerance=2e-2")
    kept = [len(held) for _, held, _, _ in grown(150, wish)]
    assert max(kept[15:]) <= max(kept[:15]) + 1


def test_windows_need_snapshots_that_the_present_end_can_do_without():
    # The begin of a window moves over what is now inside it.
    wish, now = parse_retention("window:0.2 tolerance=1e-2"), moments(range(1, 61))
    present, later = (keep(now, TRACKED, wish, noise=FLOAT32, ongoing=ongoing).kept for ongoing in (False, True))
    ahead = [*range(61, 76)]
    future = [
        [largest_forecast(moments([*(i + 1 for i in kept), *range(61, n + 1)]), wish.wanted, float(n)) for n in ahead]
        for kept in (present, later)
    ]
    assert max(future[0]) > 1.2e-2
    assert max(future[1]) <= 1e-2


def test_a_rate_that_will_fall_to_zero_keeps_more_if_it_is_known():
    # Oracle: refit at the end of the run, where weights hardly move and |raw - target| is small.
    wish, falls = parse_retention(WIDTHS), movement_of(lambda t: 0.5 + 0.5 * math.cos(math.pi * t / 60.0), 60.0)
    reached = []
    for movement in (falls, STEADY):
        done = keep(moments(range(1, 41)), TRACKED, wish, noise=FLOAT32, movement=movement, ongoing=True)
        held = moments([*(i + 1 for i in done.kept), *range(41, 61)])
        reached.append(largest_forecast(held, wish.wanted, 60.0, movement=falls))
    assert reached[0] <= 1e-2 < reached[1]


def test_earlier_ends_stay_within_the_tolerance_too():
    wish = parse_retention("0.07 0.2 tolerance=2e-2 earlier=2")
    *_, (_, held, _, done) = grown(70, wish)
    assert {16.0, 32.0, 64.0} < {moment.t for moment in held}
    assert {cost.t for cost in done.costs} == {1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 70.0}
    for t in (16.0, 32.0, 64.0):
        assert largest_forecast(held, wish.wanted, t) <= 2e-2
        assert max(cost.after for cost in done.costs if cost.t == t) <= 2e-2
    alone = keep(moments(range(1, 71)), TRACKED, parse_retention("0.07 0.2 tolerance=2e-2"), noise=FLOAT32)
    assert len(alone.kept) < len(held)


def test_a_target_with_its_own_time_is_kept_for_as_the_run_goes_on():
    wish = parse_retention("0.07@t=30 0.2 tolerance=2e-2")
    *_, (_, held, _, _) = grown(90, wish)
    assert largest_forecast(held, wish.wanted[:1], 30.0) <= 2e-2
    assert held[0].t <= 30.0  # or the plan of a rebuild refuses it
    *_, (_, without, _, _) = grown(90, parse_retention("0.2 tolerance=2e-2"))
    assert largest_forecast(without, wish.wanted[:1], 30.0) > 2e-2


def test_a_stored_target_needs_its_own_snapshot_alone():
    held = moments(range(1, 9))
    assert keep(held, TRACKED, parse_retention("0.05 0.1 tolerance=1e-3")).kept == (7,)
    assert keep(held, TRACKED, parse_retention("0.05@t=3 tolerance=1e-3")).kept == (2, 7)
    assert keep(held, TRACKED, parse_retention("0.05 count=3")).kept == (5, 6, 7)


def test_a_snapshot_at_the_first_update_is_no_trouble():
    # All averages are the first weights there, so that no two of them can be told apart.
    held = moments(range(5, 25), start=5.0)
    done = keep(held, TRACKED, parse_retention(WIDTHS), noise=FLOAT32)
    left = [held[i] for i in done.kept]
    assert largest_forecast(left, parse_retention(WIDTHS).wanted, 24.0) <= 1e-2
    assert len(left) < 12


def test_rounding_above_the_tolerance_may_be_that_of_one_stored_average():
    # Weights in bfloat16: what one stored average is off by, relative to |raw - target|, is already more than 1e-2.
    noise, wish = rounding_noise("bfloat16", 10.0) * 60, parse_retention(WIDTHS)
    done = keep(moments(range(1, 61)), TRACKED, wish, noise=noise)
    for cost in done.costs:
        one = math.sqrt(noise) / fit([Checkpoint(60.0)], [cost.target.profile(60.0)])[0].error / math.sqrt(60.0)
        assert cost.after <= max(math.hypot(1e-2, one), math.hypot(cost.before, 5e-3)) * (1 + 1e-6)
    assert done.reached > 2e-2
    assert len(done.kept) < 20


def test_bytes_are_a_limit_whatever_a_snapshot_takes():
    sizes = [100, 300, 100, 200, 100, 300, 100, 200]
    held = [Moment(float(i + 1), 0.0, size) for i, size in enumerate(sizes)]
    for limit in (200, 500, 900, 1400):
        done = keep(held, TRACKED, Retention(("0.05:0.20",), bytes=limit), noise=FLOAT32)
        assert sum(sizes[i] for i in done.kept) <= limit
        assert sum(sizes[i] for i in done.dropped) == done.freed > 0 or limit == 1400


def test_a_choice_is_the_same_every_time_and_in_every_unit():
    wish = parse_retention("0.05:0.20 window:0.2 tolerance=1e-2")
    first, second = (keep(moments(range(1, 41)), TRACKED, wish, noise=FLOAT32, ongoing=True) for _ in range(2))
    assert first == second
    longer = moments(1000.0 * np.arange(1, 41))
    assert keep(longer, TRACKED, wish, noise=1000.0 * FLOAT32, ongoing=True).kept == first.kept


def test_many_snapshots_are_thinned_in_stretches_as_well_as_together():
    # Oracle: refit. 120 snapshots are more than are looked at together, 90 are not; the run is the same.
    wish = parse_retention("0.03:0.25 tolerance=1e-2")
    held = moments(np.arange(1, 121) * 0.75)
    stretches = keep(held, TRACKED, wish, noise=FLOAT32)
    together = keep(moments(range(1, 91)), TRACKED, wish, noise=FLOAT32)
    left = [held[i] for i in stretches.kept]
    assert largest_forecast(left, wish.wanted, 90.0) <= 1e-2
    assert len(left) <= len(together.kept) + 1
    count = keep(held, TRACKED, parse_retention("0.03:0.25 count=12"), noise=FLOAT32)
    assert len(count.kept) == 12


@pytest.mark.timeout(120)
def test_a_thousand_snapshots_take_seconds():
    done = keep(moments(range(1, 1001)), TRACKED, parse_retention("0.05:0.20 tolerance=1e-3"), noise=1000 * FLOAT32)
    assert done.reached <= 1e-3
    assert len(done.kept) <= 20


@pytest.mark.parametrize(
    ("times", "text", "message"),
    [
        ((), WIDTHS, r"expected snapshots in order of time, found \[\]"),
        ((2, 1), WIDTHS, "expected snapshots in order of time"),
        ((1, 2), "0.07@t=3 tolerance=1e-2", r"0.07@t=3: the snapshots are from 1 to 2"),
        ((2, 3), "0.07@t=1 tolerance=1e-2", r"0.07@t=1: the snapshots are from 2 to 3"),
        ((1, 2), "0.07 bytes=50", "50 bytes are less than the last snapshot takes, 100"),
    ],
)
def test_what_cannot_be_decided_is_refused(times, text, message):
    with pytest.raises(TargetError, match=message):
        keep(moments(times), TRACKED, parse_retention(text))
