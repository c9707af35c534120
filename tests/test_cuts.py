"""Cuts: the record of a layout gives back who holds what, in few words, and lies are refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from builders import LABELS, divided_models, divisions, examples, layout_of, rows_of, shapes, shard
from hypothesis import given
from hypothesis import strategies as st

from sharded_phema.errors import StoreError
from sharded_phema.layout import Box, whole
from sharded_phema.manifest import Cut, LayoutRecord, Parameter, RawTensor, RunRecord
from sharded_phema.store import here, layout_record
from sharded_phema.store.cuts import Layout
from sharded_phema.transcript import decode, encode


def run_of(division):
    return RunRecord("run", "steps", LABELS, division.parameters)


def written(held):
    """Ranks that write something, and what: replicas write nothing."""
    return tuple((rank, boxes) for rank, (boxes, replica) in enumerate(held) if replica == 0 and boxes)


def elements(held):
    """The same but for boxes without elements, of which a record may leave out any."""
    some = [(rank, tuple(box for box in boxes if box.numel)) for rank, boxes in held]
    return [(rank, boxes) for rank, boxes in some if boxes]


@examples(120)
@given(divided_models())
def test_who_holds_what_comes_back_from_the_record_of_any_division(division):
    # Oracle: what each rank was given.
    record = decode(LayoutRecord, encode(layout_of(division)), "x")
    assert record == layout_of(division)
    layout = Layout(record, run_of(division))
    for index, held in enumerate(division.held):
        assert elements(layout.averaged(index)) == elements(written(held))


@examples(60)
@given(st.integers(1, 4), st.data())
def test_copied_and_frozen_tensors_have_cuts_of_their_own(ranks, data):
    # Tensors are counted through over the three kinds; none is taken for another.
    kinds = [[data.draw(shapes) for _ in range(data.draw(st.integers(0, 2)))] for _ in range(3)]
    held = [[data.draw(divisions(shape, ranks)) for shape in kind] for kind in kinds]
    run = RunRecord(
        "run",
        "steps",
        LABELS,
        tuple(Parameter(f"p{i}", shape) for i, shape in enumerate(kinds[0])),
        *(tuple(RawTensor(f"r{i}", shape, "float32", "buffer") for i, shape in enumerate(kind)) for kind in kinds[1:]),
    )

    def live(rank):
        return [
            tuple(shard("w", np.zeros(s, np.float32), *cut[rank]) for s, cut in zip(kind, cuts, strict=True))
            for kind, cuts in zip(kinds, held, strict=True)
        ]

    layout = Layout(layout_record(run, [here(live(rank)) for rank in range(ranks)]), run)
    for of, cuts in zip((layout.averaged, layout.copied, layout.frozen), held, strict=True):
        assert [elements(of(i)) for i in range(len(cuts))] == [elements(written(cut)) for cut in cuts]


def test_rows_in_rank_order_are_written_down_as_edges():
    division = rows_of((7, 3), 2, 0, 5)
    assert layout_of(division).averaged == (Cut(0, (0, 2, 2, 7)),)
    columns = replace(division, held=([((Box((0, 0), (7, 1)),), 0), ((), 0), ((Box((0, 1), (7, 2)),), 0)],))
    assert layout_of(columns).averaged == (Cut(1, (0, 1, 1, 3)),)


def test_a_record_grows_by_a_number_for_each_rank_and_tensor():
    # 1000 tensors over 512 ranks; a box for each would take some 40 bytes more.
    shape, ranks, tensors = (4096, 8), 512, 1000
    rows = [[(0, 0, 8 * rank, 8 * rank + 8)] for rank in range(ranks)]
    slabs = [np.array([(index, *row[0][1:]) for index in range(tensors)], np.int64) for row in rows]
    one = here([])
    run = RunRecord("run", "steps", LABELS, tuple(Parameter(f"p{i}", shape) for i in range(tensors)))
    record = layout_record(run, [replace(one, slabs=slab) for slab in slabs])
    assert record.averaged == (Cut(0, tuple(range(0, 4097, 8))),) * tensors
    assert len(encode(record)) < 6 * ranks * tensors


def test_rows_out_of_rank_order_and_single_owners_are_written_down_as_boxes():
    swapped = [((Box((4, 0), (3, 3)),), 0), ((Box((0, 0), (4, 3)),), 0)]
    division = replace(rows_of((7, 3), 4, 3), held=(swapped,))
    (cut,) = layout_of(division).averaged
    assert (cut.edges, cut.ranks) == ((), (0, 1))
    layout = Layout(layout_of(division), run_of(division))
    assert layout.averaged(0) == ((0, swapped[0][0]), (1, swapped[1][0]))


LIES = {
    "too few edges": Cut(0, (0, 4)),
    "too many edges": Cut(0, (0, 1, 2, 4)),
    "an end short of the tensor's": Cut(0, (0, 1, 3)),
    "an end beyond the tensor's": Cut(0, (0, 1, 5)),
    "a begin behind the tensor's": Cut(0, (1, 2, 4)),
    "edges that go back": Cut(0, (0, 5, 4)),
    "no such dimension": Cut(2, (0, 1, 4)),
    "another dimension": Cut(1, (0, 1, 4)),
    "nothing": Cut(),
    "a rank too few": Cut(0, (), (0,), ((Box((0, 0), (1, 3)),), (Box((1, 0), (3, 3)),))),
    "no such rank": Cut(0, (), (0, 2), ((Box((0, 0), (1, 3)),), (Box((1, 0), (3, 3)),))),
    "a box outside": Cut(0, (), (0, 1), ((Box((0, 0), (1, 3)),), (Box((2, 0), (3, 3)),))),
    "a box of another rank": Cut(0, (), (0,), ((Box((0,), (12,)),),)),
    "sizes of another rank": Cut(0, (), (0,), ((Box((0, 0), (4, 3, 1)),),)),
    "a gap": Cut(0, (), (0, 1), ((Box((0, 0), (1, 3)),), (Box((2, 0), (2, 3)),))),
    "an overlap as large as the gap": Cut(0, (), (0, 1), ((Box((0, 0), (2, 3)),), (Box((0, 0), (2, 3)),))),
    "more than memory holds": Cut(0, (), (0,), ((Box((0, 0), (1 << 40, 1 << 40)),),)),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_cut_that_cannot_be_is_refused(lie):
    division = rows_of((4, 3), 1, 3)
    layout = Layout(replace(layout_of(division), averaged=(LIES[lie],)), run_of(division))
    with pytest.raises(StoreError, match=r"shape \(4, 3\) what cannot be of 2 ranks") as caught:
        layout.averaged(0)
    assert caught.value.hint
    assert len(caught.value.message) < 500


@pytest.mark.parametrize("changed", [{"run": "other"}, {"averaged": ()}, {"copied": (Cut(),)}, {"frozen": (Cut(),)}])
def test_the_layout_of_another_run_is_refused(changed):
    division = rows_of((4, 3), 1, 3)
    with pytest.raises(StoreError, match="a layout of run"):
        Layout(replace(layout_of(division), **changed), run_of(division))


@examples(60)
@given(st.data())
def test_edited_edges_give_each_element_to_one_rank_or_are_refused(data):
    # Oracle: counting elements in an array.
    division = rows_of((5, 2), 2, 1, 2)
    edges = tuple(data.draw(st.lists(st.integers(0, 6), min_size=2, max_size=5)))
    layout = Layout(replace(layout_of(division), averaged=(Cut(0, edges),)), run_of(division))
    count = np.zeros((5, 2), int)
    try:
        held = layout.averaged(0)
    except StoreError:
        return
    for _, boxes in held:
        for box in boxes:
            count[box.slices] += 1
    assert (count == 1).all() and all(0 <= rank < 3 for rank, _ in held)


def test_a_tensor_without_dimensions_and_one_without_elements_are_held():
    held = [((whole(()),), 0), ((), 0)]
    empty = [((whole((0, 3)),), 0), ((whole((0, 3)),), 1)]
    division = replace(rows_of((), 0), shapes=((), (0, 3)), held=(held, empty))
    layout = Layout(layout_of(division), run_of(division))
    assert layout.averaged(0) == ((0, (whole(()),)),)
    assert elements(layout.averaged(1)) == []
