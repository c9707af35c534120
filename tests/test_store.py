from __future__ import annotations

import json
import math
import re
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
    layout_of,
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
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save
from torch.distributed.checkpoint.api import CheckpointException

from sharded_phema import blocks
from sharded_phema.blocks import Digester
from sharded_phema.errors import StoreError
from sharded_phema.folder import open_folder
from sharded_phema.layout import Box, boxes_of_flat_range, whole
from sharded_phema.manifest import Cut, LayoutRecord, Part, SessionRecord, SnapshotRecord
from sharded_phema.store import BoxTensor, commit_snapshot, layout_id, names, open_run, run_exists
from sharded_phema.store.dcp_reader import SnapshotReader
from sharded_phema.transcript import decode, encode

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
            path = Path(folder) / names.tensors_file(snapshot.name, rank)
            if not expected:
                assert snapshot.facts.parts[rank] == Part()
                assert not path.exists()
                continue
            assert snapshot.facts.parts[rank].size == path.stat().st_size
            with safe_open(path, "np") as file:
                found = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
                facts = {"run": "run", "session": "s0", "snapshot": "0", "t": "10.0", "rank": str(rank)}
                assert file.metadata() == facts
            assert found.keys() == expected.keys()
            for key, array in expected.items():
                np.testing.assert_array_equal(found[key], array, strict=True)


@examples(20)
@given(divided_models(), st.data())
def test_a_snapshot_that_nobody_committed_is_not_listed(division, data):
    # Whichever ranks wrote their parts, and if it was all of them.
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        stored_run(root, division)
        written = data.draw(st.sets(st.integers(0, division.ranks - 1)))
        store(root, division, averages_of(division, 5), t=20.0, number=1, ranks=sorted(written))
        torn = names.snapshot_folder("s0", 1)
        left = (torn,) if (root / torn).exists() else ()
        run = open_run(root)
        assert ([s.t for s in run.snapshots], run.unfinished, run.damaged) == ([10.0], left, ())
        store(root, division, averages_of(division, 5), t=30.0, number=2)
        run = open_run(root)
        assert ([s.t for s in run.snapshots], run.unfinished, run.damaged) == ([10.0, 30.0], left, ())


def test_tensors_whose_record_was_never_written_are_not_listed(root):
    stored_run(root, TWO_RANKS, snapshots=2)
    torn = names.snapshot_folder("s0", 1)
    (root / names.snapshot_file(torn)).unlink()
    run = open_run(root)
    assert ([s.t for s in run.snapshots], run.unfinished) == ([10.0], (torn,))


def test_an_existing_file_is_never_overwritten(root):
    values = stored_run(root, TWO_RANKS)[0]
    before = listing(root)
    for again in (
        lambda: new_run(root, TWO_RANKS, run="other"),
        lambda: new_session(root, TWO_RANKS, resumed_at=3.0),
        lambda: store(root, TWO_RANKS, averages_of(TWO_RANKS, 99), t=30.0),
        lambda: store(root, TWO_RANKS, averages_of(TWO_RANKS, 99), t=30.0, ranks=[1]),
        lambda: commit_snapshot(open_folder(root), SnapshotRecord("run", "s0", 0, 30.0, 1.0, (Part(), Part()))),
    ):
        with pytest.raises(StoreError, match="ever replaced") as caught:
            again()
        assert caught.value.hint
        assert listing(root) == before
    with pytest.raises(StoreError, match="ever replaced"):
        new_session(root, EVEN_RANKS)
    assert before.items() <= listing(root).items(), "its layout alone is new"
    assert_same_values(read_whole(open_run(root).snapshots[0]), values)


def test_a_layout_is_stored_once_for_all_sessions_that_are_cut_alike(root):
    stored_run(root, TWO_RANKS)
    before = listing(root / names.LAYOUTS)
    new_session(root, TWO_RANKS, "s1", "s0", 10.0)
    assert listing(root / names.LAYOUTS) == before
    new_session(root, EVEN_RANKS, "s2", "s1", 10.0)
    assert len(listing(root / names.LAYOUTS)) == len(before) + 1


def test_a_folder_that_cannot_be_made_raises_and_leaves_no_temporary_file(root):
    stored_run(root, TWO_RANKS)
    blocked = root / names.snapshot_folder("s0", 1)
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
    assert "limit" in caught.value.hint
    assert "earlier snapshots are intact" in caught.value.hint
    files = {name: data for name, data in listing(root).items() if data is not None}
    assert files == {name: data for name, data in before.items() if data is not None}


# What is damaged, swapped, stale or another's.


def victim_of(root, rank=1, number=0):
    return root / names.tensors_file(names.snapshot_folder("s0", number), rank)


def complaint(root, victim, number=0):
    """What is said of a snapshot that cannot be used, when its run is opened or it is read; it names the victim."""
    run, name = open_run(root), names.snapshot_folder("s0", number)
    found = {damaged.name: damaged.reason for damaged in run.damaged}
    if name in found:
        assert name not in [snapshot.name for snapshot in run.snapshots + run.abandoned]
        message = found[name]
    else:
        (snapshot,) = [snapshot for snapshot in run.snapshots if snapshot.name == name]
        with pytest.raises(StoreError) as caught:
            read_whole(snapshot)
        assert caught.value.hint
        with pytest.raises(StoreError):
            snapshot.check()
        message = caught.value.message
    assert str(root) in message
    assert str(victim.relative_to(root)) in message
    return message


def edit(kind, path, **changes):
    """Edit a record by hand, and seal it again."""
    path.write_bytes(encode(replace(decode(kind, path.read_bytes(), path), **changes)))


def forge(path, data):
    """Replace a rank's tensor file by other bytes, and have the snapshot's record say that these were written."""
    path.write_bytes(data)
    digester = Digester()
    assert b"".join(digester.through([data])) == data
    rank, commit = int(path.stem.removeprefix("rank-")), path.with_name("snapshot.json")
    parts = list(decode(SnapshotRecord, commit.read_bytes(), commit).parts)
    parts[rank] = Part(len(data), digester.digests)
    edit(SnapshotRecord, commit, parts=tuple(parts))


def test_a_tensor_file_swapped_with_another_ranks_is_named(root):
    # Equal cuts: the two files have the same length and the same keys.
    stored_run(root, EVEN_RANKS)
    first, second = victim_of(root, 0), victim_of(root, 1)
    assert first.stat().st_size == second.stat().st_size
    for path, other in ((first, second), (second, first)):
        kept, foreign = path.read_bytes(), other.read_bytes()
        path.write_bytes(foreign)
        assert "expected digest" in complaint(root, path)
        path.write_bytes(kept)
    forge(second, first.read_bytes())
    assert "'rank': '0'" in complaint(root, second)


def test_a_tensor_file_of_another_snapshot_is_named(root):
    stored_run(root, TWO_RANKS, snapshots=2)
    shutil.copyfile(victim_of(root, number=1), victim_of(root))
    assert "expected digest" in complaint(root, victim_of(root))
    forge(victim_of(root), victim_of(root, number=1).read_bytes())
    assert "'snapshot': '1'" in complaint(root, victim_of(root))


def test_a_time_edited_in_a_record_is_named(root):
    # Its place in the order of snapshots stays, so that nothing but the tensor files can tell.
    stored_run(root, TWO_RANKS, snapshots=2)
    commit = root / names.snapshot_file(names.snapshot_folder("s0", 0))
    edit(SnapshotRecord, commit, t=math.nextafter(10.0, 11.0))
    assert "'t': '10.0'" in complaint(root, victim_of(root, 0))
    edit(SnapshotRecord, commit, t=10.0)
    open_run(root).snapshots[0].check()


def test_a_tensor_file_of_another_run_is_named(root):
    stored_run(root, TWO_RANKS)
    path = victim_of(root)
    forge(path, path.read_bytes().replace(b'"run":"run"', b'"run":"nur"'))
    assert "'run': 'nur'" in complaint(root, path)


@pytest.mark.parametrize("keep", [0, 7, 8, 20, -4, -1])
def test_a_truncated_tensor_file_is_named(root, keep):
    stored_run(root, TWO_RANKS, snapshots=2)
    path = victim_of(root)
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:keep])
    assert f"expected {size} bytes, found {keep % size} bytes" in complaint(root, path)
    assert [s.t for s in open_run(root).snapshots] == [20.0], "the other snapshot is used"
    # The same where the record was edited to fit.
    forge(path, path.read_bytes())
    complaint(root, path if keep else victim_of(root))


def test_a_tensor_file_with_bytes_appended_is_named(root):
    stored_run(root, TWO_RANKS)
    path = victim_of(root)
    path.write_bytes(path.read_bytes() + b"\0\0\0\0")
    complaint(root, path)


def test_a_missing_tensor_file_is_named(root):
    stored_run(root, TWO_RANKS)
    victim_of(root).unlink()
    assert "found nothing" in complaint(root, victim_of(root))


@pytest.mark.parametrize("harm", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-8])])
def test_a_tensor_file_harmed_between_two_reads_is_named(root, harm):
    values = stored_run(root, TWO_RANKS)[0]
    (snapshot,) = open_run(root).snapshots
    read_whole(snapshot)
    harm(victim_of(root))
    assert_same_values(read_whole(snapshot), values)  # blocks that were checked are in memory yet
    blocks._kept.clear()
    with pytest.raises(StoreError, match=r"rank-00001\.safetensors"):
        read_whole(snapshot)


@examples(60)
@given(st.integers(0, 10**6), st.integers(0, 7))
def test_a_flipped_bit_of_a_tensor_file_is_named_wherever_it_is(place, bit):
    # Oracle: a file of one block is read whole whatever is wanted of it.
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        shutil.copytree(_template(), root, dirs_exist_ok=True)
        path = victim_of(root)
        data = bytearray(path.read_bytes())
        data[place % len(data)] ^= 1 << bit
        path.write_bytes(data)
        assert f"is damaged between bytes 0 and {len(data)}" in complaint(root, path)


@examples(60)
@given(st.integers(0, 10**6), st.integers(0, 255))
def test_a_header_that_was_edited_with_its_digests_is_read_or_named(place, byte):
    # Oracle: reading gives arrays, or a StoreError; any other exception fails the test.
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        shutil.copytree(_template(), root, dirs_exist_ok=True)
        path = victim_of(root)
        data = bytearray(path.read_bytes())
        data[place % (8 + int.from_bytes(data[:8], "little"))] = byte
        forge(path, bytes(data))
        (snapshot,) = open_run(root).snapshots
        for act in (snapshot.check, lambda: read_whole(snapshot)):
            try:
                act()
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
    forge(path, len(text).to_bytes(8, "little") + text + data[8 + length :])
    complaint(root, path)


def layout_file(root):
    (path,) = (root / names.LAYOUTS).iterdir()
    return path


def test_a_session_of_another_run_is_refused(root):
    stored_run(root, TWO_RANKS)
    edit(SessionRecord, root / names.session_file("s0"), run="other")
    with pytest.raises(StoreError, match=r"of run other, the folder is of run run") as caught:
        open_run(root)
    assert str(root) in caught.value.message


def test_a_layout_or_a_snapshot_of_another_run_is_set_aside(root):
    stored_run(root, TWO_RANKS)
    commit = root / names.snapshot_file(names.snapshot_folder("s0", 0))
    kept = commit.read_bytes()
    edit(SnapshotRecord, commit, run="other")
    assert "of run other, the folder is of run run" in complaint(root, commit.parent)
    commit.write_bytes(kept)
    path = layout_file(root)
    relaid(root, run="other")
    assert "of run other, the folder is of run run" in complaint(root, only_layout(root, path))


@pytest.mark.parametrize("changed", [{"snapshot": 1}, {"session": "s1"}, {"parts": ()}, {"parts": (Part(),) * 3}])
def test_the_record_of_another_snapshot_is_set_aside(root, changed):
    stored_run(root, TWO_RANKS, snapshots=2)
    commit = root / names.snapshot_file(names.snapshot_folder("s0", 0))
    edit(SnapshotRecord, commit, **changed)
    assert "does not belong there" in complaint(root, commit.parent)
    assert [s.t for s in open_run(root).snapshots] == [20.0]


@pytest.mark.parametrize("record", ["run", "session", "layout", "snapshot"])
def test_a_record_that_was_edited_and_not_sealed_again_is_named(root, record):
    stored_run(root, TWO_RANKS)
    path = {
        "run": root / names.RUN,
        "session": root / names.session_file("s0"),
        "layout": layout_file(root),
        "snapshot": root / names.snapshot_file(names.snapshot_folder("s0", 0)),
    }[record]
    text = path.read_bytes()
    path.write_bytes(text.replace(b"4", b"5", 1))
    assert path.read_bytes() != text
    if record in ("layout", "snapshot"):
        assert "the record is damaged" in complaint(root, path)
        return
    with pytest.raises(StoreError, match="the record is damaged") as caught:
        open_run(root)
    assert str(path) in caught.value.message


def only_layout(root, before):
    """The layout that was made since."""
    return next(path for path in (root / names.LAYOUTS).iterdir() if path != before)


def relaid(root, **changes):
    """Give the session another layout, in which something was changed."""
    old = layout_file(root)
    layout = replace(decode(LayoutRecord, old.read_bytes(), old), **changes)
    (root / names.layout_file(layout_id(layout))).write_bytes(encode(layout))
    edit(SessionRecord, root / names.session_file("s0"), layout=layout_id(layout))


def test_a_layout_swapped_with_another_is_named(root):
    # Two halves that change places: no length of any file tells.
    values = stored_run(root, EVEN_RANKS)[0]
    path = layout_file(root)
    kept, layout = path.read_bytes(), decode(LayoutRecord, path.read_bytes(), path)
    halves = (Box((2, 0), (2, 3)),), (Box((0, 0), (2, 3)),)
    path.write_bytes(encode(replace(layout, averaged=(Cut(0, (), (0, 1), halves),))))
    assert "expected the layout" in complaint(root, path)
    path.write_bytes(kept)
    assert_same_values(read_whole(open_run(root).snapshots[0]), values)
    path.unlink()
    assert "found none" in complaint(root, path)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"world_size": 3}, "layout of 2 ranks, found 3"),
        ({"averaged": ()}, r"with \[0, 0, 0\] tensors"),
        ({"averaged": (Cut(0, (0, 1, 3)),)}, "what cannot be of 2 ranks"),
        ({"averaged": (Cut(0, (), (0,), ((Box((0, 0), (1, 3)),),)),)}, "what cannot be of 2 ranks"),
        ({"averaged": (Cut(0, (0, 2, 4)),)}, r"not the tensors that its record names: expected 6 elements"),
    ],
)
def test_a_layout_that_contradicts_what_is_stored_is_refused(root, changes, text):
    stored_run(root, TWO_RANKS)
    relaid(root, **changes)
    run = open_run(root)
    if run.damaged:
        assert re.search(text, run.damaged[0].reason)
        return
    with pytest.raises(StoreError, match=text) as caught:
        read_whole(run.snapshots[0])
    assert caught.value.hint


def test_tensors_that_no_record_names_are_found_by_a_check(root):
    stored_run(root, TWO_RANKS)
    (snapshot,) = open_run(root).snapshots
    snapshot.check()
    path = victim_of(root)
    with safe_open(path, "np") as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    forge(path, save(tensors | {"more": np.zeros(1, np.float32)}, metadata))
    (snapshot,) = open_run(root).snapshots
    with pytest.raises(StoreError, match="holds tensors that no record names"):
        snapshot.check()


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
    assert (run.record, run.snapshots, run.abandoned, run.unfinished, run.head) == (record, (), (), (), "")
    assert run.damaged == ()
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
        assert (len(run.abandoned), run.unfinished, run.head) == (total - len(timeline), (), parent)
        assert {s.name for s in run.abandoned}.isdisjoint(s.name for s in run.snapshots)
        for snapshot, (_, averages) in zip(run.snapshots, timeline, strict=True):
            assert_same_values(read_whole(snapshot), averages)


def test_sessions_of_different_world_sizes_are_read_alike(root):
    values = stored_run(root, TWO_RANKS)
    division = rows_of((4, 3), 2, 0, 1, 1)
    new_session(root, division, "s1", "s0", 10.0)
    values.append(averages_of(division, 7))
    store(root, division, values[1], t=20.0, session="s1")
    run = open_run(root)
    assert [len(s.facts.parts) for s in run.snapshots] == [2, 4]
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
        record = SessionRecord("run", name, parent, 5.0, 2, layout_id(layout_of(TWO_RANKS)))
        (root / names.session_file(name)).write_bytes(encode(record))
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
    assert snapshot.size == sum(path.stat().st_size for path in Path(snapshot.where).glob("*.safetensors"))
    assert len(tensors_of(snapshot.where)) == len(LABELS)  # both ranks use the same keys
