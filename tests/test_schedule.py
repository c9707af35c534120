from __future__ import annotations

import math
from itertools import pairwise

import pytest
from builders import examples
from hypothesis import given
from hypothesis import strategies as st

from sharded_phema.errors import TargetError
from sharded_phema.schedule import Schedule, crosses, snapshot_times


def multiple_within(last: int, t: int, every: int) -> bool:
    """Whether (last, t] holds a multiple, by trying every one, in whole numbers."""
    return any(last < k * every <= t for k in range(t // every + 2))


@examples(150)
@given(st.integers(0, 3000), st.integers(0, 400), st.integers(1, 500))
def test_crosses_finds_the_multiples_of_whole_numbers(last, advance, every):
    assert crosses(last, last + advance, every) == multiple_within(last, last + advance, every)


@examples(150)
@given(st.integers(0, 3000), st.integers(0, 400), st.integers(1, 500), st.sampled_from([10, 100, 1000, 8]))
def test_crosses_finds_the_multiples_of_decimal_fractions(last, advance, every, parts):
    # Oracle: the same in whole tenths, hundredths ...; the floats are those that a user types or a division gives.
    found = crosses(last / parts, (last + advance) / parts, every / parts)
    assert found == multiple_within(last, last + advance, every)


@pytest.mark.parametrize("step", [0.1, 0.25, 1 / 3, 0.7, 1e-3, 32.0, 1e6])
def test_times_that_are_products_or_sums_of_a_step_cross_once_a_period(step):
    # Times as a training loop makes them: k * step, or adding up, which is off by k roundings.
    for times in ([k * step for k in range(801)], [math.fsum([step] * k) for k in range(801)], added(step, 800)):
        due = [k for k in range(1, 801) if crosses(times[k - 1], times[k], 8 * step)]
        assert due == list(range(8, 801, 8))


def added(step: float, count: int) -> list[float]:
    times = [0.0]
    for _ in range(count):
        times.append(times[-1] + step)
    return times


@given(st.floats(0, 1e9), st.floats(1e-3, 1e9))
def test_standing_still_crosses_nothing(t, every):
    assert not crosses(t, t, every)


@examples(100)
@given(st.lists(st.integers(1, 90), min_size=1, max_size=30), st.integers(1, 50))
def test_every_period_that_holds_a_call_is_seen_once(advances, every):
    # Oracle: the periods (k * every) that the times fall into, counted as a set.
    times = [0]
    for advance in advances:
        times.append(times[-1] + advance)
    seen = sum(crosses(a, b, every) for a, b in pairwise(times))
    assert seen == len({t // every for t in times}) - 1


@pytest.mark.parametrize(("t", "every"), [(1e300, 1e-300), (1.0, 5e-324)])
def test_a_period_far_below_the_clock_is_crossed_at_every_step(t, every):
    # A Schedule accepts any positive period, so that none may break the arithmetic in the middle of training.
    assert crosses(0.0, t, every)


@examples(100)
@given(st.integers(0, 50), st.integers(0, 50), st.integers(0, 20), st.integers(1, 20), st.integers(0, 60))
def test_nothing_is_due_before_the_start(last, advance, update_every, snapshot_every, start):
    schedule, t = Schedule(update_every, snapshot_every, start), last + advance
    updates = update_every == 0 or multiple_within(last, t, update_every)
    assert schedule.updates(last, t) == (t >= start and updates)
    assert schedule.snapshots(last, t) == (t >= start and multiple_within(last, t, snapshot_every))


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ({"update_every": -1}, "update_every must be a non-negative number"),
        ({"update_every": math.inf}, "update_every must be a non-negative number"),
        ({"update_every": math.nan}, "update_every must be a non-negative number"),
        ({"snapshot_every": 0}, "snapshot_every must be a positive number"),
        ({"snapshot_every": -0.0}, "snapshot_every must be a positive number"),
        ({"snapshot_every": -5}, "snapshot_every must be a positive number"),
        ({"snapshot_every": math.nan}, "snapshot_every must be a positive number"),
        ({"start": -1e-9}, "start must be a non-negative number"),
        ({"start": math.inf}, "start must be a non-negative number"),
    ],
)
def test_an_impossible_rhythm_is_named_with_what_was_found(numbers, text):
    with pytest.raises(TargetError) as caught:
        Schedule(**{"update_every": 0, "snapshot_every": 1, "start": 0} | numbers)
    (found,) = numbers.values()
    assert text in caught.value.message
    assert "unit of training time" in caught.value.message
    assert str(found) in caught.value.message
    assert "snapshot_every=1000" in caught.value.hint


@examples(100)
@given(st.floats(1e-3, 1e12), st.integers(1, 64))
def test_snapshot_times_are_even_and_end_at_the_end(length, count):
    times = snapshot_times(length, count)
    assert len(times) == count
    assert times[-1] == length
    # Each product and quotient rounds once: a few units in the last place of the length.
    for before, after in zip((0.0, *times[:-1]), times, strict=True):
        assert after - before == pytest.approx(length / count, abs=4 * math.ulp(length))


def test_no_snapshots_have_no_times():
    assert snapshot_times(100.0, 0) == ()
