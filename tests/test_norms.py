"""Norms that snapshots carry, and what is learnt from them: against numpy in float64, whatever the cut into ranks."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
from builders import LABELS, averages_of, divided_models, examples, new_run, new_session, no_flush, rows_of, store
from hypothesis import given
from hypothesis import strategies as st
from walks import walk_run

from sharded_phema.errors import TargetError
from sharded_phema.movement import STEADY, movement_of
from sharded_phema.source import movement_in, movement_per_time, noise_of, sources_of
from sharded_phema.store import norms, open_run


def squares(values):
    return math.fsum(float(np.square(array.astype(np.float64)).sum()) for array in values)


@examples(30)
@given(divided_models(), st.integers(1, 7))
def test_norms_are_those_of_the_whole_model_however_it_is_cut(tmp_path_factory, division, chunk):
    # Oracle: numpy on the whole averages. Replicas count once, empty pieces not at all, any chunk does.
    root, averages = tmp_path_factory.mktemp("run"), averages_of(division, 1)
    with no_flush(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(norms, "CHUNK", chunk)
        new_run(root, division)
        new_session(root, division)
        store(root, division, averages, t=10.0)
    (snapshot,) = open_run(root).snapshots
    values = list(averages.values())
    assert snapshot.norms == pytest.approx([squares(value) for value in values], rel=1e-12)
    gaps = [squares([x.astype(np.float64) - y for x, y in zip(a, b, strict=True)]) for a, b in combinations(values, 2)]
    assert snapshot.gaps == pytest.approx(gaps, rel=1e-12)


def test_a_number_that_is_not_finite_leaves_a_snapshot_without_norms(tmp_path):
    division = rows_of((4, 2), 1, 3)
    averages = averages_of(division, 1)
    averages[LABELS[0]][0][3, 1] = np.nan
    with no_flush():
        new_run(tmp_path, division)
        new_session(tmp_path, division)
        store(tmp_path, division, averages, t=10.0)
    run = open_run(tmp_path)
    assert run.snapshots[0].norms == run.snapshots[0].gaps == ()
    assert noise_of(sources_of(run), STEADY) == (0.0,) * 2


def test_the_movement_of_a_random_walk_is_measured(tmp_path):
    # Oracle: steps of variance 1e-4 in each of 1000 numbers. A gap of 1000 numbers scatters by 5 %, and steps of
    # time leave some more.
    walk = walk_run(tmp_path)
    for snapshot in walk.run.snapshots[4:]:
        assert movement_per_time(snapshot, STEADY) == pytest.approx(0.1, rel=0.25)
    # Oracle: movement at a rate that is 1 in the second half only is D in that half.
    late = movement_of(([0.0, 100.0, 100.001, 200.0], [0.0, 0.0, 1.0, 1.0]), 200.0)
    assert movement_per_time(walk.run.snapshots[-1], late) == pytest.approx(0.1, rel=0.25)


def test_noise_is_rounding_over_movement(tmp_path):
    walk = walk_run(tmp_path)
    sources = sources_of(walk.run)
    speed = movement_per_time(walk.run.snapshots[-1], STEADY)
    for source, noise in zip(sources, noise_of(sources, STEADY), strict=True):
        norm = source.snapshot.norms[source.average]
        assert noise == pytest.approx(2.0**-48 * norm / 3.0 / speed, rel=1e-9)


def test_a_run_of_one_average_has_no_noise_term(tmp_path):
    walk = walk_run(tmp_path, labels=LABELS[:1])
    assert walk.run.snapshots[0].gaps == ()
    assert set(noise_of(sources_of(walk.run)[:1], STEADY)) == {0.0}


def test_movement_that_changes_is_measured(tmp_path):
    # Oracle: steps of half the size in the second half of the run. Gaps look back over the averages' widths, so the
    # ends of the two halves are compared, and 1000 numbers scatter by 5 %.
    walk = walk_run(tmp_path, rate=lambda step: 1.0 if step <= 100 else 0.5)
    measured = movement_in(walk.run, "measured").at(np.array([60.0, 85.0, 185.0, 200.0]))
    assert measured[2:] / measured[:2] == pytest.approx([0.5, 0.5], rel=0.25)
    assert movement_in(walk.run, "constant") is STEADY
    given = movement_in(walk.run, ([0.0, 200.0], [2.0, 1.0]))
    assert given.at(np.array([0.0, 200.0])) == pytest.approx([1.0, 0.5])
    with pytest.raises(TargetError, match="expected auto, measured, constant or a learning rate, found 'fast'"):
        movement_in(walk.run, "fast")


def test_movement_that_cannot_be_measured_is_constant(tmp_path):
    assert movement_in(walk_run(tmp_path / "one", labels=LABELS[:1]).run, "measured") is STEADY
    assert movement_in(walk_run(tmp_path / "still", size=0.0).run, "measured") is STEADY
