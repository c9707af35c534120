"""Grids: every element in one block and one share, in the order of the ranks' files, whoever and however many work."""

from __future__ import annotations

import itertools
import math
from unittest import mock

import numpy as np
import pytest
from builders import Division, divided_models, examples, layout_of, rows_of
from hypothesis import given
from hypothesis import strategies as st

from sharded_phema import grid
from sharded_phema.grid import Grid, RawRange, grid_of, shares
from sharded_phema.layout import Box, boxes_of_flat_range, whole
from sharded_phema.manifest import RawTensor, RunRecord
from sharded_phema.store import Layout, Spans

Element = tuple[str, int, int]
"""Whether it is averaged, the index of its tensor, and its place in it."""


def small(block: int):
    return mock.patch.object(grid, "BLOCK", block)


@st.composite
def edges_of(draw: st.DrawFn) -> np.ndarray:
    """Where each rank's part of each parameter begins, ranks without any part included."""
    ranks = draw(st.integers(1, 5))
    inner = st.lists(st.integers(0, 30), min_size=ranks, max_size=ranks).map(sorted)
    rows = draw(st.lists(inner, max_size=5))
    return np.array([[0, *row] for row in rows], np.int64).reshape(len(rows), ranks + 1)


raws = st.lists(st.integers(0, 40), max_size=4).map(tuple)


def elements_of(content) -> list[Element]:
    """All elements of a block, in order."""
    if isinstance(content, RawRange):
        return [("raw", content.index, i) for i in range(content.start, content.stop)]
    assert all(piece.flat and piece.numel for piece in content)
    return [
        ("averaged", piece.parameter, piece.box.offsets[0] + i) for piece in content for i in range(piece.box.sizes[0])
    ]


@examples(200)
@given(edges_of(), raws, st.integers(1, 25), st.integers(1, 9))
def test_the_blocks_of_all_workers_hold_each_element_once_rank_by_rank(edges, raw, block, workers) -> None:
    # Oracle: the elements counted one by one, rank by rank, parameter by parameter, then the other tensors.
    with small(block):
        whole_grid = Grid(edges, raw)
        costs = whole_grid.costs([1.0] * len(edges), [1.0] * len(raw))
        found = [whole_grid[number] for share in shares(costs, workers) for number in share]
        assert len(found) == len(whole_grid) == len(costs)
    expected: list[Element] = [
        ("averaged", parameter, i)
        for rank in range(edges.shape[1] - 1)
        for parameter in range(len(edges))
        for i in range(edges[parameter, rank], edges[parameter, rank + 1])
    ]
    expected += [("raw", index, i) for index, numel in enumerate(raw) for i in range(numel)]
    assert [element for content in found for element in elements_of(content)] == expected
    assert [len(elements_of(content)) for content in found] == costs.tolist()
    assert all(0 < len(elements_of(content)) <= block for content in found)


@examples(100)
@given(edges_of(), raws, st.integers(1, 25))
def test_blocks_are_full_but_for_the_last_of_each_rank_and_of_each_other_tensor(edges, raw, block) -> None:
    # A block that is smaller than it could be is one more to note; blocks never span two ranks' files.
    with small(block):
        whole_grid = Grid(edges, raw)
        sizes = [len(elements_of(whole_grid[number])) for number in range(len(whole_grid))]
    parts = [*np.diff(edges, axis=1).sum(axis=0).tolist(), *raw]
    assert sizes == [min(block, part - start) for part in parts for start in range(0, part, block)]


costs_of = st.lists(st.floats(0.0, 1e12, allow_subnormal=False), max_size=40).map(np.array)


@examples(200)
@given(costs_of, st.integers(1, 12))
def test_shares_are_runs_that_follow_each_other_and_are_equal_within_the_cost_of_one_block(costs, workers) -> None:
    found = shares(costs, workers)
    assert len(found) == workers
    assert [number for share in found for number in share] == [*range(len(costs))]
    equal, most = costs.sum() / workers, costs.max(initial=0.0)
    for share in found:
        # Sums of tens of numbers, each rounded: 1e-12 of the total is ample.
        assert abs(costs[share.start : share.stop].sum() - equal) <= most + 1e-12 * costs.sum()


@examples(60)
@given(edges_of(), raws, st.integers(1, 25), st.data())
def test_the_cost_of_all_blocks_is_that_of_all_elements(edges, raw, block, data) -> None:
    # Oracle: elements times their cost. Costs are whole numbers, so that only sums of them over a rank are divided.
    averaged = data.draw(st.lists(st.integers(0, 9), min_size=len(edges), max_size=len(edges)))
    others = data.draw(st.lists(st.integers(0, 9), min_size=len(raw), max_size=len(raw)))
    with small(block):
        costs = Grid(edges, raw).costs(averaged, others)
    expected = math.fsum(c * int(row[-1]) for c, row in zip(averaged, edges, strict=True))
    assert costs.sum() == pytest.approx(expected + np.dot(others, raw), rel=1e-12, abs=1e-9)


def layout_with(division: Division, raw: tuple[RawTensor, ...] = ()) -> Layout:
    record = layout_of(division)
    return Layout(record, RunRecord("run", "steps", ("power:gamma=6",), division.parameters, copied=raw))


@examples(150)
@given(divided_models(), st.integers(1, 30))
def test_the_grid_of_a_layout_holds_every_element_once_whatever_ranks_hold(division, block) -> None:
    with small(block):
        found = grid_of(layout := layout_with(division))
        seen = [element for number in range(len(found)) for element in elements_of(found[number])]
    numels = [math.prod(parameter.shape) for parameter in layout.run.parameters]
    assert sorted(seen) == [("averaged", p, i) for p, numel in enumerate(numels) for i in range(numel)]


@st.composite
def cut_into_runs(draw: st.DrawFn) -> Division:
    """A model each of whose parameters is cut into rows or flat ranges that follow each other from rank to rank."""
    ranks = draw(st.integers(1, 5))
    shapes = draw(st.lists(st.lists(st.integers(0, 5), max_size=3).map(tuple), min_size=1, max_size=4))
    held = []
    for shape in shapes:
        step = math.prod(shape[1:]) if shape and draw(st.booleans()) else 1
        length = math.prod(shape) // step if step else 0
        inner = st.lists(st.integers(0, length), min_size=ranks - 1, max_size=ranks - 1).map(sorted)
        cuts = [0, *draw(inner), length]
        edges = itertools.pairwise([edge * step for edge in cuts] if step else [0] * (ranks + 1))
        held.append([(boxes_of_flat_range(shape, a, b), 0) for a, b in edges])
    return Division(tuple(shapes), tuple(held))


@examples(150)
@given(cut_into_runs(), st.integers(1, 30))
def test_blocks_read_the_files_of_rows_and_flat_ranges_from_front_to_back_in_one_run(division, block) -> None:
    # Oracle: what each rank holds, counted.
    layout = layout_with(division)
    spans, at = Spans(layout), dict.fromkeys(range(division.ranks), 0)
    with small(block):
        found = grid_of(layout)
        for number in range(len(found)):
            route = spans.of(found[number])
            assert len({span.rank for span in route}) == 1, "one file a block"
            for span in route:
                assert span.strides is None and span.first == at[span.rank]
                at[span.rank] += span.count
    held = [[box for boxes, _ in ([one[rank] for one in division.held]) for box in boxes] for rank in at]
    assert at == {rank: sum(box.numel for box in boxes) for rank, boxes in enumerate(held)}


def test_what_one_rank_holds_of_all_is_one_run_and_columns_are_shared_out_evenly() -> None:
    # Oracle: by hand. Columns of a (4, 6) weight on 3 ranks: 24 elements, so that 8 go to each.
    columns = [(boxes, 0) for boxes in ((c,) for c in _columns((4, 6), 3))]
    with small(100):
        found = grid_of(layout_with(Division(((4, 6),), (columns,))))
    assert found.edges.tolist() == [[0, 8, 16, 24]]
    lonely = [((), 0), ((whole((5, 2)),), 0), ((), 0)]
    assert grid_of(layout_with(Division(((5, 2),), (lonely,)))).edges.tolist() == [[0, 0, 10, 10]]
    assert grid_of(layout_with(rows_of((7, 3), 4, 0, 3))).edges.tolist() == [[0, 12, 12, 21]]


def _columns(shape, ranks):
    width = shape[1] // ranks
    return [Box((0, rank * width), (shape[0], width)) for rank in range(ranks)]


def test_a_model_of_nothing_has_no_blocks_and_every_worker_an_empty_share() -> None:
    empty = Grid(np.zeros((0, 4), np.int64), ())
    assert len(empty) == 0 and [*shares(empty.costs([], []), 3)] == [range(0, 0)] * 3
    assert len(Grid(np.zeros((2, 2), np.int64), (0, 0))) == 0


def test_the_grid_of_thousands_of_ranks_is_made_and_shared_out_without_listing_its_blocks() -> None:
    # 4096 ranks with 1.1 million elements each of 300 parameters: a block more would be 8192 times its pieces.
    ranks, numel = 4096, 15_000_000
    edges = numel * np.arange(ranks + 1, dtype=np.int64)[None].repeat(300, axis=0) // ranks
    found = Grid(edges, (10**9,))
    costs = found.costs([4.0] * 300, [4.0])
    assert len(found) == len(costs) == 2 * ranks + math.ceil(10**9 / grid.BLOCK)
    assert costs.sum() == pytest.approx(4.0 * (300 * numel + 10**9))
    assert sum(piece.numel for piece in found[2 * ranks - 2]) == grid.BLOCK
