"""Damage: whatever happens to the files of a run is told, and never a wrong number is read."""

from __future__ import annotations

import json
import os
import random
import shutil
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import faults
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ranks import run_ranks
from torch import nn
from torch.distributed.fsdp import fully_shard

from sharded_phema import blocks
from sharded_phema.errors import PhemaError, StoreError
from sharded_phema.folder.contract import Entry, Want, bytes_of
from sharded_phema.layout import whole
from sharded_phema.posthoc import PostHocEMA
from sharded_phema.rebuild import reconstruct
from sharded_phema.seal import sealed
from sharded_phema.store import open_run
from sharded_phema.verify import verify

FLIPS = 2100
"""Single bits that are flipped, over all files of all runs."""

Truth = dict[tuple[str, str, str], bytes]
"""Bytes of each average or raw tensor of each snapshot."""


class Small(nn.Module):
    """Something to average, something to copy (a buffer of whole numbers among it), something frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)
        self.last.weight.requires_grad_(False)


def train(root: Path, dtype: str, sharded: bool, seed: int) -> None:
    """Two sessions; the second goes on from before the last snapshot of the first, and so abandons it."""
    torch.manual_seed(seed)
    for resume, steps in ((0, 30), (20, 20)):
        model = Small()
        if sharded:
            for layer in (model.first, model.last, model):
                fully_shard(layer)
        with PostHocEMA(model, root, snapshot_every=10, dtype=dtype) as ema, torch.no_grad():
            if resume:
                ema.resume(resume)
            for _ in range(steps):
                for param in model.parameters():
                    if param.requires_grad:
                        param += 0.01 * torch.ones_like(param)
                ema.update()


def train_ranks(root: str) -> None:
    train(Path(root), "float32", True, 3)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    kinds = {dtype: folder / dtype for dtype in ("float32", "float16", "bfloat16")}
    for seed, (dtype, root) in enumerate(kinds.items()):
        train(root, dtype, False, seed)
    run_ranks(2, train_ranks, str(folder / "ranks"))
    model = nn.Linear(3, 2)
    left = PostHocEMA(model, folder / "claimed")  # still open: its claim lies there
    left.update()
    left.snapshot()
    return kinds | {"ranks": folder / "ranks", "claimed": folder / "claimed"}


class InMemory:
    """A folder whose files are in memory, where thousands of them are read in a second."""

    def __init__(self, root: Path) -> None:
        self.url = str(root)
        self.files = {str(path.relative_to(root)): path.read_bytes() for path in files_of(root)}

    def read(self, name: str, limit: int) -> bytes:
        if name not in self.files or len(self.files[name]) > limit:
            raise StoreError(f"{name}: missing or too long", hint="restore it")
        return self.files[name]

    def fill(self, wants: Sequence[Want]) -> None:
        for want in wants:
            view = bytes_of(want.out)
            part = self.files.get(want.name, b"")[want.begin : want.begin + len(view)]
            if len(part) < len(view):
                raise StoreError(f"{want.name}: too short", hint="restore it")
            view[:] = part

    def list(self, folder: str) -> tuple[Entry, ...]:
        under = f"{folder}/" if folder else ""
        found = {}
        for name, text in self.files.items():
            if name.startswith(under):
                base, _, more = name.removeprefix(under).partition("/")
                found[base] = Entry(base, 0 if more else len(text), bool(more))
        return tuple(found[base] for base in sorted(found))


def files_of(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file())


def numbers(root: Path | InMemory, *, told: bool = False, under: str = "") -> Truth:
    """Everything that can be read of a run; what cannot fails, or is left out where damage is ``told`` of."""
    blocks._kept.clear()  # what was checked once and stayed in memory cannot be damaged
    found: Truth = {}
    run = open_run(root)  # type: ignore[arg-type]
    for snapshot in (*run.snapshots, *run.abandoned):
        if not snapshot.name.startswith(under):
            continue
        record = snapshot.record
        for a, label in enumerate(record.averages):
            for p, parameter in enumerate(record.parameters):
                with leniently(told):
                    values = snapshot.read_box(a, p, whole(parameter.shape))
                    found[snapshot.name, label, parameter.name] = values.tobytes()
        for i, tensor in enumerate(record.raw):
            with leniently(told):
                raw = snapshot.read_raw(i, 0, int(np.prod(tensor.shape)))
                found[snapshot.name, "", tensor.name] = raw.view(torch.uint8).numpy().tobytes()
    return found


@contextmanager
def leniently(told: bool) -> Iterator[None]:
    try:
        yield
    except PhemaError:
        if not told:
            raise


def is_told(root: Path | InMemory) -> bool:
    """Whether verification finds a fault."""
    try:
        return not verify(root).intact  # type: ignore[arg-type]
    except PhemaError:
        return True


def assert_nothing_wrong_is_read(root: Path | InMemory, truth: Truth, under: str = "") -> None:
    try:
        found = numbers(root, told=True, under=under)
    except PhemaError:
        return
    assert all(truth[key] == value for key, value in found.items())


def assert_told_and_harmless(root: Path | InMemory, truth: Truth) -> None:
    assert is_told(root)
    assert_nothing_wrong_is_read(root, truth)


def resealed(path: Path, edit: Callable[[dict], object]) -> None:
    """Edit a record by hand, and make its digest right."""
    data = json.loads(path.read_bytes())
    del data["digest"]
    edit(data)
    path.write_bytes(sealed(data))


@pytest.fixture
def copied(runs: dict[str, Path], tmp_path: Path) -> Callable[[str], tuple[Path, Truth]]:
    """A copy of a run that may be harmed, and what it holds."""

    def copy(kind: str) -> tuple[Path, Truth]:
        root = tmp_path / kind
        shutil.copytree(runs[kind], root)
        return root, numbers(root)

    return copy


def test_runs_as_they_were_written_are_found_so_with_their_bytes_counted(runs: dict[str, Path]) -> None:
    for root in runs.values():
        report = verify(root)
        assert report.intact and not report.left_over
        assert report.files == len(files_of(root))
        assert report.size == sum(path.stat().st_size for path in files_of(root))
    assert open_run(runs["ranks"]).abandoned and len(open_run(runs["float32"]).snapshots) == 4


def test_every_flipped_bit_is_told_and_none_makes_a_wrong_number_or_a_crash(runs: dict[str, Path]) -> None:
    """Oracle: what was read before the flip. Bits are drawn over all files, small ones as often as large ones."""
    chance = random.Random(11)
    folders = [InMemory(root) for root in runs.values()]
    truths = [(folder, numbers(folder)) for folder in folders]
    pool = [(folder, name, truth) for folder, truth in truths for name in folder.files]
    assert all(verify(folder).intact for folder in folders)  # type: ignore[arg-type]
    for count in range(FLIPS):
        folder, name, truth = pool[count % len(pool)]
        text = folder.files[name]
        bit = chance.randrange(8 * len(text))
        harmed = bytearray(text)
        harmed[bit // 8] ^= 1 << bit % 8
        folder.files[name] = bytes(harmed)
        assert is_told(folder), f"bit {bit} of {name} of {folder.url}"
        # A file of a snapshot is read with that one alone.
        under = name.rpartition("/")[0]
        assert_nothing_wrong_is_read(folder, truth, under if under.startswith("snapshots/") else "")
        folder.files[name] = text
    assert len(pool) < FLIPS / 10


def test_reconstructions_from_damaged_files_are_right_or_say_what_they_left_out(runs, tmp_path) -> None:
    chance = random.Random(12)
    rebuilt: dict[Path, bytes] = {}
    pool = [(root, path) for name, root in runs.items() if name != "claimed" for path in files_of(root)]
    for count, (root, path) in enumerate(chance.sample(pool, 30)):
        text = path.read_bytes()
        harmed = bytearray(text)
        harmed[chance.randrange(len(text))] ^= 16
        path.write_bytes(harmed)
        assert_rebuilt_right(root, tmp_path / str(count), rebuilt)
        path.write_bytes(text)
    assert rebuilt


def assert_rebuilt_right(root: Path, out: Path, rebuilt: dict[Path, bytes]) -> None:
    blocks._kept.clear()
    try:
        plan = reconstruct(root, ["0.12"], out=out)
    except PhemaError:
        assert not out.exists()
        return
    found = (out / "0.12" / "model.safetensors").read_bytes()
    if not plan.left_out:
        # The harm lay in what a reconstruction does not read, such as an abandoned snapshot.
        assert rebuilt.setdefault(root, found) == found


@pytest.mark.parametrize("kind", ["float32", "ranks"])
def test_files_cut_short_or_grown_are_told(copied, kind: str) -> None:
    root, truth = copied(kind)
    for path in files_of(root):
        text = path.read_bytes()
        header = 8 + int.from_bytes(text[:8], "little") if path.suffix == ".safetensors" else len(text) // 2
        for length in sorted({0, 1, 7, 8, 9, header - 1, header, header + 1, len(text) - 1}):
            path.write_bytes(text[:length])
            assert is_told(root), (path, length)
            assert_nothing_wrong_is_read(root, truth)
        path.write_bytes(text + b"\0")
        assert_told_and_harmless(root, truth)
        path.write_bytes(text)
    assert verify(root).intact


@pytest.mark.parametrize("kind", ["float32", "ranks"])
def test_missing_files_are_told_and_a_missing_commit_leaves_parts_without_a_snapshot(copied, kind: str) -> None:
    root, truth = copied(kind)
    for path in files_of(root):
        text = path.read_bytes()
        path.unlink()
        if path.name == "snapshot.json":
            # Without the commit there never was a snapshot: what lies there is what a killed writer leaves.
            name = str(path.parent.relative_to(root))
            report = verify(root)
            assert report.intact and {left.rpartition("/")[0] for left in report.left_over} == {name}
            assert name not in {snapshot for snapshot, *_ in numbers(root)}
        else:
            assert_told_and_harmless(root, truth)
        path.write_bytes(text)


@pytest.mark.parametrize("kind", ["float32", "ranks"])
def test_files_swapped_with_any_other_of_their_kind_are_told(copied, kind: str) -> None:
    """Between ranks, snapshots, sessions, and stores: every pair of tensor files, and every pair of records."""
    root, truth = copied(kind)
    found = files_of(root)
    pairs = [
        (a, b) for a in found for b in found if a < b and a.suffix == b.suffix and a.read_bytes() != b.read_bytes()
    ]
    for a, b in random.Random(5).sample(pairs, min(80, len(pairs))):
        one, other = a.read_bytes(), b.read_bytes()
        a.write_bytes(other)
        b.write_bytes(one)
        assert is_told(root), (a, b)
        assert_nothing_wrong_is_read(root, truth)
        a.write_bytes(one)
        b.write_bytes(other)
    assert verify(root).intact


def test_files_of_another_run_are_told(copied, runs: dict[str, Path]) -> None:
    """The other run is of the same model and dtype, so that only identities differ."""
    root, truth = copied("float32")
    other = root.parent / "other"
    train(other, "float32", False, 0)
    for mine, theirs in zip(files_of(root), files_of(other), strict=True):
        assert mine.suffix == theirs.suffix
        text = mine.read_bytes()
        mine.write_bytes(theirs.read_bytes())
        assert is_told(root), mine
        assert_nothing_wrong_is_read(root, truth)
        mine.write_bytes(text)
    for folder in sorted((other / "snapshots").iterdir()):
        shutil.copytree(folder, root / "snapshots" / folder.name)
        assert_told_and_harmless(root, truth)
        assert [snapshot.t for snapshot in open_run(root).snapshots] == [10.0, 20.0, 30.0, 40.0]
        shutil.rmtree(root / "snapshots" / folder.name)


@pytest.mark.parametrize(
    "name", ["notes.txt", "snapshots/notes.txt", "SNAPSHOT/rank-00009.safetensors", "layouts/a/b", "frozen/x", "a/b/c"]
)
def test_files_that_no_record_names_are_listed_and_harm_nothing(copied, name: str) -> None:
    root, truth = copied("ranks")
    path = root / name.replace("SNAPSHOT", open_run(root).snapshots[0].name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine")
    assert verify(root).extra == (str(path.relative_to(root)),)
    assert numbers(root) == truth


def session_and_snapshot(root: Path) -> tuple[Path, Path]:
    snapshot = open_run(root).snapshots[0]
    return root / "sessions" / f"{snapshot.facts.session}.json", root / snapshot.name / "snapshot.json"


EDITS: dict[str, tuple[str, Callable[[dict], Any]]] = {
    "another run": ("snapshot", lambda data: data.update(run="0" * 32)),
    "another session": ("snapshot", lambda data: data.update(session="0" * 12)),
    "another number": ("snapshot", lambda data: data.update(snapshot=7)),
    "another time": ("snapshot", lambda data: data.update(t=data["t"] + 2.0)),
    "a later start": ("snapshot", lambda data: data.update(start=11.0)),
    "another size": ("snapshot", lambda data: data["parts"][0].update(size=data["parts"][0]["size"] - 1)),
    "a huge size": ("snapshot", lambda data: data["parts"][0].update(size=10**15)),
    "a part less": ("snapshot", lambda data: data["parts"].pop()),
    "another digest": ("snapshot", lambda data: data["parts"][0].update(digests="0" * 32)),
    "half a digest": ("snapshot", lambda data: data["parts"][0].update(digests="0" * 16)),
    "no digests": ("snapshot", lambda data: data["parts"][0].update(digests="")),
    "another store": ("snapshot", lambda data: data["parts"][0].update(frozen=9)),
    "norms of more averages": ("snapshot", lambda data: data.update(norms=[1.0] * 9)),
    "a path as session": ("snapshot", lambda data: data.update(session="../../../etc")),
    "a path as layout": ("session", lambda data: data.update(layout="../../../etc/passwd")),
    "an absolute layout": ("session", lambda data: data.update(layout="/etc/passwd")),
    "more ranks": ("session", lambda data: data.update(world_size=3)),
    "very many ranks": ("session", lambda data: data.update(world_size=10**12)),
    "a parent that is not there": ("session", lambda data: data.update(parent="0" * 12)),
    "the session as its own parent": ("session", lambda data: data.update(parent=data["session"])),
    "frozen tensors of nobody": ("session", lambda data: data.update(frozen_from="../x", frozen_numbers=[1, 1])),
    "other shapes": ("run", lambda data: data["parameters"][0].update(shape=[4, 4])),
    "huge shapes": ("run", lambda data: data["parameters"][0].update(shape=[10**9, 10**9])),
    "a huge buffer": ("run", lambda data: data["copied"][0].update(shape=[10**15])),
    "a huge frozen tensor": ("run", lambda data: data["frozen"][0].update(shape=[10**15])),
    "another dtype": ("run", lambda data: data.update(dtype="float16")),
    "a dtype that is none": ("run", lambda data: data["copied"][0].update(dtype="os.system")),
    "other averages": ("run", lambda data: data.update(averages=data["averages"][::-1][:1])),
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_record_edited_by_hand_whose_digest_was_made_right_is_told_all_the_same(copied, edit: str, tmp_path) -> None:
    root, truth = copied("ranks")
    session, snapshot = session_and_snapshot(root)
    kind, change = EDITS[edit]
    resealed({"run": root / "run.json", "session": session, "snapshot": snapshot}[kind], change)
    tracemalloc.start()
    try:
        with reads_inside(root):
            assert_told_and_harmless(root, truth)
            assert_rebuilt_or_refused(root, tmp_path / "out")
        assert tracemalloc.get_traced_memory()[1] < 64 << 20, "memory that no file justifies"
    finally:
        tracemalloc.stop()


def assert_rebuilt_or_refused(root: Path, out: Path) -> None:
    blocks._kept.clear()
    try:
        reconstruct(root, ["0.12"], out=out)
    except PhemaError:
        assert not out.exists()


@contextmanager
def reads_inside(root: Path) -> Iterator[None]:
    """Fails where the store opens a file outside of a folder."""

    def before(name: str, args: tuple[Any, ...]) -> None:
        if name in ("open", "scandir") and not is_flushed(*args):
            path = os.path.realpath(args[0])
            assert os.path.commonpath([path, os.path.realpath(root)]) == os.path.realpath(root), path

    def is_flushed(path: str, flags: int = 0, *rest: Any) -> bool:
        """Folders are opened to have them on disk, and what is written is no reading."""
        return bool(flags & (os.O_DIRECTORY | os.O_WRONLY))

    with faults.counted(before):
        yield


def test_a_layout_moved_by_hand_is_told_even_with_its_identity_made_right(copied) -> None:
    root, truth = copied("ranks")
    (layout,) = (root / "layouts").iterdir()

    def move(data: dict) -> None:
        cut = next(cut for cut in data["averaged"] if len(cut["edges"]) == 3 and cut["edges"][1] > 0)
        cut["edges"][1] -= 1

    resealed(layout, move)
    assert_told_and_harmless(root, truth)
    import xxhash

    name = xxhash.xxh3_64_hexdigest(layout.read_bytes())
    layout.rename(layout.with_name(f"{name}.json"))
    for session in (root / "sessions").iterdir():
        resealed(session, lambda data: data.update(layout=name))
    assert_told_and_harmless(root, truth)


def test_a_header_that_claims_to_be_huge_takes_no_memory(copied) -> None:
    root, truth = copied("float32")
    import xxhash

    for claim in (2**63, 10**8, 10**12):
        _, record = session_and_snapshot(root)
        tensors = record.with_name("rank-00000.safetensors")
        text = tensors.read_bytes()
        tensors.write_bytes(claim.to_bytes(8, "little") + text[8:])
        digest = xxhash.xxh3_128_hexdigest(tensors.read_bytes())
        resealed(record, lambda data, digest=digest: data["parts"][0].update(digests=digest))
        tracemalloc.start()
        assert_told_and_harmless(root, truth)
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
        tracemalloc.stop()


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([-1, 0, 1, 2**31, 2**63, 2**64, 10**30, 10**400]),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from(["", ".", "..", "../../etc/passwd", "/etc/passwd", "a\\b", "\0", "\n", "é" * 300, "float16"]),
    st.text(max_size=5),
    st.lists(st.integers(-3, 10), max_size=3),
    st.recursive(st.just([]), lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner)),
)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every place in a JSON value where another value could stand."""
    children = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    return [(value, key) for key, _ in children] + [place for _, child in children for place in places(child)]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_any_edit_of_any_record_gives_nothing_but_errors_of_ours_and_reads_nothing_elsewhere(runs, data) -> None:
    root = runs[data.draw(st.sampled_from(["float32", "ranks"]))]
    records = [path for path in files_of(root) if path.suffix == ".json"]
    path = data.draw(st.sampled_from(records))
    text = path.read_bytes()
    record = json.loads(text)
    del record["digest"]
    for _ in range(data.draw(st.integers(1, 2))):
        if found := places(record):
            holder, key = data.draw(st.sampled_from(found))
            if data.draw(st.booleans()) or holder is record:
                holder[key] = data.draw(ODD)
            else:
                del holder[key]
    try:
        path.write_bytes(sealed(record))
        with reads_inside(root):
            try:
                verify(root)
                numbers(root, told=True)
            except PhemaError:
                pass
            out = root.parent / "fuzzed"
            assert_rebuilt_or_refused(root, out)
            shutil.rmtree(out, ignore_errors=True)
    finally:
        path.write_bytes(text)


def test_a_damaged_record_of_the_run_or_of_a_session_is_one_clear_error(copied) -> None:
    root, _ = copied("float32")
    session, _ = session_and_snapshot(root)
    for path in (root / "run.json", session):
        text = path.read_bytes()
        path.write_bytes(text[:-20] + b"x" + text[-19:])
        for act in (open_run, verify):
            with pytest.raises(StoreError, match=rf"{path}: the record is damaged") as caught:
                act(root)
            assert "restore it from a backup" in caught.value.hint
        path.write_bytes(text)


def test_a_damaged_layout_sets_its_snapshots_aside_and_the_others_are_read(copied) -> None:
    root, _ = copied("float32")
    train_wider(root)
    old = open_run(root).snapshots[0].facts.session
    layout = root / "layouts" / f"{json.loads((root / 'sessions' / f'{old}.json').read_bytes())['layout']}.json"
    layout.write_bytes(layout.read_bytes().replace(b'"edges"', b'"edgez"'))
    run = open_run(root)
    assert run.damaged and all("the record is damaged" in damaged.reason for damaged in run.damaged)


def train_wider(root: Path) -> None:
    """One more snapshot by this process, cut as before."""
    model = Small()
    with PostHocEMA(model, root, snapshot_every=10) as ema:
        ema.resume()
        ema.update()


def spoil(root: Path, name: str, rank: int = 0) -> None:
    """Damage the last number of a rank's tensors of a snapshot."""
    path = root / name / f"rank-{rank:05d}.safetensors"
    text = bytearray(path.read_bytes())
    text[-3] ^= 4
    path.write_bytes(text)


def rebuilt(root: str, out: str) -> tuple[tuple[str, ...], float, float]:
    blocks._kept.clear()
    plan = reconstruct(root, ["0.12", "0.2"], out=out)
    target = plan.targets[0]
    return tuple(lost.name for lost in plan.left_out), target.fit.forecast, target.forecast_before


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.safetensors")}


HARMS: dict[str, Callable[[Path, str], object]] = {
    "a block": spoil,
    "a block of the last rank": lambda root, name: spoil(root, name, 1),
    "a missing file": lambda root, name: (root / name / "rank-00000.safetensors").unlink(),
    "its record": lambda root, name: (root / name / "snapshot.json").write_text("{}"),
}


@pytest.mark.parametrize("which", [1, 3])
def test_a_reconstruction_without_the_damaged_is_that_of_a_run_that_never_had_them(copied, which: int) -> None:
    """Oracle: a copy of the run from which the snapshot's folder was removed. On one process and on two."""
    healthy, _ = copied("ranks")
    lost = open_run(healthy).snapshots[which].name
    never = healthy.parent / "never"
    shutil.copytree(healthy, never)
    shutil.rmtree(never / lost)
    rebuilt(str(never), str(never / "out"))
    whole = rebuilt(str(healthy), str(healthy / "out"))
    assert whole[0] == () and whole[1] == whole[2]
    for number, (what, harm) in enumerate(HARMS.items()):
        root = healthy.parent / f"harmed-{number}"
        shutil.copytree(healthy, root)
        shutil.rmtree(root / "out")
        harm(root, lost)
        answers = [rebuilt(str(root), str(root / "one"))]
        if what in ("a block", "a block of the last rank"):
            answers += run_ranks(2, rebuilt, str(root), str(root / "two"))
            assert contents(root / "two") == contents(never / "out")
        assert contents(root / "one") == contents(never / "out"), what
        for names, after, before in answers:
            assert names == (lost,)
            # Of a record that is gone nobody knows what it would have given.
            assert before == (after if what == "its record" else whole[1])
        recipe = json.loads((root / "one" / "0.12" / "phema.json").read_text())
        assert [one["snapshot"] for one in recipe["left_out"]] == [lost]
        assert recipe["forecast_before"] == answers[0][2]


def test_where_every_snapshot_is_damaged_one_of_the_errors_is_raised(copied, tmp_path) -> None:
    root, _ = copied("float32")
    for snapshot in open_run(root).snapshots:
        spoil(root, snapshot.name)
    blocks._kept.clear()
    with pytest.raises(StoreError, match="is damaged between bytes"):
        reconstruct(root, ["0.12"], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_damaged_frozen_tensors_are_an_error_because_no_snapshot_is_whole_without_them(copied, tmp_path) -> None:
    root, _ = copied("float32")
    blocks._kept.clear()
    held = next(layer for layer in open_run(root).snapshots[-1].frozen if any(layer.numbers))
    tensors = next((root / "frozen").glob(f"{held.session}-*/*.safetensors"))
    text = bytearray(tensors.read_bytes())
    text[-1] ^= 1
    tensors.write_bytes(text)
    with pytest.raises(StoreError, match=r"frozen/.* is damaged"):
        reconstruct(root, ["0.12"], out=tmp_path / "out")


def test_a_swap_leaves_a_damaged_snapshot_out_and_a_resume_from_it_names_the_one_before(copied) -> None:
    root, _ = copied("float32")
    never = root.parent / "never"
    shutil.copytree(root, never)
    last = open_run(root).snapshots[-1].name
    spoil(root, last)
    swapped = []
    for folder, lost in ((root, last), (never, last)):
        if folder == never:
            shutil.rmtree(folder / lost)
        blocks._kept.clear()
        model = Small()
        ema = PostHocEMA(model, folder, snapshot_every=10)
        if folder == root:
            with pytest.raises(StoreError, match="is damaged between bytes") as caught:
                ema.resume()
            assert "resume(t=30)" in caught.value.hint
        assert ema.resume(30) == 30
        with ema.swapped("window:0.4"):
            swapped.append(model.first.weight.detach().clone())
    assert torch.equal(*swapped)
