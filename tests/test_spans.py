"""Spans: any pieces of any parameter are found in the files of any world, whoever holds what."""

from __future__ import annotations

import itertools
import math
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random
from unittest import mock

import numpy as np
import pytest
import torch
from builders import (
    LABELS,
    Division,
    averages_of,
    boxes_in,
    divided_models,
    examples,
    layout_of,
    new_run,
    new_session,
    no_flush,
    rows_of,
    store,
)
from hypothesis import given
from hypothesis import strategies as st
from worlds import random_holding

from sharded_phema import grid
from sharded_phema.errors import StoreError
from sharded_phema.feed import Feed
from sharded_phema.grid import RawRange, grid_of
from sharded_phema.layout import Box, boxes_of_flat_range, whole
from sharded_phema.losses import Losses
from sharded_phema.manifest import RunRecord
from sharded_phema.source import Source
from sharded_phema.store import Layout, Piece, Spans, open_run


@pytest.fixture(autouse=True, scope="module")
def quick_disk():
    with no_flush():
        yield


@st.composite
def any_worlds(draw: st.DrawFn) -> Division:
    """Rows, columns, copies and flat ranges by hypothesis; meshes, padding and idle ranks by a seed."""
    if draw(st.booleans()):
        return draw(divided_models())
    rng, ranks = Random(draw(st.integers(0, 10**6))), draw(st.integers(1, 6))
    lengths = [0, 1, 1, 2, 3, 5, 7, 8]
    shapes = [tuple(rng.choice(lengths) for _ in range(rng.choice([0, 1, 2, 2, 3]))) for _ in range(rng.randint(1, 4))]
    return Division(tuple(shapes), tuple(numbered(random_holding(rng, shape, ranks)) for shape in shapes))


def numbered(held):
    """Boxes with replica numbers: who holds the same as an earlier rank is a replica of it."""
    seen: Counter = Counter()
    found = []
    for boxes in held:
        found.append((boxes, seen[boxes] if boxes else 0))
        seen[boxes] += 1
    return found


@st.composite
def pieces_of(draw: st.DrawFn, shapes) -> list[Piece]:
    """Any pieces, flat ones and boxes, empty ones included, some cut further."""
    pieces: list[Piece] = []
    for _ in range(draw(st.integers(1, 6))):
        parameter = draw(st.integers(0, len(shapes) - 1))
        shape, numel = shapes[parameter], math.prod(shapes[parameter])
        if draw(st.booleans()):
            start = draw(st.integers(0, numel))
            piece = Piece(parameter, Box((start,), (draw(st.integers(0, numel - start)),)), True)
        else:
            piece = Piece.of(parameter, draw(boxes_in(shape)), shape)
        if draw(st.booleans()):
            a, b = sorted((draw(st.integers(0, piece.numel)), draw(st.integers(0, piece.numel))))
            pieces += piece.cut(a, b)
        else:
            pieces.append(piece)
    return pieces


def values_in(whole_: list[np.ndarray], pieces) -> np.ndarray:
    """What pieces hold of whole arrays, end to end."""
    found = [np.empty(0, np.float32)]
    for piece in pieces:
        array = whole_[piece.parameter]
        found.append((array.ravel() if piece.flat else array)[piece.box.slices].ravel())
    return np.concatenate(found)


def rounded(averages, dtype: str):
    """What is left of arrays that were stored in a dtype."""
    kind = getattr(torch, dtype)
    return {k: [torch.from_numpy(a).to(kind).float().numpy() for a in v] for k, v in averages.items()}


def read(feed: Feed, sources, pieces, dtype: str) -> np.ndarray:
    """What a feed gives of sources, as float32."""
    rows = torch.full((len(sources), sum(piece.numel for piece in pieces)), torch.nan, dtype=getattr(torch, dtype))
    feed.fill(sources, pieces, [*rows.view(torch.uint8).numpy()])
    return rows.float().numpy()


def fill(sources, pieces, dtype: str) -> np.ndarray:
    feed = Feed(Losses())
    rows = read(feed, sources, pieces, dtype)
    feed.finish()
    return rows


@examples(200)
@given(any_worlds(), st.sampled_from(["float32", "bfloat16", "float16"]), st.data())
def test_any_pieces_of_any_world_come_back_as_they_were_stored(division, dtype, data) -> None:
    # Oracle: slices of the whole arrays, rounded by torch.
    pieces, averages = data.draw(pieces_of(division.shapes)), averages_of(division, 7)
    with tempfile.TemporaryDirectory() as folder:
        new_run(folder, division, dtype=dtype)
        new_session(folder, division)
        store(folder, division, averages, t=1.0, dtype=dtype)
        (snapshot,) = open_run(folder).snapshots
        found = fill([Source(snapshot, average) for average in range(len(LABELS))], pieces, dtype)
    for row, label in zip(found, LABELS, strict=True):
        assert row.tobytes() == values_in(rounded(averages, dtype)[label], pieces).tobytes()


@examples(100)
@given(
    any_worlds(), st.integers(1, 5), st.integers(1, 40), st.sampled_from(["float32", "bfloat16", "float16"]), st.data()
)
def test_the_grid_of_one_world_reads_what_another_stored(division, ranks, block, dtype, data) -> None:
    # Oracle: the whole arrays. One session stored with each world; the blocks are those of the first.
    seed = data.draw(st.integers(0, 10**6))
    held = tuple(numbered(random_holding(Random(seed + i), shape, ranks)) for i, shape in enumerate(division.shapes))
    other, averages = Division(division.shapes, held), [averages_of(division, 3), averages_of(division, 5)]
    found = [[np.full(math.prod(shape), np.nan, np.float32) for shape in division.shapes] for _ in range(4)]
    with tempfile.TemporaryDirectory() as folder:
        new_run(folder, division, dtype=dtype)
        new_session(folder, division)
        store(folder, division, averages[0], t=1.0, dtype=dtype)
        new_session(folder, other, "s1", parent="s0", resumed_at=1.0)
        store(folder, other, averages[1], t=2.0, session="s1", dtype=dtype)
        one, two = open_run(folder).snapshots
        sources = [Source(snapshot, average) for snapshot in (one, two) for average in range(2)]
        with mock.patch.object(grid, "BLOCK", block):
            blocks = grid_of(one.layout)
            feed = Feed(Losses())
            for number in range(len(blocks)):
                pieces = blocks[number]
                assert not isinstance(pieces, RawRange)
                for row, arrays in zip(read(feed, sources, pieces, dtype), found, strict=True):
                    begin = 0
                    for piece in pieces:
                        arrays[piece.parameter][piece.box.slices] = row[begin : begin + piece.numel]
                        begin += piece.numel
            feed.finish()
    expected = [rounded(values, dtype)[label] for values in averages for label in LABELS]
    for arrays, whole_ in zip(found, expected, strict=True):
        assert all(a.tobytes() == w.ravel().tobytes() for a, w in zip(arrays, whole_, strict=True))


@examples(150)
@given(any_worlds(), st.data())
def test_spans_hold_each_wanted_element_once_and_lie_inside_of_their_ranks_part(division, data) -> None:
    # Oracle: counting.
    pieces = data.draw(pieces_of(division.shapes))
    layout = Layout(layout_of(division), RunRecord("run", "steps", LABELS, division.parameters))
    spans, counts = Spans(layout), np.zeros(sum(piece.numel for piece in pieces), int)
    for span in spans.of(pieces):
        firsts = spans.firsts(span.rank)
        assert span.first >= 0 and span.count > 0 and span.first + span.count <= firsts[-1]
        if span.strides is None:
            counts[span.begin : span.begin + span.count] += 1
        else:
            sizes, _, here = span.strides
            steps = [np.arange(size) * step for size, step in zip(sizes, here, strict=True)]
            places = np.array([sum(each) for each in itertools.product(*steps)]) + span.begin
            counts[places] += 1
    assert (counts == 1).all()


@examples(60)
@given(any_worlds())
def test_where_parameters_begin_in_a_ranks_part_is_the_sum_of_what_it_holds_before(division) -> None:
    # Oracle: what each rank was given, in the order of the parameters.
    layout = Layout(layout_of(division), RunRecord("run", "steps", LABELS, division.parameters))
    for rank in range(division.ranks):
        held = [sum(box.numel for box in one[rank][0]) * (one[rank][1] == 0) for one in division.held]
        assert Spans(layout).firsts(rank).tolist() == np.cumsum([0, *held]).tolist()


@examples(100)
@given(st.lists(st.integers(0, 5), max_size=3).map(tuple), st.data())
def test_a_piece_that_is_cut_holds_the_same_elements(shape, data) -> None:
    # Oracle: slices of the flat contents.
    piece = Piece.of(0, data.draw(boxes_in(shape)), shape)
    whole_ = [np.arange(math.prod(shape), dtype=np.float32).reshape(shape)]
    start, stop = sorted((data.draw(st.integers(0, piece.numel)), data.draw(st.integers(0, piece.numel))))
    assert values_in(whole_, piece.cut(start, stop)).tolist() == values_in(whole_, [piece])[start:stop].tolist()


def test_pieces_that_follow_each_other_in_a_file_are_one_span() -> None:
    # Oracle: by hand. Two parameters of 6 and 4 elements; rank 1 holds the last 2 and 4 of them.
    shapes = ((3, 2), (4,))
    held = [[(boxes_of_flat_range(shapes[0], 0, 4), 0), (boxes_of_flat_range(shapes[0], 4, 6), 0)]]
    held += [[((), 0), ((whole((4,)),), 0)]]
    division = Division(shapes, tuple(held))
    layout = Layout(layout_of(division), RunRecord("run", "steps", LABELS, division.parameters))
    pieces = [Piece(0, Box((1,), (5,)), True), Piece(1, Box((0,), (3,)), True)]
    found = [(span.rank, span.first, span.count, span.begin, span.strides) for span in Spans(layout).of(pieces)]
    assert found == [(0, 1, 3, 0, None), (1, 0, 5, 3, None)]


def test_a_layout_that_does_not_cover_what_is_wanted_is_an_error_with_the_parameters_name(monkeypatch) -> None:
    division = rows_of((4, 3), 2, 2)
    layout = Layout(layout_of(division), RunRecord("run", "steps", LABELS, division.parameters))
    monkeypatch.setattr(Layout, "averaged", lambda self, index: [(0, (Box((0, 0), (2, 3)),))])
    for piece in (Piece(0, Box((0,), (12,)), True), Piece(0, Box((1, 1), (3, 1)), False)):
        with pytest.raises(StoreError, match=r"\d+ of \d+ elements of layer\.0\.weight in .* are stored") as caught:
            Spans(layout).of([piece])
        assert caught.value.hint


@pytest.mark.parametrize("limit", [0, 3, 4, 1000])
def test_as_few_files_are_open_as_are_allowed_and_what_is_read_is_the_same(tmp_path, limit) -> None:
    # Oracle: the whole arrays, and the list of this process's descriptors.
    division = rows_of((16, 3), *[2] * 8)
    averages = averages_of(division, 1)
    new_run(tmp_path, division)
    new_session(tmp_path, division)
    store(tmp_path, division, averages, t=1.0)
    (snapshot,) = open_run(tmp_path).snapshots
    here = Path("/proc/self/fd")
    with mock.patch("sharded_phema.feed.resource.getrlimit", lambda kind: (2 * limit, 2 * limit)):
        feed = Feed(Losses())
    before, sources = len([*here.iterdir()]), [Source(snapshot, average) for average in range(2)]
    for start in (0, 6, 24, 40, 3, 42):
        pieces, rows = [Piece(0, Box((start,), (6,)), True)], np.zeros((2, 6), np.float32)
        feed.fill(sources, pieces, [*rows])
        for row, label in zip(rows, LABELS, strict=True):
            assert row.tolist() == averages[label][0].ravel()[start : start + 6].tolist()
        # The files of one piece, two at most of each average, are opened in any case.
        assert len([*here.iterdir()]) - before <= max(limit, 2) + 4
    feed.finish()
    assert len([*here.iterdir()]) == before


def test_a_file_that_cannot_be_read_is_noted_as_a_loss_of_its_snapshot(tmp_path) -> None:
    division = rows_of((4, 3), 2, 2)
    new_run(tmp_path, division)
    new_session(tmp_path, division)
    for number in range(2):
        store(tmp_path, division, averages_of(division, number), t=1.0 + number, number=number)
    good, bad = open_run(tmp_path).snapshots
    path = Path(bad.where) / "rank-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    losses, rows = Losses(), np.zeros((2, 12), np.float32)
    feed = Feed(losses)
    sources = [Source(replace(good), 0), Source(bad, 1)]
    with pytest.raises(StoreError, match="is damaged between bytes"):
        feed.fill(sources, [Piece(0, Box((0,), (12,)), True)], [*rows])
        feed.finish()
    feed.close()
    assert [*losses.found] == [bad.name] and "rank-00001.safetensors is damaged" in losses.found[bad.name]
