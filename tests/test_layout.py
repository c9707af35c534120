from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from builders import boxes_in, examples, shapes
from hypothesis import given
from hypothesis import strategies as st

from sharded_phema.layout import Box, boxes_of_flat_range, canonical_name, flattened, intersection, whole

WRAPPERS = ["_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"]


@st.composite
def flat_ranges(draw):
    shape = tuple(draw(st.lists(st.integers(0, 6), max_size=4)))
    start, stop = sorted(draw(st.tuples(*[st.integers(0, math.prod(shape))] * 2)))
    return shape, start, stop


@st.composite
def pairs_of_boxes(draw):
    shape = draw(shapes)
    return shape, draw(boxes_in(shape)), draw(boxes_in(shape))


def elements(box):
    """Indices of a box, by enumeration."""
    return set(itertools.product(*(range(o, o + s) for o, s in zip(box.offsets, box.sizes, strict=True))))


@examples(200)
@given(flat_ranges())
def test_boxes_laid_end_to_end_are_the_flat_range(case):
    # Oracle: numpy's own row-major order.
    shape, start, stop = case
    x = np.arange(math.prod(shape)).reshape(shape)
    pieces = [x[box.slices].ravel() for box in boxes_of_flat_range(shape, start, stop)]
    assert np.concatenate([np.empty(0), *pieces]).tolist() == list(range(start, stop))


@examples(100)
@given(flat_ranges())
def test_boxes_of_a_flat_range_are_few_full_and_disjoint(case):
    shape, start, stop = case
    boxes = boxes_of_flat_range(shape, start, stop)
    assert len(boxes) <= max(1, 2 * len(shape) - 1)
    assert all(box.numel > 0 for box in boxes)
    assert all(intersection(a, b) is None for a, b in itertools.combinations(boxes, 2))


@given(shapes)
def test_the_whole_flat_range_is_one_box(shape):
    expected = (whole(shape),) if math.prod(shape) else ()
    assert boxes_of_flat_range(shape, 0, math.prod(shape)) == expected


def test_the_worst_flat_range_needs_every_box_that_is_allowed():
    # From (0, 0, 1) to (2, 2, 1) inclusive of a 3 x 3 x 3 tensor: half a row, a row, a plane, a row, half a row.
    assert len(boxes_of_flat_range((3, 3, 3), 1, 26)) == 5


@examples(150)
@given(pairs_of_boxes())
def test_the_intersection_holds_the_shared_elements(case):
    # Oracle: sets of indices.
    _, a, b = case
    shared, expected = intersection(a, b), elements(a) & elements(b)
    assert (elements(shared) if shared else set()) == expected
    assert (shared is None) == (not expected)
    assert shared == intersection(b, a)


@given(pairs_of_boxes())
def test_slices_and_numel_agree_with_numpy(case):
    shape, box, _ = case
    cut = np.zeros(shape)[box.slices]
    assert cut.shape == box.sizes
    assert cut.size == box.numel


def test_boxes_of_different_dimensions_have_no_intersection_to_speak_of():
    with pytest.raises(ValueError, match=r"zip\(\)"):
        intersection(Box((0,), (2,)), Box((0, 0), (2, 2)))


@given(shapes)
def test_the_whole_is_all_of_the_tensor(shape):
    box = whole(list(shape))
    assert box == Box((0,) * len(shape), shape)
    assert elements(box) == set(np.ndindex(shape))


@given(st.lists(st.sampled_from(["a", "weight", "0", "orig_mod", *WRAPPERS]), min_size=1, max_size=8))
def test_a_canonical_name_has_lost_its_wrapper_segments_and_nothing_else(segments):
    name = canonical_name(".".join(segments))
    assert name.split(".") == ([s for s in segments if s not in WRAPPERS] or [""])
    assert canonical_name(name) == name


def test_a_segment_that_only_contains_a_wrapper_name_stays():
    assert canonical_name("my_orig_mod._orig_mod.x_fsdp_wrapped_module") == "my_orig_mod.x_fsdp_wrapped_module"


@given(shapes=st.lists(st.integers(1, 5), max_size=4).map(tuple), data=st.data())
def test_a_box_flattens_exactly_when_its_elements_are_one_run(shapes, data):
    # Oracle: the flat indices of its elements, by brute force.
    offsets = tuple(data.draw(st.integers(0, n - 1)) for n in shapes)
    sizes = tuple(data.draw(st.integers(1, n - o)) for n, o in zip(shapes, offsets, strict=True))
    indices = np.arange(math.prod(shapes)).reshape(shapes)[Box(offsets, sizes).slices].ravel()
    run = bool((np.diff(indices) == 1).all())
    expected = Box((int(indices[0]),), (indices.size,)) if run else None
    assert flattened(Box(offsets, sizes), shapes) == expected
