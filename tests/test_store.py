from __future__ import annotations

import json
import math
import resource
import shutil
import tempfile
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from builders import (
    LABELS,
    averages_of,
    boxes_in,
    divided_models,
    examples,
    listing,
    new_run,
    new_session,
    no_flush,
    numbers,
    rows_of,
    shapes,
    shard,
    store,
    tensors_of,
)
from hypothesis import assume, given
from hypothesis import strategies as st
from safetensors import safe_open
from torch.distributed.checkpoint.api import CheckpointException

from sharded_phema.errors import StoreError
from sharded_phema.layout import Box, boxes_of_flat_range, whole
from sharded_phema.manifest import LayoutRecord, PartRecord, SessionRecord, encode
from sharded_phema.store import BoxTensor, names, open_run, run_exists
from sharded_phema.store.dcp_reader import SnapshotReader

# Torch says so of every save and load outside a process group.
pytestmark = pytest.mark.filterwarnings("ignore:.*single process")

TWO_RANKS = rows_of((4, 3), 1, 3)
EVEN_RANKS = rows_of((4, 3), 2, 2)


@pytest.fixture(autouse=True, scope="module")
def quick_disk():
    with no_flush():
        yield


@pytest.fixture
def root():
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "run"


def stored_run(root, division, snapshots=1, seed=0):
    """A run of one session; gives what every snapshot's averages are."""
    new_run(root, division)
    new_session(root, division)
    values = [averages_of(division, seed + 10 * n) for n in range(snapshots)]
    for n, averages in enumerate(values):
        store(root, division, averages, t=10.0 * (n + 1), number=n)
    return values


def read_whole(snapshot):
    return {
        label: [snapshot.read_box(a, p, whole(x.shape)) for p, x in enumerate(snapshot.record.parameters)]
        for a, label in enumerate(snapshot.record.averages)
    }


def assert_same_values(found, expected):
    assert found.keys() == expected.keys()
    for label, arrays in expected.items():
        for a, b in zip(found[label], arrays, strict=True):
            np.testing.assert_array_equal(a, b, strict=True)


@examples(25)
@given(divided_models(), st.data())
def test_any_range_read_back_is_what_numpy_cuts_from_the_whole(division, data):
    # Oracle: numpy on the arrays that were cut up; nothing is computed, so that bits are equal.
    with tempfile.TemporaryDirectory() as folder:
        averages = stored_run(Path(folder), division)[0]
        (snapshot,) = open_run(folder).snapshots
        assert_same_values(read_whole(snapshot), averages)
        for _ in range(4):
            a = data.draw(st.integers(0, len(LABELS) - 1))
            p = data.draw(st.integers(0, len(division.shapes) - 1))
            expected, shape = averages[LABELS[a]][p], division.shapes[p]
            box = data.draw(boxes_in(shape))
            np.testing.assert_array_equal(snapshot.read_box(a, p, box), expected[box.slices], strict=True)
            start, stop = sorted(data.draw(st.tuples(*[st.integers(0, expected.size)] * 2)))
            found = snapshot.read_flat(a, p, start, stop)
            np.testing.assert_array_equal(found, expected.reshape(-1)[start:stop], strict=True)


@examples(15)
@given(divided_models(max_ranks=4))
def test_every_rank_file_is_a_safetensors_file_of_its_boxes(division):
    # Oracle: the safetensors library, and the boxes that each rank was given.
    with tempfile.TemporaryDirectory() as folder:
        averages = stored_run(Path(folder), division)[0]
        (snapshot,) = open_run(folder).snapshots
        for rank in range(division.ranks):
            expected = {
                f"{label}.{parameter.name}:{number}": array[box.slices]
                for label, arrays in averages.items()
                for parameter, array, held in zip(division.parameters, arrays, division.held, strict=True)
                for number, box in enumerate(held[rank][0] if held[rank][1] == 0 else ())
            }
            with safe_open(names.tensors_path(snapshot.folder, rank), "np") as file:
                found = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
                assert file.metadata() == {"run": "run", "session": "s0", "snapshot": "0", "rank": str(rank)}
            assert found.keys() == expected.keys()
            for key, array in expected.items():
                np.testing.assert_array_equal(found[key], array, strict=True)


@examples(20)
@given(divided_models(), st.data())
def test_a_snapshot_that_lacks_a_part_is_not_listed(division, data):
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        stored_run(root, division)
        written = sorted(data.draw(st.sets(st.integers(0, division.ranks - 1), max_size=division.ranks - 1)))
        assume(written)
        torn = store(root, division, averages_of(division, 5), t=20.0, number=1, ranks=written)
        run = open_run(root)
        assert ([s.t for s in run.snapshots], run.unfinished) == ([10.0], 1)
        store(root, division, averages_of(division, 5), t=20.0, number=1, ranks=set(range(division.ranks)) - {*written})
        run = open_run(root)
        assert ([s.t for s in run.snapshots], run.unfinished) == ([10.0, 20.0], 0)
        assert run.snapshots[1].folder == torn


def test_tensors_whose_record_was_never_written_are_not_listed(root):
    stored_run(root, TWO_RANKS, snapshots=2)
    for path in (root / "snapshots").glob("*-000001/rank-*.json"):
        path.unlink()
    run = open_run(root)
    assert ([s.t for s in run.snapshots], run.unfinished) == ([10.0], 1)


def test_an_existing_file_is_never_overwritten(root):
    values = stored_run(root, TWO_RANKS)[0]
    before = listing(root)
    for again in (
        lambda: new_run(root, TWO_RANKS, run="other"),
        lambda: new_session(root, EVEN_RANKS),
        lambda: store(root, TWO_RANKS, averages_of(TWO_RANKS, 99), t=30.0),
    ):
        with pytest.raises(StoreError, match="never overwritten") as caught:
            again()
        assert caught.value.hint
        assert listing(root) == before
    assert_same_values(read_whole(open_run(root).snapshots[0]), values)


def test_a_folder_that_cannot_be_made_raises_and_leaves_no_temporary_file(root):
    stored_run(root, TWO_RANKS)
    blocked = names.snapshot_folder(root, "s0", 1)
    blocked.write_text("a file where the folder should be")
    before = listing(root)
    with pytest.raises(StoreError, match="cannot be written"):
        store(root, TWO_RANKS, averages_of(TWO_RANKS, 1), t=20.0, number=1)
    assert listing(root) == before


def test_a_full_disk_raises_and_leaves_earlier_snapshots_and_no_temporary_file(root):
    # The limit of a file's length stands in for the full disk: the write itself fails.
    stored_run(root, TWO_RANKS)
    before = listing(root)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.raises(StoreError, match="cannot be written") as caught:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))
            store(root, TWO_RANKS, averages_of(TWO_RANKS, 1), t=20.0, number=1)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "free space" in caught.value.hint
    files = {name: data for name, data in listing(root).items() if data is not None}
    assert files == {name: data for name, data in before.items() if data is not None}


def damaged(root, victim):
    """The message with which reading everything of the first snapshot fails, which must name the victim."""
    with pytest.raises(StoreError) as caught:
        read_whole(open_run(root).snapshots[0])
    assert str(victim) in caught.value.message
    assert caught.value.hint
    return caught.value.message


def victim_of(root, rank=1, number=0):
    return names.tensors_path(names.snapshot_folder(root, "s0", number), rank)


def test_a_tensor_file_swapped_with_another_ranks_is_named(root):
    # Equal cuts: the two files have the same length and the same keys.
    stored_run(root, EVEN_RANKS)
    first, second = victim_of(root, 0), victim_of(root, 1)
    assert first.stat().st_size == second.stat().st_size
    kept = first.read_bytes()
    first.write_bytes(second.read_bytes())
    assert "'rank': '1'" in damaged(root, first)
    first.write_bytes(kept)
    second.write_bytes(kept)
    # The first file's header was kept from the failed read; a file is only asked for its header once.
    assert "'rank': '0'" in damaged(shutil.copytree(root, root.parent / "fresh"), "rank-00001.safetensors")


def test_a_tensor_file_of_another_snapshot_is_named(root):
    stored_run(root, TWO_RANKS, snapshots=2)
    shutil.copyfile(victim_of(root, number=1), victim_of(root))
    assert "'snapshot': '1'" in damaged(root, victim_of(root))


def test_a_tensor_file_of_another_run_is_named(root):
    stored_run(root, TWO_RANKS)
    path = victim_of(root)
    path.write_bytes(path.read_bytes().replace(b'"run":"run"', b'"run":"nur"'))
    damaged(root, path)


@pytest.mark.parametrize("keep", [0, 7, 8, 20, -4, -1])
def test_a_truncated_tensor_file_is_named(root, keep):
    stored_run(root, TWO_RANKS)
    path = victim_of(root)
    path.write_bytes(path.read_bytes()[:keep])
    assert "bytes" in damaged(root, path)


def test_a_tensor_file_with_bytes_appended_is_named(root):
    stored_run(root, TWO_RANKS)
    path = victim_of(root)
    path.write_bytes(path.read_bytes() + b"\0\0\0\0")
    damaged(root, path)


def test_a_missing_tensor_file_is_named(root):
    stored_run(root, TWO_RANKS)
    victim_of(root).unlink()
    damaged(root, victim_of(root))


@pytest.mark.parametrize("harm", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-8])])
def test_a_tensor_file_harmed_between_two_reads_is_named(root, harm):
    stored_run(root, TWO_RANKS)
    (snapshot,) = open_run(root).snapshots
    read_whole(snapshot)
    harm(victim_of(root))
    with pytest.raises(StoreError, match=r"rank-00001\.safetensors"):
        read_whole(snapshot)


@examples(80)
@given(st.integers(0, 10**6), st.integers(0, 255))
def test_a_damaged_header_is_read_or_named(place, byte):
    # Oracle: reading gives arrays, or a StoreError; any other exception fails the test.
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        shutil.copytree(_template(), root, dirs_exist_ok=True)
        path = victim_of(root)
        data = bytearray(path.read_bytes())
        data[place % (8 + int.from_bytes(data[:8], "little"))] = byte
        path.write_bytes(data)
        try:
            read_whole(open_run(root).snapshots[0])
        except StoreError as error:
            assert str(path) in error.message


def _template(made=[]):  # noqa: B006 (made once)
    if not made:
        made.append(tempfile.TemporaryDirectory())
        stored_run(Path(made[0].name), TWO_RANKS)
    return made[0].name


@pytest.mark.parametrize("offsets", [[0.0, 72.0], ["0", "72"], [0], [0, 72, 0], None, [-8, 64], [64, 0], [True, 72]])
def test_a_header_whose_offsets_are_no_range_is_named(root, offsets):
    stored_run(root, TWO_RANKS)
    path = victim_of(root)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header[f"{LABELS[0]}.layer.0.weight:0"]["data_offsets"] = offsets
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    part = names.part_path(path.parent, 1)
    record = json.loads(part.read_text())
    part.write_text(json.dumps(record | {"size": path.stat().st_size}))
    damaged(root, path)


@pytest.mark.parametrize(
    "record",
    [
        (names.session_path, ("s0",), SessionRecord("other", "s0", "", 0.0, 2)),
        (names.layout_path, ("s0", 1), LayoutRecord("other", "s0", 1, ((),))),
        (None, (1,), PartRecord("other", "s0", 0, 1, 10.0, 1.0, 8)),
    ],
    ids=["session", "layout", "part"],
)
def test_a_record_of_another_run_is_refused(root, record):
    stored_run(root, TWO_RANKS)
    where, arguments, foreign = record
    path = where(root, *arguments) if where else names.part_path(names.snapshot_folder(root, "s0", 0), *arguments)
    path.write_text(encode(foreign))
    with pytest.raises(StoreError, match=r"of run other, the folder is of run run") as caught:
        open_run(root)
    assert str(root) in caught.value.message


@pytest.mark.parametrize(
    "changed", [{"t": 11.0}, {"snapshot": 1}, {"rank": 0}, {"rank": 2}, {"start": 0.5}, {"session": "s1"}]
)
def test_parts_that_contradict_each_other_are_refused(root, changed):
    stored_run(root, TWO_RANKS)
    path = names.part_path(names.snapshot_folder(root, "s0", 0), 1)
    path.write_text(encode(replace(PartRecord("run", "s0", 0, 1, 10.0, 1.0, 8), **changed)))
    with pytest.raises(StoreError, match="s0-000000"):
        open_run(root)


@pytest.mark.parametrize("changed", [{"session": "s1"}, {"rank": 0}, {"boxes": ()}])
def test_a_layout_swapped_with_another_is_refused(root, changed):
    stored_run(root, TWO_RANKS)
    path = names.layout_path(root, "s0", 1)
    path.write_text(encode(replace(LayoutRecord("run", "s0", 1, ((),)), **changed)))
    with pytest.raises(StoreError, match=r"layout-00001\.json"):
        open_run(root)


def test_boxes_that_do_not_cover_what_is_read_are_counted(root):
    stored_run(root, TWO_RANKS)
    names.layout_path(root, "s0", 1).write_text(encode(LayoutRecord("run", "s0", 1, ((),))))
    with pytest.raises(StoreError, match=r"3 of 12 elements of layer\.0\.weight"):
        read_whole(open_run(root).snapshots[0])


def test_a_missing_run_folder_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "none"):
        assert not run_exists(path)
        with pytest.raises(StoreError, match="is no run folder") as caught:
            open_run(path)
        assert "PostHocEMA" in caught.value.hint
    assert listing(tmp_path) == {}


def test_a_run_without_sessions_is_empty(root):
    record = new_run(root, TWO_RANKS)
    run = open_run(str(root))
    assert run_exists(str(root))
    assert (run.record, run.snapshots, run.abandoned, run.unfinished, run.head) == (record, (), 0, 0, "")
    assert run.numel == 12


@st.composite
def three_sessions(draw):
    """For each session, where it resumed and when it took snapshots, as a crash and a restart leave them."""
    sessions, living = [], [0]
    for _ in range(3):
        resumed_at = draw(st.sampled_from(living)) if sessions else 0
        advances = draw(st.lists(st.integers(1, 4), max_size=4))
        times = [resumed_at + sum(advances[: i + 1]) for i in range(len(advances))]
        sessions.append((resumed_at, times))
        living = [t for t in living if t <= resumed_at] + times
    return sessions


@examples(20)
@given(three_sessions(), st.integers(1, 3))
def test_the_living_timeline_of_three_sessions_is_what_replaying_them_gives(sessions, ranks):
    # Oracle: replay; each session forgets what lies after its resume and appends what it stored.
    division = rows_of((3,), *([1] * ranks), 3 - ranks)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        new_run(root, division)
        timeline, total, parent = [], 0, ""
        for index, (resumed_at, times) in enumerate(sessions):
            name = f"{'cab'[index]}{index}"  # the order of names is not the order of sessions
            new_session(root, division, name, parent, float(resumed_at))
            timeline = [entry for entry in timeline if entry[0] <= resumed_at]
            for number, t in enumerate(times):
                averages = averages_of(division, 100 * index + 10 * number)
                store(root, division, averages, t=float(t), number=number, session=name)
                timeline.append((t, averages))
            total, parent = total + len(times), name
        run = open_run(root)
        assert [s.t for s in run.snapshots] == [t for t, _ in timeline]
        assert (run.abandoned, run.unfinished, run.head) == (total - len(timeline), 0, parent)
        for snapshot, (_, averages) in zip(run.snapshots, timeline, strict=True):
            assert_same_values(read_whole(snapshot), averages)


def test_sessions_of_different_world_sizes_are_read_alike(root):
    values = stored_run(root, TWO_RANKS)
    division = rows_of((4, 3), 2, 0, 1, 1)
    new_session(root, division, "s1", "s0", 10.0)
    values.append(averages_of(division, 7))
    store(root, division, values[1], t=20.0, session="s1")
    run = open_run(root)
    assert [len(s.parts) for s in run.snapshots] == [2, 4]
    for snapshot, expected in zip(run.snapshots, values, strict=True):
        assert_same_values(read_whole(snapshot), expected)


@pytest.mark.parametrize("parents", [("", ""), ("s0", "s0")])
def test_two_newest_sessions_are_refused(root, parents):
    stored_run(root, TWO_RANKS)
    for name, parent in zip(("s1", "s2"), parents, strict=True):
        new_session(root, TWO_RANKS, name, parent, 10.0)
    with pytest.raises(StoreError, match=r"one newest session, found [23]"):
        open_run(root)


@pytest.mark.timeout(3)  # one of them never ended
@pytest.mark.parametrize("parents", [{"s0": "s0"}, {"s0": "s1", "s1": "s0", "s2": "s1"}, {"s0": "s0", "s1": ""}])
def test_sessions_that_continue_each_other_in_a_circle_are_refused(root, parents):
    stored_run(root, TWO_RANKS)
    for name, parent in parents.items():
        names.session_path(root, name).write_text(encode(SessionRecord("run", name, parent, 5.0, 2)))
    with pytest.raises(StoreError):
        open_run(root)


@examples(12)
@given(divided_models())
def test_stock_dcp_load_fills_plain_tensors_from_a_snapshot(division):
    # Oracle: numpy.
    with tempfile.TemporaryDirectory() as folder:
        averages = stored_run(Path(folder), division)[0]
        (snapshot,) = open_run(folder).snapshots
        state = {label: {p.name: torch.full(p.shape, math.nan) for p in division.parameters} for label in averages}
        dcp.load(state, storage_reader=SnapshotReader(snapshot), no_dist=True)
        found = {label: [tensor.numpy() for tensor in tensors.values()] for label, tensors in state.items()}
        assert_same_values(found, averages)


@examples(12)
@given(divided_models(), st.data())
def test_stock_dcp_load_fills_boxes_from_a_snapshot_cut_otherwise(division, data):
    # Each tensor is wanted as the boxes around a flat range, whatever it was stored as.
    with tempfile.TemporaryDirectory() as folder:
        averages = stored_run(Path(folder), division)[0]
        (snapshot,) = open_run(folder).snapshots
        state, shards = {}, []
        for label, arrays in averages.items():
            state[label] = {}
            for parameter, array in zip(division.parameters, arrays, strict=True):
                start, stop = sorted(data.draw(st.tuples(*[st.integers(0, array.size)] * 2)))
                empty = np.full_like(array, math.nan)
                piece = shard(parameter.name, empty, boxes_of_flat_range(array.shape, start, stop))
                state[label][parameter.name] = BoxTensor.of(piece)
                shards.append((piece.local, array.reshape(-1)[start:stop]))
        dcp.load(state, storage_reader=SnapshotReader(snapshot), no_dist=True)
        for local, expected in shards:
            np.testing.assert_array_equal(local.numpy(), expected, strict=True)


def test_a_snapshot_reader_reads_one_snapshot_and_only_tensors_that_it_holds(root):
    stored_run(root, TWO_RANKS)
    reader = SnapshotReader(open_run(root).snapshots[0])
    with pytest.raises(StoreError, match="cannot read elsewhere"):
        dcp.load({}, checkpoint_id="elsewhere", storage_reader=reader, no_dist=True)
    with pytest.raises(CheckpointException, match=r"Missing key .* other"):
        dcp.load({"other": torch.zeros(2)}, storage_reader=reader, no_dist=True)


@st.composite
def tilings(draw, shape):
    """A whole tensor as boxes: its flat range cut at random places, in any order."""
    size = math.prod(shape)
    edges = sorted({0, size, *draw(st.lists(st.integers(0, size), max_size=3))})
    boxes = [box for a, b in pairwise(edges) for box in boxes_of_flat_range(shape, a, b)]
    return draw(st.permutations(boxes))


@examples(10)
@given(st.lists(shapes.filter(math.prod), min_size=1, max_size=3), st.data())
def test_boxes_survive_stock_dcp_save_and_load_into_another_cut(model, data):
    # Oracle: the arrays that were cut up.
    arrays = {f"w{i}": array for i, array in enumerate(numbers(model, 3))}
    saved = {name: BoxTensor.of(shard(name, x, data.draw(tilings(x.shape)))) for name, x in arrays.items()}
    pieces = {name: shard(name, np.zeros_like(x), data.draw(tilings(x.shape))) for name, x in arrays.items()}
    plain = {name: torch.zeros(x.shape) for name, x in arrays.items()}
    with tempfile.TemporaryDirectory() as folder:
        dcp.save({"a": saved}, checkpoint_id=folder, no_dist=True)
        dcp.load({"a": {n: BoxTensor.of(p) for n, p in pieces.items()}}, checkpoint_id=folder, no_dist=True)
        dcp.load({"a": plain}, checkpoint_id=folder, no_dist=True)
    for name, array in arrays.items():
        expected = np.concatenate([array[box.slices].ravel() for box in pieces[name].boxes])
        np.testing.assert_array_equal(pieces[name].local.numpy(), expected, strict=True)
        np.testing.assert_array_equal(plain[name].numpy(), array, strict=True)


def test_a_box_tensor_has_a_shape_and_no_arithmetic():
    piece = shard("w", np.ones((4, 3), np.float32), (Box((1, 0), (2, 3)),))
    tensor = BoxTensor.of(piece)
    assert (tuple(tensor.shape), tensor.dtype) == ((4, 3), torch.float32)
    assert "boxes at [(1, 0)]" in repr(tensor)
    assert tensor.detach().pieces[torch.Size((1, 0))].data_ptr() == piece.local.data_ptr()
    with pytest.raises(TypeError, match="needs the whole tensor"):
        tensor.sum()


def test_a_snapshot_counts_the_bytes_of_its_tensor_files(root):
    stored_run(root, TWO_RANKS)
    (snapshot,) = open_run(root).snapshots
    assert snapshot.size == sum(path.stat().st_size for path in snapshot.folder.glob("*.safetensors"))
    assert len(tensors_of(snapshot.folder)) == len(LABELS)  # both ranks use the same keys
