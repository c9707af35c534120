"""Sparse selection: against brute force, against refits, and at sizes where a Gram matrix would drown."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from builders import examples
from hypothesis import given
from hypothesis import strategies as st

from sharded_phema.errors import TargetError
from sharded_phema.fit import fit
from sharded_phema.movement import movement_of
from sharded_phema.profile import Checkpoint, Decay, Exponential, Power, Uniform
from sharded_phema.rounding import rounding_noise
from sharded_phema.select import select
from sharded_phema.width import gamma_of

FLOAT32 = rounding_noise("float32", 10.0)


def stored(count, widths=(0.05, 0.10), end=1.0):
    return [Power(gamma_of(width), end * (i + 1) / count) for i in range(count) for width in widths]


def power(width, t=1.0):
    return Power(gamma_of(width), t)


def kept(fits):
    return np.flatnonzero(np.any([found.coefficients != 0 for found in fits], axis=0)).tolist()


def squared_error(sources, targets, noise):
    """What the fits make smallest, of every target: squared distance and the sources' noise."""
    fits = fit(sources, targets, noise=noise)
    scale = max(p.t for p in [*sources, *targets])
    return np.array([f.error**2 + noise / scale * np.square(f.coefficients).sum() for f in fits])


mixed = st.lists(
    st.sampled_from(
        [
            *stored(4),
            Checkpoint(0.5),
            Checkpoint(1.0),
            Exponential(0.1, 0.8),
            Exponential(0.05, 1.0, 0.2, corrected=True),
            Uniform(0.0, 0.6),
            Power(0.0, 1.0),
        ]
    ),
    min_size=2,
    max_size=7,
    unique=True,
)
goals = st.lists(
    st.sampled_from([power(0.07), power(0.2), Uniform(0.7, 1.0), Decay("cosine", 0.5, 1.0)]),
    min_size=1,
    max_size=3,
    unique=True,
)


@examples(40)
@given(mixed, goals, st.sampled_from([1e-12, 1e-6, 1e-3]), st.data())
def test_each_source_that_goes_is_the_one_that_brute_force_would_take(sources, targets, noise, data):
    # Oracle: refit without each source in turn; the worst target decides. Ties, to rounding, may go either way.
    budget = data.draw(st.integers(1, len(sources) - 1))
    raw = np.array([fit([Checkpoint(1.0)], [target])[0].error ** 2 for target in targets])
    left = list(range(len(sources)))
    for size in range(len(sources) - 1, budget - 1, -1):
        now = squared_error([sources[i] for i in left], targets, noise)
        rises = []
        for i in left:
            without = squared_error([sources[k] for k in left if k != i], targets, noise)
            rises.append(((without - now) / raw).max())
        least = min(rises)
        left_now = kept(select(sources, targets, tolerance="exact", budget=size, noise=noise))
        if len(left_now) != size:
            return  # an exact coefficient of 0 counts as gone
        (gone,) = set(left) - set(left_now) if set(left_now) <= set(left) else (None,)
        if gone is None or rises[left.index(gone)] > least * (1 + 1e-4) + 1e-10:
            pytest.fail(f"removed {gone}, brute force removes {left[int(np.argmin(rises))]}: {rises}")
        left = left_now


@pytest.mark.parametrize("width", [0.03, 0.07, 0.15, 0.25])
def test_few_sources_are_nearly_the_best_few(width):
    # Oracle: all subsets of that size. Backward elimination is greedy: within a factor of 2 of the best of 12.
    sources, target = stored(6), power(width)
    for size in (2, 3, 4, 5):
        (found,) = select(sources, [target], tolerance="exact", budget=size, noise=FLOAT32)
        best = min(fit(some, [target], noise=FLOAT32)[0].forecast for some in itertools.combinations(sources, size))
        assert found.forecast <= 2 * best


@examples(40)
@given(mixed, goals, st.sampled_from([3e-1, 1e-1, 1e-2]))
def test_what_is_left_is_solved_anew_and_sums_to_one(sources, targets, tolerance):
    fits = select(sources, targets, tolerance=tolerance, noise=FLOAT32)
    left = kept(fits)
    for found, alone in zip(fits, fit([sources[i] for i in left], targets, noise=FLOAT32), strict=True):
        assert found.coefficients.sum() == pytest.approx(1.0, abs=1e-12 * found.noise_gain)
        np.testing.assert_allclose(found.coefficients[left], alone.coefficients, atol=1e-6 * alone.noise_gain)
    reached = max(found.forecast for found in fit(sources, targets, noise=FLOAT32))
    if reached <= tolerance:
        assert max(found.forecast for found in fits) <= tolerance * (1 + 1e-6)


@pytest.mark.parametrize(("tolerance", "most"), [(1e-2, 12), (1e-3, 40)])
@pytest.mark.parametrize("snapshots", [64, 256])
def test_few_of_many_sources_do_for_every_width(snapshots, tolerance, most):
    # The bar, and that elimination works on where squared residuals of 1e-12 drown in a Gram matrix.
    sources = stored(snapshots)
    for width in (0.03, 0.05, 0.07, 0.10, 0.13, 0.15, 0.20, 0.25):
        (found,) = select(sources, [power(width)], tolerance=tolerance, noise=FLOAT32)
        assert len(kept([found])) <= most
        assert found.forecast <= tolerance


def test_targets_share_sources():
    sources, targets = stored(32), [power(0.07), power(0.15), power(0.2), Uniform(0.8, 1.0)]
    tolerances = [1e-2, 1e-3, 1e-2, 2e-2]
    together = select(sources, targets, tolerance=tolerances, noise=FLOAT32)
    alone = [select(sources, [g], tolerance=e, noise=FLOAT32)[0] for g, e in zip(targets, tolerances, strict=True)]
    assert all(found.forecast <= e for found, e in zip(together, tolerances, strict=True))
    assert len(kept(together)) < len(kept(alone))


def test_a_stored_target_reads_one_source_which_others_may_use():
    sources = stored(8)
    fits = select(sources, [sources[5], power(0.2)], tolerance=1e-2, noise=FLOAT32)
    assert kept(fits[:1]) == [5]
    assert 5 in kept(fits[1:])
    assert kept(select(sources, [sources[3]])) == [3]


def test_kept_sources_stay():
    fits = select(stored(16), [power(0.15)], tolerance=1e-2, keep=[0, 9], noise=FLOAT32)
    assert {0, 9} <= set(kept(fits))


def test_exact_uses_all_sources():
    sources, target = stored(8), power(0.15)
    (found,) = select(sources, [target], tolerance="exact", noise=FLOAT32)
    np.testing.assert_array_equal(found.coefficients, fit(sources, [target], noise=FLOAT32)[0].coefficients)
    assert len(kept([found])) == 16


@pytest.mark.parametrize(("dtype", "expected"), [("float32", 1e-3), ("bfloat16", None)])
def test_auto_asks_for_no_more_than_rounding_leaves(dtype, expected):
    # Oracle: the definition. bfloat16 noise of one source, relative to |raw - target|, is what one source would give.
    noise, target = rounding_noise(dtype, 10.0), power(0.15)
    (raw,) = fit([Checkpoint(1.0)], [target])
    bar = expected or np.sqrt(noise) / raw.error
    best = fit(stored(32), [target], noise=noise)[0].forecast
    (found,) = select(stored(32), [target], noise=noise)
    assert best < found.forecast <= max(bar, 1.01 * best)
    (fewer,) = select(stored(32), [target], budget=len(kept([found])) - 1, tolerance="exact", noise=noise)
    assert fewer.forecast > bar


def test_auto_does_what_it_can_where_the_sources_are_poor():
    target = power(0.02)
    best = fit(stored(4), [target], noise=FLOAT32)[0].forecast
    (found,) = select(stored(4), [target], noise=FLOAT32)
    assert best > 1e-2
    assert found.forecast <= 1.01 * best * (1 + 1e-6)


def test_a_tolerance_out_of_reach_keeps_all_sources():
    (found,) = select(stored(4), [power(0.02)], tolerance=1e-3, noise=FLOAT32)
    assert len(kept([found])) == 8
    assert found.forecast > 1e-3


def test_a_budget_yields_no_tolerance_but_a_tolerance_may_need_less():
    (few,) = select(stored(16), [power(0.15)], tolerance=1e-1, budget=20, noise=FLOAT32)
    assert len(kept([few])) < 6
    (tight,) = select(stored(16), [power(0.15)], tolerance=1e-6, budget=5, noise=FLOAT32)
    assert len(kept([tight])) == 5


def test_a_selection_is_the_same_every_time_and_ties_go_by_order():
    sources, targets = stored(48), [power(0.07), power(0.2)]
    first, second = (select(sources, targets, tolerance=1e-3, noise=FLOAT32) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert a.coefficients.tobytes() == b.coefficients.tobytes()
    # Two names of one profile are a tie: the first goes.
    twins = [Power(0.0, 1.0), Uniform(0.0, 1.0), Power(9.0, 1.0)]
    assert kept(select(twins, [Power(2.0, 1.0)], tolerance=0.9, noise=FLOAT32)) in ([1, 2], [1], [2])


@pytest.mark.parametrize("factor", [1e-3, 7.0, 1e6])
def test_the_unit_of_time_changes_no_selection(factor):
    longer = select(stored(24, end=factor), [power(0.15, factor)], tolerance=1e-3, noise=FLOAT32 * factor)
    assert kept(longer) == kept(select(stored(24), [power(0.15)], tolerance=1e-3, noise=FLOAT32))


def test_where_weights_stand_still_nothing_is_read_for_it():
    # Weights that move only in the second half: snapshots of the first half tell nothing more than the start.
    movement = movement_of(([0.0, 0.5, 0.500001, 1.0], [0.0, 0.0, 1.0, 1.0]), 1.0)
    (found,) = select(stored(16), [power(0.2)], tolerance=1e-3, movement=movement, noise=FLOAT32)
    times = [stored(16)[i].t for i in kept([found])]
    assert sum(t < 0.5 for t in times) <= 1


@pytest.mark.parametrize(
    ("known", "text"),
    [
        ({"tolerance": 0.0}, "tolerance: expected auto, exact or a number above 0, found 0.0"),
        ({"tolerance": float("nan")}, "found nan"),
        ({"tolerance": [0.1, 0.1, 0.1]}, r"found \[0.1, 0.1, 0.1\]"),
        ({"budget": 0}, "budget: expected at least 1 source, found 0"),
        ({"noise": -1.0}, "noise: expected one number of at least 0"),
        ({"noise": [0.0]}, "or one for each of 4 sources"),
    ],
)
def test_bad_wishes_are_refused(known, text):
    with pytest.raises(TargetError, match=text):
        select(stored(2), [power(0.2)], **known)


@pytest.mark.timeout(60)
def test_a_thousand_sources_and_fifty_targets_take_seconds():
    sources = stored(500)
    widths = [power(width) for width in np.geomspace(0.03, 0.25, 45)]
    decays = [Decay("cosine", 1.0 - f, 1.0) for f in (0.05, 0.1, 0.2, 0.3, 0.4)]
    fits = select(sources, [*widths, *decays], tolerance=1e-2, noise=FLOAT32)
    assert max(found.forecast for found in fits) <= 1e-2
    assert len(kept(fits)) < 100
